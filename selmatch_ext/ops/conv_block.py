"""A network's first layer on the CPU: `conv3x3` of an input of 1 to 4 channels, and the block that takes its result z.
In the passes back the gradient of z, the largest tensor of a step, is used as it is computed and never stored."""

from typing import Any

import torch
from torch import Tensor

from selmatch_ext.ops.block import BATCH_NORM, SAMPLE_NORM, Affine, BlockKind, DualTensor, no_double_backward


def conv_block(
    x: Tensor, weight: Tensor, bias: Tensor | None, affine: Affine, kind: BlockKind
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's result y, z, and the statistics that the passes back take; y is differentiable once, in the
    parameters. x gets no gradient. The bias gets one of zeros, which is right for a norm that subtracts every channel's
    mean: batch norm, instance norm; behind another one a bias that needs a gradient is an error in the pass back.

    x: (B, C, H, W) float32 or float64, C 1 to 4; weight: (K, C, 3, 3), K a multiple of 32; bias: (K,); affine, kind: of
    `block_forward`. Raises ValueError or TypeError for shapes and dtypes that do not fit."""
    return torch.ops.selmatch_ext.conv_block_forward(x, weight, bias, *affine, *kind)


def conv_block_backward(
    g: Tensor, saved: tuple[Tensor, Tensor, Tensor], affine: Affine, kind: BlockKind
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the convolution's weight (K, C, 3, 3), of gamma and of beta, from that of the block's result, g.

    saved: x, z and the statistics of `conv_block`. Not differentiable. Raises ValueError or TypeError for shapes and
    dtypes that do not fit."""
    return torch.ops.selmatch_ext.conv_block_backward(g, *saved, *affine, *kind)


def conv_block_dual_forward(
    x: Tensor, weights: tuple[Tensor, Tensor], affines: tuple[Affine, Affine], kind: BlockKind
) -> tuple[Tensor, Tensor, Tensor]:
    """y and its tangent in one batch (2B, ...), z and its tangent in one, and statistics (B or 1, 4, K), where x has no
    tangent. weights, affines: each a value and its tangent."""
    return torch.ops.selmatch_ext.conv_block_dual_forward(x, *weights, *affines[0], *affines[1], *kind)


def conv_block_dual_backward(
    g: DualTensor,
    saved: tuple[Tensor, DualTensor, Tensor],
    weights: tuple[Tensor, Tensor],
    affines: tuple[Affine, Affine],
    kind: BlockKind,
    *,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tangents of the gradients of x, of the weight (empty where it is not `weight_wanted`), of gamma and of beta,
    where x has no tangent. g and z: without `more`. saved: x, z and the statistics of `conv_block_dual_forward`;
    weights and affines as there."""
    x, z, stats = saved
    args = (*g[:2], x, *weights, *z[:2], stats, *affines[0], *affines[1], weight_wanted, *kind)
    return torch.ops.selmatch_ext.conv_block_dual_backward(*args)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, bias, gamma, beta, *kind = inputs
    _, z, stats = output
    ctx.kind = BlockKind(*kind)
    ctx.save_for_backward(x, z, stats, bias, gamma, beta)
    ctx.mark_non_differentiable(z, stats)
    ctx.set_materialize_grads(False)  # else torch would make a gradient of zeros for z, as large as z


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, z, stats, bias, gamma, beta = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        raise RuntimeError("conv_block: x, the images, gets no gradient")
    kind, channels = ctx.kind, z.shape[1]
    if ctx.needs_input_grad[2] and (kind.norm, kind.groups) not in ((BATCH_NORM, kind.groups), (SAMPLE_NORM, channels)):
        raise RuntimeError("conv_block: bias gets a gradient only before batch norm or instance norm, which cancel it")
    if g is None:
        return (None,) * 11
    z = z.detach().requires_grad_(torch.is_grad_enabled())  # so that a second derivative meets `no_double_backward`
    of_weight, *found = conv_block_backward(g, (x, z, stats), (gamma, beta), kind)
    of_bias = None if bias is None else torch.zeros_like(bias)
    affine = (None if p is None else d for p, d in zip((gamma, beta), found, strict=True))
    return None, of_weight, of_bias, *affine, *[None] * 6


torch.library.register_autograd("selmatch_ext::conv_block_forward", _backward, setup_context=_save)
torch.library.register_autograd("selmatch_ext::conv_block_backward", no_double_backward)
