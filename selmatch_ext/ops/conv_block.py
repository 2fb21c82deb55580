"""A network's first layer on the CPU, `conv3x3` of 1 to 4 channels and the block that takes its result z, in one
operation without z, the largest tensor of a network: csrc/conv_block/conv_block.h says how. With batch or instance norm
the weight's gradient in float32 is more exact than one from a stored z."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from selmatch_ext.ops.block import MAX_POOL, PIECEWISE, Affine, BlockKind, no_double_backward
from selmatch_ext.ops.functorch import refuse_tangents


def conv_block_suits(affine: Affine, kind: BlockKind) -> bool:
    """Whether `conv_block` computes such blocks: those with a piecewise linear activation, before maximum pooling ReLU
    alone, and with gamma and beta of channels. Others need z."""
    of_channels = all(p is None or p.dim() == 1 for p in affine)
    return kind.activation == PIECEWISE and (kind.pool != MAX_POOL or kind.slope == 0) and of_channels


class Saved(NamedTuple):
    """What a pass back takes of the pass forward.

    bits: (B, I, K) integers, one for each 32 pixels, with a bit for each number of z; moments: (B or 1, 9 C + 1, 9 C +
    1) float64, those of the images' 3 x 3 patches; stats: (B or 1, 2, K) float64, z's means and 1 / deviations,
    or None after a dual pass."""

    bits: Tensor
    moments: Tensor
    stats: Tensor | None = None


def conv_block(x: Tensor, weight: Tensor, bias: Tensor | None, affine: Affine, kind: BlockKind) -> tuple[Tensor, Saved]:
    """The block's result y, and what `conv_block_backward` takes; y is differentiable once, in the parameters; where x
    requires a gradient, the backward pass raises RuntimeError. A bias is allowed where the norm subtracts every
    channel's mean, as batch norm and instance norm do: it counts in the means of `Saved.stats` alone, and its gradient
    is zeros.

    The norm's variance comes from the images' second moments in float64: where the images' mean is 10^k times their
    deviation, it has 2 k digits less than float64's 16.

    x: (B, C, H, W) float32 or float64, C 1 to 4; weight: (K, C, 3, 3), K a multiple of 32; bias: (K,) or None; affine,
    kind: of `block_forward`, where `conv_block_suits`. Raises ValueError or TypeError for shapes, dtypes or kinds that
    do not fit, NotImplementedError for a tangent of forward mode."""
    refuse_tangents("conv_block", x, weight, bias, *affine)
    y, *saved = torch.ops.selmatch_ext.conv_block_forward(x, weight, bias, *affine, *kind)
    return y, Saved(*saved)


def conv_block_backward(
    g: Tensor, x: Tensor, weight: Tensor, saved: Saved, affine: Affine, kind: BlockKind
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the convolution's weight (K, C, 3, 3), of gamma and of beta, from that of the block's result, g.

    saved: of `conv_block`. Not differentiable. Raises ValueError or TypeError for shapes, dtypes or kinds that do not
    fit."""
    return torch.ops.selmatch_ext.conv_block_backward(g, x, weight, *saved[:2], *affine, *kind)


def conv_block_dual_forward(
    x: Tensor, weights: tuple[Tensor, Tensor], affines: tuple[Affine, Affine], kind: BlockKind
) -> tuple[Tensor, Saved]:
    """y and its tangent in one batch (2B, ...), and what `conv_block_dual_backward` takes, where x has no tangent.
    weights, affines: each a value and its tangent."""
    y_both, *saved = torch.ops.selmatch_ext.conv_block_dual_forward(x, *weights, *affines[0], *affines[1], *kind)
    return y_both, Saved(*saved)


def conv_block_dual_backward(
    g: tuple[Tensor, Tensor],
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    saved: Saved,
    affines: tuple[Affine, Affine],
    kind: BlockKind,
    *,
    x_wanted: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tangents of the gradients of the weight, of gamma, of beta and of x (empty where it is not `x_wanted`), where
    x has no tangent. g: that of y, and its tangent; weights, affines: as in `conv_block_dual_forward`; saved: of it."""
    args = (*g, x, *weights, *saved[:2], *affines[0], *affines[1], x_wanted, *kind)
    return torch.ops.selmatch_ext.conv_block_dual_backward(*args)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, gamma, beta, *kind = inputs
    _, bits, moments, stats = output
    ctx.kind = BlockKind(*kind)
    ctx.save_for_backward(x, weight, bits, moments, bias, gamma, beta)
    ctx.mark_non_differentiable(bits, moments, stats)
    ctx.set_materialize_grads(False)  # else torch would make gradients of zeros for what is not differentiable


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bits, moments, bias, gamma, beta = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        raise RuntimeError("conv_block: x, the images, gets no gradient")
    if g is None:
        return (None,) * 11
    of_weight, *found = conv_block_backward(g, x, weight, Saved(bits, moments), (gamma, beta), ctx.kind)
    of_bias = None if bias is None else torch.zeros_like(bias)
    affine = (None if p is None else d for p, d in zip((gamma, beta), found, strict=True))
    return None, of_weight, of_bias, *affine, *[None] * 6


torch.library.register_autograd("selmatch_ext::conv_block_forward", _backward, setup_context=_save)
torch.library.register_autograd("selmatch_ext::conv_block_backward", no_double_backward)
