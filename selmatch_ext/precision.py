"""Reduced precision, only where it is asked for and only as far as the `with` reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def precision_scope(precision: str, device: torch.device) -> Iterator[None]:
    """float32 rounds nothing, also on a CUDA device, where torch by itself lets convolutions use TF32; tf32 rounds
    float32 products and convolutions there; bfloat16 runs them in bfloat16 (autocast).

    Raises ValueError for another name, or for tf32 on a device that is not CUDA."""
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision must be float32, tf32 or bfloat16, got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision 'tf32' needs a CUDA device, got {device}")
    if device.type != "cuda":
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
        return
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
