"""Reduced precision, only where it is asked for and only as far as the `with` reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def precision_scope(precision: str, device: torch.device) -> Iterator[None]:
    """float32 changes nothing; bfloat16 runs convolutions and products in bfloat16 (autocast); tf32 lets a CUDA device
    round float32 products to TF32.

    Raises ValueError for another name, or for tf32 on a device that is not CUDA."""
    if precision == "float32":
        yield
    elif precision == "bfloat16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    elif precision == "tf32":
        if device.type != "cuda":
            raise ValueError(f"precision 'tf32' needs a CUDA device, got {device}")
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
    else:
        raise ValueError(f"precision must be float32, tf32 or bfloat16, got {precision!r}")
