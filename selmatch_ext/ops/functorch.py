"""The operations under `torch.func` and forward-mode differentiation.

The derivatives in csrc/ are C++ autograd functions, made for speed; PyTorch lets neither `torch.func` nor forward mode
through those. Where one of the two is at work the operations come here: `augment` as a Python autograd function around
the same operator, the distances in plain operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FORWARD, LINEAR, TRANSPOSE = range(3)  # modes of selmatch_ext::dsa


def transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_tangents(operation: str, *tensors: Tensor | None) -> None:
    """NotImplementedError where one of the tensors has a tangent of forward mode: the operators behind the operation
    would lose it in silence under `torch.func.jvp`."""
    if transformed() and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{operation} has no forward-mode derivative; use reverse mode")


# --- augmentation -----------------------------------------------------------------------------------------------------


class Dsa(torch.autograd.Function):
    """selmatch_ext::dsa with derivatives of every kind and order in x: the operator itself in another mode."""

    @staticmethod
    def forward(x: Tensor, ops: Tensor, params: Tensor, mode: int) -> Tensor:
        return torch.ops.selmatch_ext.dsa(x, ops, params, mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ops, params, ctx.mode = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ops, params)
        ctx.save_for_forward(ops, params)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple:
        if gradient is None:
            return None, None, None, None
        mode = LINEAR if ctx.mode == TRANSPOSE else TRANSPOSE
        return Dsa.apply(gradient, *ctx.saved_tensors, mode), None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, ops: None, params: Tensor | None, mode: None) -> Tensor | None:
        if params is not None:
            raise RuntimeError(CONSTANT_TABLE)
        return Dsa.apply(x, *ctx.saved_tensors, TRANSPOSE if ctx.mode == TRANSPOSE else LINEAR)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, ops: Tensor, params: Tensor, mode: int) -> tuple[Tensor, int]:
        """The examples become more images of one batch, each with its row of the table."""
        size = info.batch_size
        x, ops, params = (
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((x, ops, params), in_dims[:3], strict=True)
        )
        batch = x.shape[1]
        rows = [table.expand(size, batch, *table.shape[2:]).flatten(0, 1) for table in (ops, params)]
        y = Dsa.apply(x.reshape(size * batch, *x.shape[2:]), *rows, mode)
        return y.reshape(size, batch, *y.shape[1:]), 0


CONSTANT_TABLE = (
    "augment is differentiated with respect to the images only, and the table's params require a gradient: "
    "pass Augmentation(p.ops, p.params.detach())"
)


# --- distances --------------------------------------------------------------------------------------------------------


def check_alike(operation: str, lists: dict[str, list[Tensor]]) -> None:
    """What the distances' operators check of their lists, with their messages."""
    (first_name, first), *others = lists.items()
    if first[0].dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operation}: {first_name} must be float32 or float64, got {first[0].dtype}")
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            raise ValueError(f"{operation}: {first_name} has {len(first)} tensors, {name} {len(tensors)}")
        for i, (tensor, like) in enumerate(zip(tensors, first, strict=True)):
            if tensor.shape != like.shape:
                raise ValueError(
                    f"{operation}: {name}[{i}] has shape {list(tensor.shape)}, {first_name}[{i}] {list(like.shape)}"
                )
            if tensor.dtype != first[0].dtype:
                raise TypeError(f"{operation}: {name}[{i}] is {tensor.dtype}, {first_name}[0] {first[0].dtype}")
            if tensor.device != first[0].device:
                raise ValueError(f"{operation}: {name} has a tensor on {tensor.device}, not on {first[0].device}")


def differences(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    return [x - y for x, y in zip(xs, ys, strict=True)]


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The sum of x * y over all elements of both lists' tensors, 0-d float64; xs and ys have the same shapes."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(xs, ys, strict=True)]).sum()


def plain_trajectory_distance(student: list[Tensor], start: list[Tensor], target: list[Tensor]) -> Tensor:
    check_alike("trajectory_distance", {"student": student, "start": start, "target": target})
    d, e = differences(student, target), differences(start, target)
    return (dot(d, d) / dot(e, e)).to(student[0].dtype)


def plain_gradient_distance(syn: list[Tensor], real: list[Tensor], metric: str) -> Tensor:
    check_alike("gradient_distance", {"syn": syn, "real": real})
    if metric == "mse":
        d = differences(syn, real)
        return dot(d, d).to(syn[0].dtype)
    if metric == "cos":
        return _apart(dot(syn, real), dot(syn, syn), dot(real, real)).to(syn[0].dtype)
    total = torch.zeros((), dtype=torch.float64, device=syn[0].device)
    for a, b in zip(syn, real, strict=True):
        if a.dim() > 1:
            a, b = a.double().flatten(1), b.double().flatten(1)
            total = total + _apart((a * b).sum(1), (a * a).sum(1), (b * b).sum(1)).sum()
    return total.to(syn[0].dtype)


def _apart(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    return 1 - ab / (_root(aa) * _root(bb) + 1e-6)


def _root(square: Tensor) -> Tensor:
    """The square root, whose derivatives at 0 are 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
