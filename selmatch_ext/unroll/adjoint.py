"""The adjoint recursion that both engines run: the exact gradient of unrolled SGD, one step at a time.

With lambda_N = dL/dtheta_N, and for i = N-1 ... 0 with g_i = grad_theta CE(theta_i, A_i x_i):
    dL/dlr_i = -<g_i, lambda_{i+1}>
    (h, u)   = gradient of <g_i, lambda_{i+1}> with respect to (theta_i, A_i x_i)
    dL/dx_i  = -lr_i A_i^T u,   lambda_i = lambda_{i+1} - lr_i h
update.py has the recursion with momentum and weight decay, whose v_i are kept beside theta_i; tesla.py has the estimate
that leaves h out. An engine is a `Stepper`: it knows g_i, h and u.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from selmatch_ext.allocator import reused_memory
from selmatch_ext.ops.dsa import augment, augment_transposed
from selmatch_ext.precision import precision_scope
from selmatch_ext.unroll.tesla import Wanted, wanted_of_step
from selmatch_ext.unroll.update import Inputs, MomentumUpdate, PlainUpdate, Update


@dataclass(frozen=True)
class UnrollPlan:
    """What an engine is told beside its tensors."""

    batches: list  # N int64 tensors on the images' device
    augmentations: list | None  # N augmentations, or None
    label_range: tuple | None  # (smallest, largest) integer label; None for float labels
    keep: str
    gradient: str
    precision: str
    nesterov: bool = False


@dataclass
class Derivative:
    """The inner product <gradient of a step, direction>, and its gradients with respect to parameters (P,), images and
    labels; None for those that were not wanted."""

    product: Tensor
    parameters: Tensor | None
    images: Tensor | None
    labels: Tensor | None


class Stepper(Protocol):
    """An engine: one step's gradient, and the derivative of that gradient along a direction.

    keeps_last: whether it is given keep="activations" for the last step at least, with which the backward pass begins.
    That adds nothing to the most memory of the pass, which needs these activations of the step that it is at."""

    keeps_last: bool

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, wanted: Wanted | None, keep: str) -> tuple[Tensor, Any]:
        """((P,) gradient of the mean cross-entropy at theta, what `derivative` needs of this step beside its inputs).
        wanted: what `derivative` will be asked for, None if it will not be called; keep: as `unrolled_sgd` has it."""

    def derivative(
        self, theta: Tensor, x: Tensor, y: Tensor, kept: Any, direction: Tensor, wanted: Wanted
    ) -> Derivative:
        """The derivative of the step's gradient along `direction` (P,)."""

    def freed(self, kept: Any) -> Any:
        """What stays of `kept` after `derivative`, for a second backward pass: little memory, enough to recompute."""


class _Tape:
    """What the forward pass saves for the backward pass, beside the tensors of `Inputs`."""

    def __init__(self, needs: tuple[bool, ...]):
        self.needs = needs  # whether each of `Inputs` needs a gradient
        self.in_torch_func = torch._C._are_functorch_transforms_active()
        self.thetas: list[Tensor] = []
        self.velocities: list[Tensor] = []  # with momentum or weight decay; see `MomentumUpdate`
        self.kept: list[Any] = []
        self.samples: list[_Tape] = []  # under vmap: one for each sample


@dataclass(frozen=True)
class _Job:
    """One call of `unrolled_sgd`, or one sample of it under vmap. (No tuple: torch.func would take that apart.)"""

    stepper: Stepper
    plan: UnrollPlan
    tape: _Tape


