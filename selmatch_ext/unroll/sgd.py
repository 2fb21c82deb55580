"""`unrolled_sgd`: checks what it is given, chooses an engine, and runs the recursion with it."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from selmatch_ext._C import build_info
from selmatch_ext.allocator import HeldMemory
from selmatch_ext.compiling import never_compiled
from selmatch_ext.fused.comparing import operations_of
from selmatch_ext.fused.operations import Operation, Unsupported
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.modules.private import PrivateModel
from selmatch_ext.modules.unwrap import unwrapped
from selmatch_ext.ops.dsa import Augmentation
from selmatch_ext.precision import warn_if_slow
from selmatch_ext.unroll.adjoint import Stepper, UnrollPlan, check_targets, unroll
from selmatch_ext.unroll.arguments import (
    check_augmentations,
    check_batches,
    check_label_tensor,
    check_options,
    check_tensors,
    check_types,
    check_values,
    momentum_and_decay,
    one_a_step,
)
from selmatch_ext.unroll.autograd import AutogradStepper
from selmatch_ext.unroll.fused_stepper import FusedStepper
from selmatch_ext.unroll.graphs import CudaRecorder, GraphedStepper
from selmatch_ext.unroll.update import Inputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

Rates = Tensor | np.ndarray | float


@never_compiled("unrolled_sgd reads the network in Python; it runs as it is in compiled code")
def unrolled_sgd(
    model: nn.Module,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    batches: Iterable[Tensor],
    lr: Rates,
    *,
    momentum: Rates = 0.0,
    nesterov: bool = False,
    weight_decay: Rates = 0.0,
    augmentations: Iterable[Augmentation] | None = None,
    engine: str = "auto",
    keep: str = "nothing",
    gradient: str = "exact",
    precision: str = "float32",
    cuda_graphs: bool = False,
) -> Tensor:
    """Parameters after N steps of SGD from `start` on batches of `images`: a differentiable function.

    Step i: theta_{i+1} = theta_i - lr_i * g_i, g_i = grad_theta CE(model(theta_i; A_i(images[batches[i]])),
    labels[batches[i]]), CE the mean cross-entropy. With momentum mu and weight decay w, as torch.optim.SGD does it with
    dampening 0: v_0 = 0, v_{i+1} = mu_i * v_i + g_i + w_i * theta_i, theta_{i+1} = theta_i - lr_i * v_{i+1}, or with
    nesterov theta_{i+1} = theta_i - lr_i * (g_i + w_i * theta_i + mu_i * v_{i+1}). Differentiable (once) in images,
    float labels, lr, momentum, weight_decay and start. This is the inner loop of dataset distillation by matching
    training trajectories (MTT, arXiv 2203.11932, section 3.2).

    The gradient is that of autograd through all N steps, but only the N vectors theta_i are kept, and the N vectors v_i
    where there is momentum or weight decay: the backward pass is the adjoint recursion, which needs the graph of one
    step at a time, or none where the fused engine runs.

    `model` is never changed: a private copy of it runs, in train mode, so that BatchNorm uses batch statistics. The
    copy's buffers and Python attributes change from step to step as in ordinary training, beginning with those that the
    model has now. All its parameters are trained, whatever their `requires_grad`; those that the loss does not reach
    stay as they are; shared ones count once. Dropout, and whatever else draws from the global generators of torch,
    Python or numpy, draws as in ordinary training; the backward pass repeats each step with the draws, buffers and
    attributes that it had, without advancing a generator. What steps change in the module's classes and functions is
    put back afterwards. Hooks run on the copy. An autocast around the call has no effect: `precision` alone decides.

    The first call with a network must not run while other threads use PyTorch: torch.fx reads the network by patching
    torch, and the comparison with what was read seeds the global generators and puts them back.

    Args:
        model: nn.Module, images (B, C, H, W) -> logits (B, K). Of DataParallel, DistributedDataParallel, AveragedModel
            and torch.compile the module inside counts.
        start: (P,) float32 or float64, P = number of parameters, in `model.parameters()` order.
        images: (n, C, H, W), dtype and device of start.
        labels: (n,) integers in [0, K), or (n, K) probabilities of the dtype of start.
        batches: N index tensors, each (B_i,) int64 or int32 in [0, n), not empty; an image may occur any number of
            times.
        lr: learning rate, 0-d or (N,) floating tensor, or a finite number or numpy array (64 bits count where start is
            float64).
        momentum: 0 or above, as lr; with nesterov above 0.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: 0 or above, as lr.
        augmentations: None, or N results of `sample_augmentation`, one a step.
        engine: "fused" (networks of known operations, on the CPU and CUDA; float32, float64 and bfloat16), "autograd"
            (any module), or "auto": fused where it can run the model, else autograd. `explain_engine` says which.
        keep: "nothing" recomputes each step in the backward pass (the fused engine without CUDA graphs keeps the
            activations of the last one); "activations" caches what is expensive to recompute: faster, same gradient,
            memory grows with N; "all" is a little faster still on the fused engine, and caches about twice as much.
            Autograd keeps every step's graph, the fused engine the results of convolutions and, with "all", the
            gradients of their inputs, except where a convolution has 4 input channels or fewer, such as the images'.
        gradient: "exact", or "tesla": the estimate of TESLA (arXiv 2211.10586), which holds theta_i fixed.
        precision: "float32" (everything in the dtype of start), "tf32" (GPU only: TF32 in convolutions and products),
            or "bfloat16" (fused: convolutions and what lies between them in bfloat16, linear layers in the dtype of
            start; autograd: torch's autocast; both: parameters, logits, loss and updates in the dtype of start).
        cuda_graphs: replay each step from a CUDA graph: fewer launches, same numbers; GPU with the fused engine only;
            not yet run on a GPU. Graphs are captured anew in each call, so it takes more than a few steps to pay;
            `UnrolledSGD` keeps them.

    Returns:
        (P,) the parameters after N steps.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape, length or range; it is named.
        NotImplementedError: engine="fused" for a network that it cannot run, or, in the backward pass, a network with
            an operation that torch cannot differentiate twice; the message names the operation.
        RuntimeError: in the backward pass, with create_graph=True, or where a repeated step of `model` computes
            something else than it did.
    """
    unrolled = UnrolledSGD(model, engine, keep, gradient, precision, cuda_graphs)
    optimizer: _Optimizer = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    return unrolled(start, images, labels, batches, lr, augmentations, **optimizer)


class _Optimizer(TypedDict, total=False):
    """What `UnrolledSGD` takes by name; see `unrolled_sgd`."""

    momentum: Rates
    nesterov: bool
    weight_decay: Rates


class UnrolledSGD:
    """`unrolled_sgd` for many calls with one network and the same options: what was read of the network, the private
    copy of it, CUDA graphs and, on the CPU, the memory that steps have used stay from one call to the next, until the
    object is deleted.

        unrolled = UnrolledSGD(model, cuda_graphs=True)
        student = unrolled(start, images, labels, batches, lr, augmentations, momentum=0.9)

    The arguments are those of `unrolled_sgd`, and so are the results and the errors. With the fused engine the network
    is the one that was read at the first call for images of a size; make a new object after `model` was changed. (Its
    parameters and buffers do not count.) An object belongs to one thread at a time."""

    def __init__(
        self,
        model: nn.Module,
        engine: str = "auto",
        keep: str = "nothing",
        gradient: str = "exact",
        precision: str = "float32",
        cuda_graphs: bool = False,
    ):
        check_options(engine, keep, gradient, precision)
        self.model, self.engine, self.keep = unwrapped(model), engine, keep
        self.gradient, self.precision, self.cuda_graphs = gradient, precision, cuda_graphs
        self._memory = HeldMemory()
        self._steppers: dict[tuple, tuple[FusedStepper | GraphedStepper, int]] = {}  # and the number of classes

    @never_compiled("unrolled_sgd reads the network in Python; it runs as it is in compiled code")
    def __call__(
        self,
        start: Tensor,
        images: Tensor,
        labels: Tensor,
        batches: Iterable[Tensor],
        lr: Rates,
        augmentations: Iterable[Augmentation] | None = None,
        **optimizer: "Unpack[_Optimizer]",
    ) -> Tensor:
        """(P,) parameters after N steps; see `unrolled_sgd`. optimizer: its momentum, nesterov and weight_decay."""
        check_tensors(self.model, start, images)
        label_range = check_label_tensor(labels, start, images)
        steps = check_batches(batches, images)
        augmentations = check_augmentations(augmentations, steps)
        rates = one_a_step("lr", lr, len(steps), start), *momentum_and_decay(len(steps), start, **optimizer)
        if self.precision == "tf32" and start.device.type != "cuda":
            raise ValueError(f'precision="tf32" needs CUDA tensors, start is on {start.device}')
        if self.precision == "bfloat16":
            warn_if_slow(start.device)
        nesterov = optimizer.get("nesterov", False)
        plan = UnrollPlan(steps, augmentations, label_range, self.keep, self.gradient, self.precision, nesterov)
        stepper = self._stepper(start, images, labels, plan)
        with _classes_kept(stepper):
            return unroll(stepper, Inputs(start, images, labels, *rates), plan)

    def _stepper(self, start: Tensor, images: Tensor, labels: Tensor, plan: UnrollPlan) -> Stepper:
        """That of an earlier call with such tensors, where it runs on the fused engine; else a new one."""
        key = start.dtype, start.device, images.shape[1:]
        if key not in self._steppers:
            chosen: FusedStepper | AutogradStepper | GraphedStepper
            chosen, choice = _choose(self.model, start, images, plan, self.engine)
            if self.cuda_graphs:
                chosen = _graphed(chosen, choice, start.device)
            if isinstance(chosen, AutogradStepper):
                return chosen
            self._steppers[key] = chosen, chosen.classes(_first_shape(images, plan), images.dtype)
        stepper, classes = self._steppers[key]
        check_targets(labels, plan.label_range, classes)
        return stepper


def _first_shape(images: Tensor, plan: UnrollPlan) -> tuple[int, ...]:
    """That of the first batch; of two images where there is none."""
    return (len(plan.batches[0]) if plan.batches else 2, *images.shape[1:])


@contextlib.contextmanager
def _classes_kept(stepper: Stepper) -> Iterator[None]:
    """Puts back what steps change in classes and functions, which the module and its copy share."""
    before = stepper.model.state() if isinstance(stepper, AutogradStepper) else None
    try:
        yield
    finally:
        if before is not None:
            before.restore_objects()


@dataclass(frozen=True)
class Engine:
    """Which engine `unrolled_sgd` takes for a network, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def explain_engine(model: nn.Module, images: Tensor) -> Engine:
    """Which engine `unrolled_sgd(model, ..., engine="auto")` takes: an `Engine` with a name and a reason.

    model: nn.Module; images: any (n, C, H, W) tensor like those it will be given. "autograd" is exact too, and slower;
    its reason says in a sentence what the fused engine has no rule for, or in what the module differs from what was
    read of it: the fused engine runs a network only after its outputs and gradients on a small batch were compared with
    the module's own. That happens once for a network; it must not run while other threads use PyTorch, because reading
    patches torch and comparing seeds the global generators. Raises TypeError or ValueError as `unrolled_sgd` does.
    """
    model = unwrapped(model)
    check_types(images=images)
    check_values("images", images)
    start = images.new_empty((parameter_count(model),))
    check_tensors(model, start, images)
    return _read(model, images)[1]


def _read(model: nn.Module, images: Tensor) -> tuple[list[Operation] | None, Engine]:
    """(the network's steps or None, which engine it takes and why)."""
    if images.device.type == "cuda" and build_info()["cuda"] is None:
        return None, Engine("autograd", "the extension was built without CUDA")
    if images.device.type not in ("cpu", "cuda"):
        return None, Engine("autograd", f"the fused engine has no kernels for {images.device.type} tensors")
    try:
        with temporarily_clear_interpreter_stack():
            if torch._C._functorch.is_functorch_wrapped_tensor(images):  # whose values are not to be seen
                images = torch.zeros(images.shape, dtype=images.dtype, device=images.device)
            steps = operations_of(model, images, training=False)
    except Unsupported as problem:
        return None, Engine("autograd", str(problem))
    return steps, Engine(
        "fused", f"all {len(steps)} operations of the network have a rule, and compute what the module does"
    )


def _choose(
    model: nn.Module, start: Tensor, images: Tensor, plan: UnrollPlan, engine: str
) -> tuple[FusedStepper | AutogradStepper, Engine]:
    steps, choice = None, Engine("autograd", "it was asked for")
    if engine != "autograd":
        steps, choice = _read(model, images)
    if engine == "fused" and steps is None:
        raise NotImplementedError(f'engine="fused" cannot run this network: {choice.reason}; use engine="auto"')
    private = PrivateModel(model, torch.empty((), dtype=start.dtype, device=start.device))
    private.module.train()  # students: BatchNorm takes each batch's statistics (models/batchnorm.py)
    return AutogradStepper(private, plan) if steps is None else FusedStepper(private, steps, plan.precision), choice


def _graphed(stepper: Stepper, choice: Engine, device: torch.device) -> GraphedStepper:
    """`stepper`, replayed from CUDA graphs. ValueError for autograd's engine, whose steps may draw random numbers that
    a replay would repeat; and where `device` is not a GPU."""
    if not isinstance(stepper, FusedStepper):
        raise ValueError(f"cuda_graphs=True needs the fused engine, this call runs on {choice}")
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs CUDA tensors, start is on {device}")
    return GraphedStepper(stepper, CudaRecorder(device))
