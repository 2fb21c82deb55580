"""How the threads of OpenMP wait for each other. torch computes with them on the CPU.

By default a thread that waits keeps its core busy for milliseconds. Beside other processes that want the same cores
every parallel loop then waits for a thread that another waiting thread keeps from running, and a run takes many times
as long. The runtime reads its variables once, when torch loads it, so that they have to be set before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import PurePath

# GNU's runtime, which torch's wheels for Linux load, counts turns of a loop that waits: these are about as many as
# putting a thread to sleep and waking it costs. The others' threads sleep at once.
POLICY = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
CHOICES = (*POLICY, "KMP_BLOCKTIME", "KMP_LIBRARY")  # any of these is a choice of the user's


def wait_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that make threads wait without keeping a core busy; none where `environment` has a policy."""
    return {} if any(name in environment for name in CHOICES) else dict(POLICY)


def is_command_line() -> bool:
    """Whether this process was started as `selmatch …`, or as `python -m selmatch_ext …`, which imports the package
    before it sets sys.argv."""
    if sys.argv[:1] == ["-m"]:
        return any(word in ("selmatch_ext", "-mselmatch_ext") for word in sys.orig_argv)
    return bool(sys.argv) and PurePath(sys.argv[0]).stem in ("selmatch", "selmatch-script")


def prepare() -> None:
    """Chooses the policy for the command line. A library leaves the choice to the program that imports it."""
    if is_command_line() and "torch" not in sys.modules:
        os.environ.update(wait_policy(os.environ))