def unroll(stepper: Stepper, inputs: Inputs, plan: UnrollPlan) -> Tensor:
    """(P,) parameters after the steps of `plan`; see `unrolled_sgd`."""
    if not torch.is_grad_enabled():  # a Function cannot tell, and would keep what nothing will use
        inputs = Inputs._make(None if t is None else t.detach() for t in inputs)
    needs = tuple(t is not None and t.requires_grad for t in inputs)
    return _Unroll.apply(*inputs, _Job(stepper, plan, _Tape(needs)))


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        *tensors, job = inputs
        with _arithmetic(job.plan.precision, tensors[0].device), reused_memory():
            return _forward(job, Inputs(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *tensors, ctx.job = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        # torch.func builds the graph of a gradient always, and says so only when that is differentiated.
        if torch.is_grad_enabled() and not ctx.job.tape.in_torch_func:
            raise RuntimeError(_ONCE + "; call it without create_graph=True")
        found = iter(_Gradient.apply(*cotangents, *ctx.saved_tensors, ctx.job))
        return *(next(found) if needed else None for needed in ctx.job.tape.needs), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        *tensors, job = inputs
        job.tape.samples = [_Tape(job.tape.needs) for _ in range(info.batch_size)]
        rows = zip(_samples(info, in_dims, tensors), job.tape.samples, strict=True)
        results = [_Unroll.apply(*row, replace(job, tape=tape)) for row, tape in rows]
        return torch.stack(results), 0

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError("unrolled_sgd has no forward-mode derivative; use reverse mode (grad, vjp, jacrev)")


_ONCE = "unrolled_sgd is differentiable once: its gradient cannot be differentiated again"


class _Gradient(torch.autograd.Function):
    """The backward pass: the gradients that are needed, as a tuple."""

    @staticmethod
    def forward(adjoint: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, job = inputs
        with _arithmetic(job.plan.precision, adjoint.device), reused_memory():
            found = _backward(job, Inputs(*tensors), adjoint.contiguous())
        return tuple(t for t in found if t is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(_ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        *tensors, job = inputs
        same_forward = all(d is None for d in in_dims[1:])  # as in jacrev, which takes many adjoints of one result
        tapes = [job.tape] * info.batch_size if same_forward else job.tape.samples
        rows = zip(_samples(info, in_dims, tensors), tapes, strict=True)
        found = [_Gradient.apply(*row, replace(job, tape=tape)) for row, tape in rows]
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * sum(job.tape.needs)


def _samples(info: Any, in_dims: tuple, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors of each sample of a vmap."""
    for i in range(info.batch_size):
        yield [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=False)]


@contextlib.contextmanager
def _arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Within, TF32 is on only where `precision` asks for it, and the caller's autocast is off: it would also round the
    products of the backward pass. (bfloat16 concerns the model alone; the engines apply it.)"""
    with (
        torch.autocast(device.type, enabled=False),
        precision_scope("tf32" if precision == "tf32" else "float32", device),
    ):
        yield


def _batch(plan: UnrollPlan, i: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Step i's augmented images and its labels."""
    batch = plan.batches[i]
    x, y = images.index_select(0, batch), labels.index_select(0, batch)
    if plan.augmentations is not None:
        x = augment(x, plan.augmentations[i])
    return x, y if y.is_floating_point() else y.long()


def _update(job: _Job, inputs: Inputs, totals: Sequence[Tensor | None]) -> Update:
    """That of the inputs. totals: where the gradients with respect to lr, momentum and weight decay are written."""
    _, _, _, lr, momentum, weight_decay = inputs
    if momentum is None or weight_decay is None:
        return PlainUpdate(lr, totals[0])
    velocities = job.tape.velocities if any(job.tape.needs[3:5]) else None
    return MomentumUpdate((lr, momentum, weight_decay), totals, velocities, job.plan.nesterov)


def _forward(job: _Job, inputs: Inputs) -> Tensor:
    """Runs the N steps and returns the parameters after them, theta_N. It puts on the tape what the backward pass
    needs: the parameters theta_i before each step, and what the engine keeps of the step."""
    stepper, plan, tape = job.stepper, job.plan, job.tape
    update, needed = _update(job, inputs, [None] * 3), any(tape.needs)
    theta, last = inputs.start.detach(), len(plan.batches) - 1
    for i in range(len(plan.batches)):
        x, y = _batch(plan, i, inputs.images.detach(), inputs.labels.detach())
        wanted = wanted_of_step(plan.gradient, i, tape.needs) if needed else None
        keep = "activations" if plan.keep == "nothing" and i == last and stepper.keeps_last else plan.keep
        gradient, kept = stepper.gradient(theta, x, y, wanted, keep if needed else "nothing")
        if needed:
            tape.thetas.append(theta)
            tape.kept.append(kept)
        theta = update.forward(i, theta, gradient)
    return theta


def _backward(job: _Job, inputs: Inputs, adjoint: Tensor) -> tuple[Tensor | None, ...]:
    """dL/d(each of `Inputs`) from the adjoint dL/dtheta_N; None for what is not needed."""
    stepper, plan, tape = job.stepper, job.plan, job.tape
    needs_start, *needs = tape.needs
    images_gradient, labels_gradient, *rates_gradients = (
        torch.zeros_like(t) if needed and t is not None else None for t, needed in zip(inputs[1:], needs, strict=True)
    )
    update = _update(job, inputs, rates_gradients)
    for i in reversed(range(len(tape.thetas))):
        x, y = _batch(plan, i, inputs.images, inputs.labels)
        direction = update.direction(i, tape.thetas[i], adjoint)
        step = stepper.derivative(
            tape.thetas[i], x, y, tape.kept[i], direction, wanted_of_step(plan.gradient, i, tape.needs)
        )
        tape.kept[i] = stepper.freed(tape.kept[i])
        if images_gradient is not None and step.images is not None:
            u = step.images
            if plan.augmentations is not None:
                u = augment_transposed(u, plan.augmentations[i])
            _add_rows(images_gradient, plan.batches[i], update.scaled(i, u))
        if labels_gradient is not None and step.labels is not None:
            _add_rows(labels_gradient, plan.batches[i], update.scaled(i, step.labels))
        adjoint = update.backward(i, adjoint, direction, step.product, step.parameters)
    return adjoint if needs_start else None, images_gradient, labels_gradient, *rates_gradients


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """total[rows] += values, rows may repeat; the same bits at each run."""
    if total.device.type == "cpu":
        total.index_add_(0, rows, values)
    else:  # on a GPU index_add_ adds in any order, index_put_ sorts first
        total.index_put_((rows,), values, accumulate=True)


def _described(output: Any) -> str:
    """Text for an error: the type and the parts of a result that is not logits, and what to return instead."""
    parts = getattr(output, "_fields", None) or (list(output) if isinstance(output, dict) else None)
    inside = f" of {', '.join(map(str, parts))}" if parts else ""
    return f"{type(output).__name__}{inside}; let it return the logits alone, without auxiliary heads"


def check_logits(logits: Any, x: Tensor) -> int:
    """The number of classes. ValueError where the model's result is not (B, K) logits of the images x (B, C, H, W)."""
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else _described(logits)
        raise ValueError(
            f"model must turn ({x.shape[0]}, C, H, W) images into ({x.shape[0]}, K) logits, it gave {what}"
        )
    return logits.shape[1]


def check_targets(labels: Tensor, label_range: tuple | None, classes: int) -> None:
    """ValueError where the labels do not fit a model with so many outputs."""
    if labels.is_floating_point() and labels.shape[1] != classes:
        raise ValueError(f"labels have {labels.shape[1]} columns, the model has {classes} outputs")
    if label_range is not None and label_range[1] >= classes:
        raise ValueError(
            f"labels must be below {classes}, the model's number of outputs; the largest is {label_range[1]}"
        )
