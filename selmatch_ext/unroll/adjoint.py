"""The adjoint recursion that both engines run: the exact gradient of unrolled SGD, one step at a time.

With lambda_N = dL/dtheta_N, and for i = N-1 ... 0 with g_i = grad_theta CE(theta_i, A_i x_i):
    dL/dlr_i = -<g_i, lambda_{i+1}>
    (h, u)   = gradient of <g_i, lambda_{i+1}> with respect to (theta_i, A_i x_i)
    dL/dx_i  = -lr_i A_i^T u,   lambda_i = lambda_{i+1} - lr_i h
TESLA's estimate leaves h out, so that lambda stays what it was. An engine is a `Stepper`: it knows g_i, h and u.
"""

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selmatch_ext.ops.dsa import augment, augment_transposed
from selmatch_ext.precision import precision_scope


@dataclass(frozen=True)
class Plan:
    """What an engine is told beside its tensors."""

    batches: list  # N int64 tensors on the images' device
    augmentations: list | None  # N augmentations, or None
    label_range: tuple | None  # (smallest, largest) integer label; None for float labels
    keep: str
    gradient: str
    precision: str


@dataclass(frozen=True)
class Wanted:
    """Of which inputs of a step a derivative is wanted."""

    parameters: bool
    images: bool
    labels: bool


@dataclass
class Derivative:
    """Of <gradient of a step, direction>: its value, and its gradient with respect to parameters (P,), images and
    labels; None for what was not wanted."""

    product: Tensor
    parameters: Tensor | None
    images: Tensor | None
    labels: Tensor | None


class Stepper(Protocol):
    """An engine: one step's gradient, and the derivative of that gradient along a direction."""

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, wanted: Wanted | None, keep: bool) -> tuple[Tensor, Any]:
        """((P,) gradient of the mean cross-entropy at theta, what `derivative` needs of this step beside its inputs).
        wanted: what `derivative` will be asked for, None if it will not be called; keep: keep activations for it."""

    def derivative(
        self, theta: Tensor, x: Tensor, y: Tensor, kept: Any, direction: Tensor, wanted: Wanted
    ) -> Derivative:
        """The derivative of the step's gradient along `direction` (P,)."""

    def freed(self, kept: Any) -> Any:
        """What stays of `kept` after `derivative`, for a second backward pass: little memory, enough to recompute."""


def unroll(stepper: Stepper, start: Tensor, images: Tensor, labels: Tensor, lr: Tensor, plan: Plan) -> Tensor:
    """(P,) parameters after the steps of `plan`; see `unrolled_sgd`. lr: (N,)."""
    tensors = (start, images, labels, lr)
    if not torch.is_grad_enabled():  # a Function cannot tell, and would keep what nothing will use
        tensors = [t.detach() for t in tensors]
    return _Unroll.apply(*tensors, stepper, plan)


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, start, images, labels, lr, stepper, plan):
        ctx.stepper, ctx.plan = stepper, plan
        ctx.save_for_backward(start, images, labels, lr)
        with _arithmetic(plan.precision, start.device):
            return _forward(ctx, start, images, labels, lr)

    @staticmethod
    @once_differentiable
    def backward(ctx, adjoint):
        with _arithmetic(ctx.plan.precision, adjoint.device):
            return *_backward(ctx, adjoint.contiguous(), *ctx.saved_tensors), None, None


@contextlib.contextmanager
def _arithmetic(precision, device):
    """Of a whole pass: what `precision` says about TF32, and nothing of the caller's autocast, which would also round
    the products of the backward pass. (bfloat16 is for the model alone: the engines' matter.)"""
    with (
        torch.autocast(device.type, enabled=False),
        precision_scope("tf32" if precision == "tf32" else "float32", device),
    ):
        yield


def _batch(ctx, i, images, labels):
    """Step i's augmented images and its labels."""
    batch = ctx.plan.batches[i]
    x, y = images.index_select(0, batch), labels.index_select(0, batch)
    if ctx.plan.augmentations is not None:
        x = augment(x, ctx.plan.augmentations[i])
    return x, y if y.is_floating_point() else y.long()


def _wanted(ctx, i):
    start, images, labels, _ = ctx.needs_input_grad[:4]
    return Wanted(ctx.plan.gradient == "exact" and (i > 0 or start), images, labels)


def _forward(ctx, start, images, labels, lr):
    """theta_N; keeps in ctx what the backward pass needs: theta_i, and what the engine wants kept."""
    needed = any(ctx.needs_input_grad)
    ctx.thetas, ctx.kept = [], []
    theta = start.detach()
    for i in range(len(ctx.plan.batches)):
        x, y = _batch(ctx, i, images.detach(), labels.detach())
        keep = needed and ctx.plan.keep == "activations"
        gradient, kept = ctx.stepper.gradient(theta, x, y, _wanted(ctx, i) if needed else None, keep)
        if needed:
            ctx.thetas.append(theta)
            ctx.kept.append(kept)
        theta = theta - lr[i] * gradient
    return theta


def _backward(ctx, adjoint, start, images, labels, lr):
    """dL/d(start, images, labels, lr) from the adjoint dL/dtheta_N; None for what is not needed."""
    needs_start, needs_images, needs_labels, needs_lr = ctx.needs_input_grad[:4]
    images_gradient = torch.zeros_like(images) if needs_images else None
    labels_gradient = torch.zeros_like(labels) if needs_labels else None
    lr_gradient = torch.zeros_like(lr) if needs_lr else None
    for i in reversed(range(len(ctx.thetas))):
        x, y = _batch(ctx, i, images, labels)
        wanted = _wanted(ctx, i)
        step = ctx.stepper.derivative(ctx.thetas[i], x, y, ctx.kept[i], adjoint, wanted)
        ctx.kept[i] = ctx.stepper.freed(ctx.kept[i])
        if needs_lr:
            lr_gradient[i] = -step.product
        if needs_images:
            u = step.images
            if ctx.plan.augmentations is not None:
                u = augment_transposed(u, ctx.plan.augmentations[i])
            _add_rows(images_gradient, ctx.plan.batches[i], -lr[i], u)
        if needs_labels:
            _add_rows(labels_gradient, ctx.plan.batches[i], -lr[i], step.labels)
        if wanted.parameters:
            adjoint = adjoint - lr[i] * step.parameters
    return adjoint if needs_start else None, images_gradient, labels_gradient, lr_gradient


def _add_rows(total, rows, factor, values):
    """total[rows] += factor * values, rows may repeat; the same bits at each run."""
    if total.device.type == "cpu":
        total.index_add_(0, rows, factor * values)
    else:  # on a GPU index_add_ adds in any order, index_put_ sorts first
        total.index_put_((rows,), factor * values, accumulate=True)


def check_logits(logits: Any, x: Tensor, y: Tensor, label_range: tuple | None) -> None:
    """ValueError where the model's result does not fit the images and labels."""
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"model must turn ({x.shape[0]}, C, H, W) images into ({x.shape[0]}, K) logits, it gave {what}"
        )
    classes = logits.shape[1]
    if y.is_floating_point() and y.shape[1] != classes:
        raise ValueError(f"labels have {y.shape[1]} columns, the model has {classes} outputs")
    if label_range is not None and label_range[1] >= classes:
        raise ValueError(
            f"labels must be below {classes}, the model's number of outputs; the largest is {label_range[1]}"
        )
