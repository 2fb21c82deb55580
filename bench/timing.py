"""Timing things against one another in one run, so that what else the machine does meets all of them."""

import ctypes
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


def machine() -> dict:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__}


@contextmanager
def threads(count: int):
    """torch on this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_memory() -> None:
    """Lets this process keep the memory that it frees (glibc). As it is, the kernel clears fresh pages for every result
    of some megabytes, ours and the other's, and that takes longer, and varies more, than what is to be measured."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def alternate(
    callables: Mapping[str, Callable[[], object]], repeats: int = 15, warmup: int = 2, calls: int = 1
) -> dict[str, float]:
    """The median seconds of a call of each, taking turns `repeats` times after `warmup` turns that do not count.

    A turn is `calls` calls in a row, and its figure their mean: with several a case runs mostly in the caches and the
    heap that it left itself, as in a training loop, not in those of the case before. Each round has an order of its
    own, the same ones in every run, so that no case always follows the same other. Work on a GPU is waited for, before
    and after each turn.
    """
    seconds = {name: [] for name in callables}
    order, shuffle = list(callables), random.Random(0).shuffle
    for turn in range(warmup + repeats):
        shuffle(order)
        for name in order:
            function = callables[name]
            _wait()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            _wait()
            if turn >= warmup:
                seconds[name].append((time.perf_counter() - begin) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
