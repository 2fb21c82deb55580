"""What becomes of CPU memory that is freed: whether the next step uses it, or the system gets it back.

By default glibc returns each freed block of some megabytes to the system, and the next result of that size gets fresh
pages, which the system first has to clear. On a CPU that is a considerable part of a training or matching step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping

from selmatch_ext import _C

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


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Within, the large results of this package's operations on the CPU, such as convolutions, are written to memory
    that earlier results have left (csrc/step_memory.h). At the end what is left goes back to the system, so that a
    program that calls us holds no more than before. Scopes may lie in one another and in several threads."""
    _C.begin_steps()
    try:
        yield
    finally:
        _C.end_steps()


class HeldMemory:
    """A scope of `reused_memory` that lasts as long as the object."""

    def __init__(self) -> None:
        _C.begin_steps()
        weakref.finalize(self, _C.end_steps)


def is_chosen(environment: Mapping[str, str]) -> bool:
    """Whether the user has set a variable of glibc's allocator, which the command line then leaves as it is."""
    tuned = "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
    return tuned or any(name in environment for name in _VARIABLES)


def keep_memory_unless_chosen() -> None:
    """For the command line. A library leaves the choice to the program that imports it."""
    if not is_chosen(os.environ):
        keep_memory()
