"""Several processes, started by torchrun: which part of the work is whose. In a single process all of this is trivial.

    torchrun --nproc-per-node 2 -m selmatch_ext distill …

Rank 0 writes records, results and progress bars; what only one rank computes (an expert, say), it writes itself. All
ranks see one file system. Tensors travel through the CPU (gloo), so that processes may share a GPU or have none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from selmatch_ext.clock import Bar
from selmatch_ext.output import safe

PATIENCE = timedelta(days=30)  # a rank may wait for another's whole expert
_apart = False
"""Whether this process is within `alone`."""
_bars = True
"""Whether it shows progress bars."""


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _several() else 0


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def mine(count: int) -> range:
    """The numbers in 0..count−1 that are this rank's: every world-th."""
    return range(rank(), count, world())


def gather(tensor: Tensor) -> list[Tensor]:
    """The tensor of every rank, in their order, on this tensor's device. All have one shape and dtype."""
    if not _several():
        return [tensor]
    here = tensor.detach().cpu().contiguous()
    everyone = [torch.empty_like(here) for _ in range(world())]
    _wait(lambda: dist.all_gather(everyone, here, async_op=True))
    return [t.to(tensor.device) for t in everyone]


def collect(mine: dict[int, Tensor], count: int, blank: Tensor) -> list[Tensor]:
    """Results 0..count−1 on every rank, where each computed some of `ranks.mine(count)`; `blank` has a result's shape
    and dtype, and stands where there is none."""
    rounds = -(-count // world())
    everyone = gather(torch.stack([mine.get(rank() + i * world(), blank) for i in range(rounds)]))
    return [everyone[k % world()][k // world()] for k in range(count)]


def barrier() -> None:
    """Waits until every rank is here, and so until each one's files are written."""
    if _several():
        _wait(lambda: dist.barrier(async_op=True))


def _wait(begin: Callable[[], dist.Work]) -> None:
    """Waits for the others in short naps, so that Ctrl-C and SIGTERM are heard meanwhile. ConnectionError when one of
    them is gone."""
    try:
        work, nap = begin(), 1e-5
        while not work.is_completed():
            time.sleep(nap)
            nap = min(2 * nap, 0.05)
        work.wait()
    except RuntimeError as error:
        raise ConnectionError(
            f"another of the {world()} processes has ended, and this one, number {rank()}, cannot go on alone; the "
            "same command continues"
        ) from error


def progress(**options: Any) -> Bar:
    """A progress bar with the options of tqdm and `Bar`, shown by rank 0 alone; within `alone` where it says so."""
    return Bar(**options, disable=not (first() and _bars), file=safe(sys.stderr))


@contextlib.contextmanager
def alone(bars: bool = False) -> Iterator[None]:
    """Within, this process does all of the work itself and waits for no other, as if there were one: for a piece of
    work that is one rank's as a whole. bars: whether to show progress, which should be off where other ranks do the
    same meanwhile."""
    global _apart, _bars
    before, _apart, _bars = (_apart, _bars), True, bars and _bars
    try:
        yield
    finally:
        _apart, _bars = before


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun started, for as long as the block lasts; does nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or _several():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # where another process is gone
            dist.destroy_process_group()


def _several() -> bool:
    return not _apart and dist.is_available() and dist.is_initialized()
