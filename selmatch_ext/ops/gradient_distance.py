"""The distance between two networks' gradients that gradient matching minimises (DC, arXiv 2006.05929), fused."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from selmatch_ext import _C  # noqa: F401  (loads the operators)

# As in csrc/gradient_distance/gradient_distance.h.
METRICS = ("layerwise", "mse", "cos")
GRADIENT_CHUNK = 8192  # elements in a row of mse and cos


def gradient_distance(
    syn: Sequence[Tensor], real: Sequence[Tensor], metric: Literal["layerwise", "mse", "cos"] = "layerwise"
) -> Tensor:
    """How far two lists of gradients, a tensor for each parameter, point apart, as a 0-d tensor.

    layerwise: every tensor of 2 or more dimensions as rows (shape[0], rest), sum over all rows of
        1 - <a, b> / (|a| |b| + 1e-6); tensors of one dimension count nothing (arXiv 2006.05929, equation 10 and its
        code).
    mse: sum (a - b)^2 over everything. cos: 1 - <a, b> / (|a| |b| + 1e-6) of everything as one vector.

    syn, real: lists or tuples of tensors of any shapes and strides, alike in both; float32 or float64. Sums are taken
    in double and in a fixed order: the same input gives the same bits, whatever the number of threads. Differentiable
    once, in both; the gradient with respect to a row of zeros takes that of its norm as zero.

    Raises ValueError (metric; numbers, shapes or devices differ, or nothing given) or TypeError (dtype, or no list of
    tensors), and RuntimeError where its gradient is differentiated again.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be layerwise, mse or cos, got {metric!r}")
    for name, tensors in (("syn", syn), ("real", real)):
        if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {type(tensors).__name__}")
    if not syn:
        raise ValueError("syn has no tensors")
    return torch.ops.selmatch_ext.gradient_distance(list(syn), list(real), METRICS.index(metric))[0]


def _save_forward(ctx, inputs, output):
    syn, real, ctx.metric = inputs
    ctx.count = len(syn)
    ctx.save_for_backward(output[1], *syn, *real)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    sums, *tensors = ctx.saved_tensors
    syn, real = tensors[: ctx.count], tensors[ctx.count :]
    wanted = [any(needs) for needs in ctx.needs_input_grad[:2]]
    grads = torch.ops.selmatch_ext.gradient_distance_backward(grad, sums, syn, real, ctx.metric, *wanted)
    return *([grads.pop(0) for _ in range(ctx.count)] if w else [None] * ctx.count for w in wanted), None


torch.library.register_autograd("selmatch_ext::gradient_distance", _backward, setup_context=_save_forward)


def _no_double_backward(ctx, *_):
    raise RuntimeError("the gradient of gradient_distance cannot be differentiated again: it is differentiable once")


torch.library.register_autograd("selmatch_ext::gradient_distance_backward", _no_double_backward)
