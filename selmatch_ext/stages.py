"""Which stage of a run failed: errors of torch name an operation, which says nothing to someone who typed a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


@contextlib.contextmanager
def stage(name: str, memory: str, **sizes: Any) -> Iterator[None]:
    """Within, a RuntimeError (of torch: out of memory and others) or MemoryError is noted to come from this stage; the
    innermost stage counts. The error itself stays as it is. memory: the settings that take less of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        shown = ", ".join(f"{key} {value}" for key, value in sizes.items())
        vars(error).setdefault("selmatch_stage", (name, shown, memory))
        raise


def describe_error(error: RuntimeError | MemoryError) -> str:
    """One line: the stage, what happened, the sizes, and what to try."""
    what = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    name, sizes, memory = getattr(error, "selmatch_stage", ("", "", "smaller batches"))
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in MEMORY):
        what, advice = f"out of memory: {what}", f"try {memory}, or a device with more memory"
    else:
        advice = "--debug shows where"
    return f"{name + ': ' if name else ''}{what}{f' ({sizes})' if sizes else ''}; {advice}"
