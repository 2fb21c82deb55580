"""How many threads a run computes with on the CPU: one, where a batch is so little work that several would spend their
time waiting for each other. Beside other processes that waiting costs most of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selmatch_ext.modules.copying import copied
from selmatch_ext.seeds import RandomState

SMALL = 2**25
"""Multiply-adds of a batch's forward pass. On two loaded cores a second thread saved between nothing and a fifth of an
inner step below it (9 to 19 million), and a tenth to a third above it (48 to 190 million)."""
CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a number of threads that the user has set


def threads_for(model: nn.Module, images: Tensor, batch: int) -> int:
    """The number of threads to use: 1 on the CPU where a forward pass of `batch` images costs less than SMALL and none
    of the variables in CHOICES is set; otherwise the current number.

    images: (n, C, H, W) like those of a batch; n at least 1. The result depends on the network and the sizes alone, not
    on how fast something ran, so that a repeated run gets the same one."""
    threads = torch.get_num_threads()
    if images.device.type != "cpu" or threads == 1 or any(name in os.environ for name in CHOICES):
        return threads
    try:
        work = batch * multiply_adds(model, images[:1])
    except Exception:  # of a network that does not take one image, in evaluation mode; or cannot be copied
        return threads
    return 1 if 0 < work < SMALL else threads  # 0: it calls no layer that is counted


@contextlib.contextmanager
def using(threads: int) -> Iterator[None]:
    """Within, torch computes with so many threads: for the whole process, so in one Python thread at a time."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers in a forward pass of `images` (B, C, H, W). The model and the
    generators of torch, Python and numpy stay as they are. Raises TypeError where the module cannot be copied."""
    counts = []

    def count(layer: nn.Module, _: object, result: Tensor) -> None:
        weight: Any = layer.weight  # no parameter where it is computed, as by torch.nn.utils.parametrize
        counts.append(result.numel() * weight[0].numel())

    before = RandomState(images.device)
    try:
        copy = copied(model, lambda p: nn.Parameter(p.detach().clone(), p.requires_grad)).eval()
        for layer in copy.modules():
            if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
                layer.register_forward_hook(count)
        copy(images)
    finally:
        before.restore()
    return sum(counts)
