"""Differentiable Siamese augmentation (DSA, arXiv 2102.08259): sampled as small tables, applied in one fused launch.

A table says, row by row, which operations an image goes through; sampling.py draws tables. Every operation is affine in
the image, so the backward pass is the transpose of its linear part and the double backward pass is the linear part
again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from selmatch_ext.ops.functorch import CONSTANT_TABLE, FORWARD, LINEAR, TRANSPOSE, Dsa, transformed  # noqa: F401

NONE, COLOR, SHIFT, BOX, FLIP, AFFINE = range(6)  # operation codes, as in csrc/dsa/dsa.h


class Augmentation(NamedTuple):
    """One augmentation of a batch, as tensors that can be stored, moved and indexed.

    ops: (R, L) uint8, the operations applied in order: 0 nothing, 1 color, 2 shift, 3 zero box, 4 flip of the columns,
        5 affine map.
    params: (R, L, 4) float32 or float64: color (brightness b, saturation s, contrast c, unused); shift (ty, tx):
        out[i, j] = x[i + ty, j + tx], 0 outside; box (first row, end row, first column, end column), which may reach
        beyond the image; affine (a, b, c, d): bilinear sampling through [[a, b, 0], [c, d, 0]] in normalized
        coordinates, align_corners=True, zeros outside.
    R is the batch size, or 1: then every image gets the same operations.
    What torch.save writes of it torch.load reads with weights_only=True, where selmatch_ext is imported.
    """

    ops: Tensor
    params: Tensor

    def to(self, device: torch.device | str) -> "Augmentation":
        """The same table on another device."""
        return Augmentation(self.ops.to(device), self.params.to(device))


torch.serialization.add_safe_globals([Augmentation])


def mix_augmentations(mask: Tensor, when_true: Augmentation, when_false: Augmentation) -> Augmentation:
    """One table that applies `when_true` to the images where `mask` is True and `when_false` to the others, in one
    launch.

    mask: (B,) bool. when_true, when_false: tables of B rows or of one row, on the mask's device; the one with fewer
    operations is padded with operation 0. Returns a table of B rows. Raises TypeError where the mask is not (B,) bool,
    ValueError where a table has another number of rows or is on another device.
    """
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise TypeError(f"mask must be a bool tensor of shape (batch,), got {mask.dtype} of shape {tuple(mask.shape)}")
    rows, length = mask.shape[0], max(when_true.ops.shape[1], when_false.ops.shape[1])
    padded = []
    for name, table in (("when_true", when_true), ("when_false", when_false)):
        if table.ops.shape[0] not in (1, rows):
            raise ValueError(f"{name} has {table.ops.shape[0]} rows; 1 or the mask's {rows} are allowed")
        if table.ops.device != mask.device:
            raise ValueError(f"{name} is on {table.ops.device}, mask on {mask.device}; they must be on one device")
        missing = length - table.ops.shape[1]
        padded.append(
            (
                torch.nn.functional.pad(table.ops, (0, missing)),
                torch.nn.functional.pad(table.params, (0, 0, 0, missing)),
            )
        )
    (ops_true, params_true), (ops_false, params_false) = padded
    ops = torch.where(mask[:, None], ops_true, ops_false)
    return Augmentation(ops, torch.where(mask[:, None, None], params_true, params_false))


def check_images(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (batch, channels, height, width), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}")


def _check_table(x: Tensor, p: Augmentation) -> None:
    if not isinstance(p, Augmentation):
        raise TypeError(f"p must be a result of sample_augmentation, got {type(p).__name__}")
    if p.ops.device != x.device or p.params.device != x.device:
        raise ValueError(f"x is on {x.device}, the table on {p.ops.device}; move it with p.to(x.device)")
    if p.ops.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"the table has {p.ops.shape[0]} rows; 1 or the batch size {x.shape[0]} are allowed")
    if p.params.requires_grad and torch.is_grad_enabled():
        raise ValueError(CONSTANT_TABLE)


def _apply(x: Tensor, p: Augmentation, mode: int) -> Tensor:
    if transformed():
        return Dsa.apply(x, p.ops, p.params, mode)
    return torch.ops.selmatch_ext.dsa(x, p.ops, p.params, mode)


def augment(x: Tensor, p: Augmentation) -> Tensor:
    """Apply an augmentation to a batch, in one launch; differentiable any number of times in x.

    x: (B, C, H, W) float32, float64, float16 or bfloat16 (the last two are computed in float32), any strides; the
    result has its dtype and its memory format. p: a table of B rows, or of one row for all images, on the same device.
    Works under the transforms of `torch.func`, in forward mode and in `torch.compile` too; but torch.compile around a
    transform other than vmap is an error of PyTorch ("cannot use C++ torch::autograd::Function with functorch").
    Raises ValueError or TypeError that says which of these does not hold, ValueError also where p.params requires a
    gradient (RuntimeError in forward mode): the result is differentiated with respect to x only.
    """
    check_images(x)
    _check_table(x, p)
    return _apply(x, p, FORWARD)


def augment_transposed(g: Tensor, p: Augmentation) -> Tensor:
    """The transpose of the linear part of `augment`: what its backward pass makes of the gradient g of its result."""
    return _apply(g, p, TRANSPOSE)
