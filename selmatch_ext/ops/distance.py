"""The normalized distance of matching training trajectories (MTT, arXiv 2203.11932), and its gradient in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selmatch_ext.ops.functorch import differences, dot, plain_trajectory_distance, transformed
from selmatch_ext.ops.lists import Tensors, as_lists

ALLOWED = "a tensor, a list or another iterable of tensors, or a dict of them"


def trajectory_distance(student: Tensors, start: Tensors, target: Tensors) -> Tensor:
    """sum (student - target)^2 / sum (start - target)^2, as a 0-d tensor (arXiv 2203.11932, equation 3).

    student, start, target: a tensor each, or a list, tuple, generator or ParameterList of tensors each, or a dict of
    parameters each (dicts are compared name by name); of any shapes and strides, alike in all three; float32 or
    float64. Sums are taken in double and in a fixed order: the same input gives the same bits, whatever the number of
    threads. Differentiable in all three, any number of times; the gradients of those that require one are written in
    one pass over memory. Under `torch.func` and in forward mode the same is computed in plain operations, to rounding.

    Nothing waits for the GPU to look at the denominator: where start equals target the result is inf, or nan if student
    equals them too, as the formula says.

    Raises ValueError (numbers, names, shapes or devices differ, or nothing given) or TypeError (dtype, or no tensor).
    """
    lists = as_lists({"student": student, "start": start, "target": target}, ALLOWED, single=True)
    if not lists[0]:
        raise ValueError("student has no tensors")
    if transformed():
        return plain_trajectory_distance(*lists)
    return torch.ops.selmatch_ext.trajectory_distance(*lists)[0]


def _thirds(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    count = len(tensors) // 3
    return list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count :])


def _save_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, sums, student, start, target, *ctx.wanted = inputs
    ctx.count = len(student)
    ctx.save_for_backward(grad, *student, *start, *target)


def _double_backward(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    """The vector-Jacobian product of the backward pass, in plain operations, which autograd takes to any order.

    With d = student - target, e = start - target, N = |d|^2, D = |e|^2 the backward pass is g_student = 2 grad d / D,
    g_start = -2 grad N e / D^2, g_target = -g_student - g_start. With a = v_student - v_target, b = v_start - v_target
    its product with the cotangents v is 2 grad (<a, d> / D - N <b, e> / D^2), which is differentiated here.
    """
    grad, *tensors = ctx.saved_tensors
    student, start, target = _thirds(tensors)
    v_student, v_start, v_target = _filled(cotangents, ctx.wanted, student)
    d, e = differences(student, target), differences(start, target)
    a, b = differences(v_student, v_target), differences(v_start, v_target)
    numerator, denominator, ad, be = dot(d, d), dot(e, e), dot(a, d), dot(b, e)
    grad_of_grad = 2 * (ad - numerator * be / denominator) / denominator
    scale = 2 * grad.double() / denominator
    ds = [_combine(scale, x, -2 * scale * be / denominator, y) for x, y in zip(a, d, strict=True)]
    of_b = -scale * numerator / denominator
    of_e = 2 * scale * (2 * numerator * be / denominator - ad) / denominator
    de = [_combine(of_b, x, of_e, y) for x, y in zip(b, e, strict=True)]
    dt = [-x - y for x, y in zip(ds, de, strict=True)]
    return grad_of_grad.to(grad.dtype), None, ds, de, dt, None, None, None


def _filled(cotangents: Sequence[Tensor | None], wanted: Sequence[bool], like: list[Tensor]) -> list[list[Tensor]]:
    """The cotangents of all three gradients, zeros for those that were not wanted."""
    given = list(cotangents)
    lists = [[given.pop(0) for _ in like] if w else [None] * len(like) for w in wanted]
    return [[torch.zeros_like(x) if v is None else v for v, x in zip(vs, like, strict=True)] for vs in lists]


def _combine(p: Tensor, x: Tensor, q: Tensor, y: Tensor) -> Tensor:
    return p.to(x.dtype) * x + q.to(y.dtype) * y


torch.library.register_autograd(
    "selmatch_ext::trajectory_distance_backward", _double_backward, setup_context=_save_backward
)
