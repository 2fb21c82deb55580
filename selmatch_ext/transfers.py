"""Copies to a GPU that the host does not wait for: what an iteration needs goes there in one copy for each dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selmatch_ext.ops.dsa import Augmentation


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on `device`, as views of one tensor for each dtype; on the CPU the tensors themselves.

    On a GPU the copies come from pinned memory and do not block the host: work that is queued on the current stream
    afterwards sees them."""
    if device.type == "cpu":
        return list(tensors)
    moved: list[Tensor] = list(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        whole = torch.cat([tensors[i].reshape(-1) for i in places])
        if device.type == "cuda" and torch.cuda.is_available():
            whole = whole.pin_memory()
        whole = whole.to(device, non_blocking=True)
        parts = whole.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            moved[i] = part.view(tensors[i].shape)
    return moved


def steps_to_device(
    batches: Sequence[Tensor], augmentations: Sequence[Augmentation], device: torch.device
) -> tuple[list[Tensor], list[Augmentation]]:
    """Batches of indices and augmentation tables on `device`, in three copies (int64, uint8, float32)."""
    moved = to_device([*batches, *(tensor for table in augmentations for tensor in table)], device)
    tables = moved[len(batches) :]
    return moved[: len(batches)], [Augmentation(*pair) for pair in zip(tables[::2], tables[1::2], strict=True)]
