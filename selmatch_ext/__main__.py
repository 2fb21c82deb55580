"""python -m selmatch_ext: the command line."""

import sys

from selmatch_ext.cli import main

sys.exit(main())
