"""3 x 3 convolution with stride 1 and padding 1 on the CPU, by Winograd's minimal filtering (arXiv 1509.09308): 36
products where the direct sum takes 144, for sums of 1152 products (128 channels; in the gradient of the weight 1152
pixels) or more on maps that are large enough, and else 64. For an input of 1 to 4 channels, as images have, by matrix
products."""

from typing import Any

import torch
from torch import Tensor

from selmatch_ext.ops.functorch import refuse_tangents

MULTIPLE, FEW = 32, 4  # numbers of channels are multiples of the first; the input may also have 1 to FEW


def conv3x3_suits(weight: Tensor) -> bool:
    """Whether `conv3x3` can compute the convolution with this weight (K, C, 3, 3), with stride 1 and padding 1, and is
    faster than torch. That is so in float32 on the CPU, if K is a multiple of 32 and C is one too, or at most 4."""
    outputs, channels, *size = weight.shape
    fits = size == [3, 3] and outputs % MULTIPLE == 0 and (channels % MULTIPLE == 0 or channels <= FEW)
    return fits and weight.dtype == torch.float32 and weight.device.type == "cpu"


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of torch's conv2d with padding 1.

    x: (B, C, H, W) float32 or float64 on the CPU, best in channels-last memory (else it is copied); weight: (K, C, 3,
    3); bias: (K,); K a multiple of 32, C as well or 1 to 4. The result, (B, K, H, W), is in channels-last memory.
    Differentiable any number of times, as its two gradients are, in reverse mode by torch.autograd, not by torch.func.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, NotImplementedError for a tangent of forward
    mode."""
    refuse_tangents("conv3x3", x, weight, bias)
    return torch.ops.selmatch_ext.conv3x3(x, weight, bias, False)


def conv3x3_input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input of `conv3x3`, (B, C, H, W). g: the gradient of its result, (B, K, H, W); weight: (K,
    C, 3, 3), as in the convolution."""
    refuse_tangents("conv3x3_input_gradient", g, weight)
    return torch.ops.selmatch_ext.conv3x3(g, weight, None, True)


def conv3x3_dual(
    x: Tensor,
    x_t: Tensor | None,
    weight: Tensor,
    weight_t: Tensor,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    transposed: bool = False,
    value: bool = True,
) -> Tensor:
    """The convolution y of `conv3x3` and its tangent along the direction (x_t, weight_t, bias_t), convolution(x_t,
    weight) + convolution(x, weight_t) + bias_t, in one batch (2B, K, H, W), y first. x_t like x, None: 0. biases: bias
    and bias_t.

    transposed: of `conv3x3_input_gradient`; x is then the gradient of the result, and the tangent comes first. value:
    whether y is asked for; the result is the tangent alone (B, K, H, W) where it is not. Not differentiable."""
    return torch.ops.selmatch_ext.conv3x3_dual(x, x_t, weight, weight_t, *biases, transposed, value)


def conv3x3_weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of the weight of `conv3x3`, (K, C, 3, 3). x: (B, C, H, W), its input; g: (B, K, H, W), the gradient
    of its result. Sums are taken in a fixed order: the same bits for any number of threads."""
    refuse_tangents("conv3x3_weight_gradient", x, g)
    return torch.ops.selmatch_ext.conv3x3_weight_gradient(x, g)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    gx = torch.ops.selmatch_ext.conv3x3(g, weight, None, not ctx.transposed) if need_x else None
    gw = conv3x3_weight_gradient(*((g, x) if ctx.transposed else (x, g))) if need_weight else None
    return gx, gw, g.sum((0, 2, 3)) if need_bias else None, None


torch.library.register_autograd("selmatch_ext::conv3x3", _backward, setup_context=_save)


def _save_weight_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _weight_gradient_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    x, g = ctx.saved_tensors
    need_x, need_g = ctx.needs_input_grad
    return conv3x3_input_gradient(g, v) if need_x else None, conv3x3(x, v) if need_g else None


torch.library.register_autograd(
    "selmatch_ext::conv3x3_weight_gradient", _weight_gradient_backward, setup_context=_save_weight_gradient
)
