"""Norm + activation + pooling of a convolutional network in one pass over memory: forward, backward, and both again
carrying tangents (csrc/block/block.h has the formulas). The fused engine of `unrolled_sgd` is built on these; `block`
is the differentiable operation for ordinary training."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from selmatch_ext.ops.functorch import refuse_tangents

NO_NORM, SAMPLE_NORM, BATCH_NORM = range(3)
PIECEWISE, SIGMOID, SWISH = range(3)
NO_POOL, AVERAGE_POOL, MAX_POOL = range(3)


class BlockKind(NamedTuple):
    """What a block does; the numbers are those of csrc/block/block.h.

    norm: SAMPLE_NORM is over each image and group of channels (instance norm: a group per channel; layer norm: one
    group), BATCH_NORM with the statistics of the batch. activation: PIECEWISE is x > 0 ? x : slope x (ReLU has slope
    0, none slope 1). pool: of 2 x 2 pixels with stride 2."""

    norm: int = NO_NORM
    groups: int = 1
    eps: float = 1e-5
    activation: int = PIECEWISE
    slope: float = 1.0
    pool: int = NO_POOL


Affine = tuple[Tensor | None, Tensor | None]
"""gamma and beta, the scale and shift after a norm; see `block_forward`."""


class DualTensor(NamedTuple):
    """A tensor and its tangent; the tangent is `tangent` + `more`, which the kernel adds while it reads (None: 0)."""

    value: Tensor
    tangent: Tensor
    more: Tensor | None = None


def block_forward(z: Tensor, gamma: Tensor | None, beta: Tensor | None, kind: BlockKind) -> tuple[Tensor, Tensor]:
    """y = pool(act(norm(z))) and the statistics that the backward pass takes.

    z: (B, C, H, W) float32, float64 or bfloat16, best in channels-last memory (else it is copied); gamma, beta: (C,),
    or (C, H, W) as in torch's LayerNorm, float64 where z is and else float32; None: ones and zeros, the one choice
    without a norm. y: (B, C, H // 2, W // 2), or like z without pooling, channels-last; stats: (B or 1, 2, C).
    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit."""
    return torch.ops.selmatch_ext.block_forward(z, gamma, beta, *kind)


def block_backward(
    g: Tensor, z: Tensor, stats: Tensor, gamma: Tensor | None, beta: Tensor | None, kind: BlockKind
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z, gamma and beta from that of y, g. Without a norm those of gamma and beta are empty.
    Differentiating them raises RuntimeError."""
    return torch.ops.selmatch_ext.block_backward(g, z, stats, gamma, beta, *kind)


def block_dual_forward(z: DualTensor, affine: Affine, affine_t: Affine, kind: BlockKind) -> tuple[Tensor, Tensor]:
    """y and its tangent in one batch, (2B, ...), y first, and statistics (B or 1, 4, C). affine_t: the tangents of
    gamma and beta."""
    return torch.ops.selmatch_ext.block_dual_forward(*z, *affine, *affine_t, *kind)


def block_dual_backward(
    g: DualTensor, z: DualTensor, stats: Tensor, affine: Affine, affine_t: Affine, kind: BlockKind
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangent of the gradient of z and that gradient in one batch, (2B, ...), the tangent first; and the tangents
    of the gradients of gamma and beta. stats: those of `block_dual_forward`."""
    return torch.ops.selmatch_ext.block_dual_backward(*g, *z, stats, *affine, *affine_t, *kind)


def block(z: Tensor, gamma: Tensor | None, beta: Tensor | None, kind: BlockKind) -> Tensor:
    """y of `block_forward`, differentiable once in z, gamma and beta by torch.autograd: differentiating again raises
    RuntimeError, and a tangent of forward mode NotImplementedError."""
    refuse_tangents("block", z, gamma, beta)
    return torch.ops.selmatch_ext.block_forward(z, gamma, beta, *kind)[0]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    z, gamma, beta, *kind = inputs
    ctx.kind = BlockKind(*kind)
    ctx.save_for_backward(z, gamma, beta, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    z, gamma, beta, stats = ctx.saved_tensors
    gz, gamma_grad, beta_grad = block_backward(g, z, stats, gamma, beta, ctx.kind)
    return gz, *(None if p is None else d for p, d in ((gamma, gamma_grad), (beta, beta_grad))), *[None] * 6


torch.library.register_autograd("selmatch_ext::block_forward", _backward, setup_context=_save)


def no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the gradient of block (and of conv_block) cannot be differentiated again: it is differentiable once"
    )


torch.library.register_autograd("selmatch_ext::block_backward", no_double_backward)
