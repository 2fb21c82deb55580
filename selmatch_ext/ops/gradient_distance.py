"""The distance between two networks' gradients that gradient matching minimizes (DC, arXiv 2006.05929), fused."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from selmatch_ext.ops.functorch import plain_gradient_distance, transformed
from selmatch_ext.ops.lists import as_lists

Gradients = Iterable[Tensor | None] | Mapping[str, Tensor | None]

# As in csrc/gradient_distance/gradient_distance.h.
METRICS = ("layerwise", "mse", "cos")
GRADIENT_CHUNK = 8192  # elements in a row of mse and cos


ALLOWED = "a list or another iterable of tensors and Nones, or a dict of them"


def gradient_distance(
    syn: Gradients, real: Gradients, metric: Literal["layerwise", "mse", "cos"] = "layerwise"
) -> Tensor:
    """How far two lists of gradients, a tensor for each parameter, point apart, as a 0-d tensor.

    layerwise: every tensor of 2 or more dimensions as rows (shape[0], rest), sum over all rows of
        1 - <a, b> / (|a| |b| + 1e-6); tensors of one dimension count nothing (arXiv 2006.05929, equation 10 and its
        code).
    mse: sum (a - b)^2 over everything. cos: 1 - <a, b> / (|a| |b| + 1e-6) of everything as one vector.

    syn, real: lists, tuples, generators or ParameterLists of tensors, or dicts of them (compared name by name); of any
    shapes and strides, alike in both; float32 or float64. None in the place of a tensor, as autograd gives it for an
    unused parameter, counts as zeros of the other list's shape; where both lists have None nothing is counted.

    Sums are taken in double and in a fixed order: the same input gives the same bits, whatever the number of threads.
    Differentiable once, in both; the gradient with respect to a row of zeros takes that of its norm as zero. Under
    `torch.func` and in forward mode the same is computed in plain operations, to rounding, and differentiable any
    number of times.

    Raises ValueError (metric; numbers, names, shapes or devices differ, or nothing given) or TypeError (dtype, or no
    list of tensors), and RuntimeError where its gradient is differentiated again.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be layerwise, mse or cos, got {metric!r}")
    syn, real = as_lists({"syn": syn, "real": real}, ALLOWED, missing=True)
    if type(None) in {*map(type, syn), *map(type, real)}:
        syn, real = _filled(syn, real)
    if not syn:
        raise ValueError("syn has no tensors")
    if transformed():
        return plain_gradient_distance(syn, real, metric)
    return torch.ops.selmatch_ext.gradient_distance(syn, real, METRICS.index(metric))[0]


def _filled(syn: list[Tensor | None], real: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Both lists without the places where both have None, with zeros where one has."""
    if len(syn) != len(real):
        raise ValueError(f"gradient_distance: syn has {len(syn)} tensors, real {len(real)}")
    pairs = [(a, b) for a, b in zip(syn, real, strict=True) if a is not None or b is not None]
    if not pairs:
        raise ValueError("syn and real have no tensors, only None")
    return [_or_zeros(a, b) for a, b in pairs], [_or_zeros(b, a) for a, b in pairs]


def _or_zeros(tensor: Tensor | None, like: Tensor | None) -> Tensor:
    found = torch.zeros_like(like) if tensor is None and like is not None else tensor
    assert found is not None
    return found


def _save_forward(ctx: Any, inputs: Any, output: Any) -> None:
    syn, real, ctx.metric = inputs
    ctx.count = len(syn)
    ctx.save_for_backward(output[1], *syn, *real)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    sums, *tensors = ctx.saved_tensors
    syn, real = tensors[: ctx.count], tensors[ctx.count :]
    wanted = [any(needs) for needs in ctx.needs_input_grad[:2]]
    grads = torch.ops.selmatch_ext.gradient_distance_backward(grad, sums, syn, real, ctx.metric, *wanted)
    return *([grads.pop(0) for _ in range(ctx.count)] if w else [None] * ctx.count for w in wanted), None


torch.library.register_autograd("selmatch_ext::gradient_distance", _backward, setup_context=_save_forward)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError("the gradient of gradient_distance cannot be differentiated again: it is differentiable once")


torch.library.register_autograd("selmatch_ext::gradient_distance_backward", _no_double_backward)
