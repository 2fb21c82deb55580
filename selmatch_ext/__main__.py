"""python -m selmatch_ext, and selmatch: the command line."""

import sys

from selmatch_ext import cli_help


def main() -> int:
    """Runs the command; what needs no torch is answered before torch is imported."""
    if cli_help.asked(sys.argv[1:]):
        return cli_help.answer(sys.argv[1:])
    from selmatch_ext import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
