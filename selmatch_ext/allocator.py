"""Whether memory that is freed stays with the process (glibc).

By default glibc returns each freed block of some megabytes to the system, and the next result of that size gets fresh
pages, which the system first has to clear. On a CPU that is a considerable part of a training or matching step.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # malloc.h
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_memory() -> bool:
    """Makes this process keep the memory that it frees and use it again. Steps on the CPU become faster, and the
    process holds its peak memory until it ends. The setting affects all CPU memory that is freed after the call.

    Returns whether the C library took the setting: True with glibc, False elsewhere, where nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function: not glibc
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def is_chosen(environment: Mapping[str, str]) -> bool:
    """Whether the user has set a variable of glibc's allocator, which the command line then leaves as it is."""
    tuned = "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
    return tuned or any(name in environment for name in _VARIABLES)


def keep_memory_unless_chosen() -> None:
    """For the command line. A library leaves the choice to the program that imports it."""
    if not is_chosen(os.environ):
        keep_memory()
