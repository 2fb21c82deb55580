"""The passes back of a network's first layer on the CPU: `conv3x3` of an input of 1 to 4 channels, and the block that
takes its result z. The gradient of z, the largest tensor of a step, is used as it is computed and never stored."""

import torch
from torch import Tensor

from selmatch_ext.ops.block import Affine, BlockKind, DualTensor


def conv_block_backward(
    g: Tensor, saved: tuple[Tensor, Tensor, Tensor], affine: Affine, kind: BlockKind
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the convolution's weight (K, C, 3, 3), of gamma and of beta, from that of the block's result, g.

    saved: the image x (B, C, H, W) in float32 or float64, C 1 to 4, its convolution z (B, K, H, W), K a multiple of 32,
    and the statistics of `block_forward`, which has the rest. Not differentiable. Raises ValueError or TypeError for
    shapes and dtypes that do not fit."""
    return torch.ops.selmatch_ext.conv_block_backward(g, *saved, *affine, *kind)


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
    where x has no tangent. g and z have no `more`. saved: as in `conv_block_backward`, with the statistics of
    `block_dual_forward`; weights, affines: each a value and its tangent."""
    x, z, stats = saved
    args = (*g[:2], x, *weights, *z[:2], stats, *affines[0], *affines[1], weight_wanted, *kind)
    return torch.ops.selmatch_ext.conv_block_dual_backward(*args)
