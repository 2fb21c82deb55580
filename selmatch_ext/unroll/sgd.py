"""`unrolled_sgd`: checks what it is given, chooses an engine, and runs the recursion with it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from selmatch_ext._C import build_info
from selmatch_ext.compiling import never_compiled
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.models.unwrap import unwrapped
from selmatch_ext.precision import warn_if_slow
from selmatch_ext.unroll.adjoint import Plan, Stepper, unroll
from selmatch_ext.unroll.autograd import AutogradStepper
from selmatch_ext.unroll.comparing import steps_of
from selmatch_ext.unroll.fused import FusedStepper
from selmatch_ext.unroll.graphs import CudaRecorder, GraphedStepper
from selmatch_ext.unroll.private import PrivateModel
from selmatch_ext.unroll.program import Unsupported

ENGINES = ("auto", "fused", "autograd")
KEEP = ("nothing", "activations")
GRADIENT = ("exact", "tesla")
PRECISION = ("float32", "tf32", "bfloat16")


@never_compiled("unrolled_sgd reads the network in Python; it runs as it is in compiled code")
def unrolled_sgd(
    model,
    start,
    images,
    labels,
    batches,
    lr,
    *,
    augmentations=None,
    engine="auto",
    keep="nothing",
    gradient="exact",
    precision="float32",
    cuda_graphs=False,
):
    """Parameters after N steps of plain SGD from `start` on batches of `images`: a differentiable function.

    Step i: theta_{i+1} = theta_i - lr_i * grad_theta CE(model(theta_i; A_i(images[batches[i]])), labels[batches[i]]),
    CE the mean cross-entropy. Differentiable (once) in images, float labels, lr and start. This is the inner loop of
    dataset distillation by matching training trajectories (MTT, arXiv 2203.11932, section 3.2).

    The gradient is that of autograd through all N steps, but only the N parameter vectors are kept: the backward pass
    is the adjoint recursion, which needs the graph of one step at a time, or none where the fused engine runs.

    `model` is never changed: a private copy of it runs, in train mode, so that BatchNorm uses batch statistics. The
    copy's buffers and Python attributes change from step to step as in ordinary training, beginning with those that the
    model has now. All its parameters are trained, whatever their `requires_grad`; those that the loss does not reach
    stay as they are; shared ones count once. Dropout, and whatever else draws from the global generators of torch,
    Python or numpy, draws as in ordinary training; the backward pass repeats each step with the draws, buffers and
    attributes that it had, without advancing a generator. Hooks run on the copy. An autocast around the call has no
    effect: `precision` alone decides.

    Args:
        model: nn.Module, images (B, C, H, W) -> logits (B, K). Of DataParallel, DistributedDataParallel, AveragedModel
            and torch.compile the module inside counts.
        start: (P,) float32 or float64, P = number of parameters, in `model.parameters()` order.
        images: (n, C, H, W), dtype and device of start.
        labels: (n,) integers in [0, K), or (n, K) probabilities of the dtype of start.
        batches: N index tensors, each (B_i,) integers in [0, n), not empty; an image may occur any number of times.
        lr: learning rate, 0-d or (N,) floating tensor, or a number (64 bits of it count where start is float64).
        augmentations: None, or N results of `sample_augmentation`, one a step.
        engine: "fused" (networks of known operations, on the CPU and CUDA; float32, float64 and bfloat16), "autograd"
            (any module), or "auto": fused where it can run the model, else autograd. `explain_engine` says which.
        keep: "nothing" recomputes each step in the backward pass; "activations" caches what is expensive to recompute:
            faster, same gradient, memory grows with N. Autograd keeps every step's graph, the fused engine the results
            of convolutions, except of those with 4 input channels or fewer, such as the images'.
        gradient: "exact", or "tesla": the estimate of TESLA (arXiv 2211.10586), which holds theta_i fixed.
        precision: "float32" (everything in the dtype of start), "tf32" (GPU only: TF32 in convolutions and products),
            or "bfloat16" (fused: convolutions and what lies between them in bfloat16, linear layers in the dtype of
            start; autograd: torch's autocast; both: parameters, logits, loss and updates in the dtype of start).
        cuda_graphs: replay each step from a CUDA graph: fewer launches, same numbers; GPU with the fused engine only;
            not yet run on a GPU. Graphs are captured anew in each call, so it takes more than a few steps to pay.

    Returns:
        (P,) the parameters after N steps.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device, shape, length or range; it is named.
        NotImplementedError: engine="fused" for a network that it cannot run, or, in the backward pass, a network with
            an operation that torch cannot differentiate twice; the message names the operation.
        RuntimeError: in the backward pass, with create_graph=True, or where a repeated step of `model` computes
            something else than it did.
    """
    _check_choices(engine, keep, gradient, precision)
    model = unwrapped(model)
    _check_tensors(model, start, images)
    label_range = _check_labels(labels, start, images)
    batches = _check_batches(batches, images)
    if augmentations is not None:
        augmentations = list(augmentations)
        if len(augmentations) != len(batches):
            raise ValueError(f"augmentations: {len(augmentations)} given for {len(batches)} batches; give one a batch")
    if precision == "tf32" and start.device.type != "cuda":
        raise ValueError(f'precision="tf32" needs CUDA tensors, start is on {start.device}')
    if precision == "bfloat16":
        warn_if_slow(start.device)
    plan = Plan(batches, augmentations, label_range, keep, gradient, precision)
    stepper, choice = _choose(model, start, images, plan, engine)
    if cuda_graphs:
        stepper = _graphed(stepper, choice, start.device)
    return unroll(stepper, start, images, labels, _learning_rates(lr, len(batches), start), plan)


@dataclass(frozen=True)
class Engine:
    """Which engine `unrolled_sgd` takes for a network, and why."""

    name: str
    reason: str

    def __str__(self):
        return f"{self.name}: {self.reason}"


def explain_engine(model, images):
    """Which engine `unrolled_sgd(model, ..., engine="auto")` takes: an `Engine` with a name and a reason.

    model: nn.Module; images: any (n, C, H, W) tensor like those it will be given. "autograd" is exact too, and slower;
    its reason says in a sentence what the fused engine has no rule for, or in what the module differs from what was
    read of it: the fused engine runs a network only after its outputs and gradients on a small batch were compared with
    the module's own. That happens once for a network. Raises TypeError or ValueError as `unrolled_sgd` does.
    """
    model = unwrapped(model)
    _check_types(images=images)
    start = images.new_empty((parameter_count(model),))
    _check_tensors(model, start, images)
    return _read(model, images)[1]


def _read(model, images):
    """(the network's steps or None, which engine it takes and why)."""
    if images.device.type == "cuda" and build_info()["cuda"] is None:
        return None, Engine("autograd", "the extension was built without CUDA")
    if images.device.type not in ("cpu", "cuda"):
        return None, Engine("autograd", f"the fused engine has no kernels for {images.device.type} tensors")
    try:
        with temporarily_clear_interpreter_stack():
            if torch._C._functorch.is_functorch_wrapped_tensor(images):  # whose values are not to be seen
                images = torch.zeros(images.shape, dtype=images.dtype, device=images.device)
            steps = steps_of(model, images, training=False)
    except Unsupported as problem:
        return None, Engine("autograd", str(problem))
    return steps, Engine(
        "fused", f"all {len(steps)} operations of the network have a rule, and compute what the module does"
    )


def _choose(model, start, images, plan, engine) -> tuple[Stepper, Engine]:
    steps, choice = None, Engine("autograd", "it was asked for")
    if engine != "autograd":
        steps, choice = _read(model, images)
    if engine == "fused" and steps is None:
        raise NotImplementedError(f'engine="fused" cannot run this network: {choice.reason}; use engine="auto"')
    private = PrivateModel(model, torch.empty((), dtype=start.dtype, device=start.device))
    private.module.train()
    return AutogradStepper(private, plan) if steps is None else FusedStepper(private, steps, plan), choice


def _graphed(stepper, choice, device) -> Stepper:
    """The step functions of the fused engine as CUDA graphs. (Autograd's may draw random numbers.)"""
    if choice.name != "fused":
        raise ValueError(f"cuda_graphs=True needs the fused engine, this call runs on {choice}")
    if device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs CUDA tensors, start is on {device}")
    return GraphedStepper(stepper, CudaRecorder(device))


def _check_choices(engine, keep, gradient, precision):
    choices = (
        ("engine", engine, ENGINES),
        ("keep", keep, KEEP),
        ("gradient", gradient, GRADIENT),
        ("precision", precision, PRECISION),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_types(**tensors):
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")


def _check_tensors(model, start, images):
    _check_types(start=start, images=images)
    count = parameter_count(model)
    if start.dim() != 1 or start.numel() != count:
        raise ValueError(
            f"start must have shape ({count},), the number of parameters of the model, got {tuple(start.shape)}"
        )
    if images.dtype != start.dtype:
        raise TypeError(f"images must have the dtype of start, {start.dtype}, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must have shape (n, C, H, W), got {tuple(images.shape)}")
    if images.device != start.device:
        raise ValueError(f"images are on {images.device}, start is on {start.device}; put them on one device")
    for name, parameter in model.named_parameters():
        if parameter.device != start.device:
            raise ValueError(f"parameter {name} of the model is on {parameter.device}, start is on {start.device}")


def _check_labels(labels, start, images):
    """(smallest, largest) of integer labels, None for probabilities. Their upper end is checked once K is known."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.device != start.device:
        raise ValueError(f"labels are on {labels.device}, start is on {start.device}; put them on one device")
    if labels.dim() == 0 or labels.shape[0] != images.shape[0]:
        raise ValueError(f"labels must have one entry per image ({images.shape[0]}), got shape {tuple(labels.shape)}")
    if labels.is_floating_point():
        if labels.dtype != start.dtype:
            raise TypeError(f"float labels must have the dtype of start, {start.dtype}, got {labels.dtype}")
        if labels.dim() != 2:
            raise ValueError(f"float labels are probabilities of shape (n, K), got shape {tuple(labels.shape)}")
        return None
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels must be integers or probabilities, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"integer labels must have shape (n,), got {tuple(labels.shape)}")
    if labels.numel() == 0 or torch._C._functorch.is_batchedtensor(labels):
        return None  # within vmap nothing looks at values
    smallest, largest = torch.stack(labels.aminmax()).tolist()
    if smallest < 0:
        raise ValueError(f"labels must not be negative, the smallest is {smallest}")
    return smallest, largest


def _check_batches(batches, images):
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: give at least one index tensor")
    for i, batch in enumerate(batches):
        if not isinstance(batch, torch.Tensor) or batch.dtype not in (torch.int64, torch.int32):
            what = batch.dtype if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise TypeError(f"batches[{i}] must be an int64 tensor of indices, got {what}")
        if batch.dim() != 1 or batch.numel() == 0:
            raise ValueError(f"batches[{i}] must have shape (B,) with B of at least 1, got {tuple(batch.shape)}")
    batches = [batch.to(images.device, torch.int64) for batch in batches]
    smallest, largest = torch.stack(torch.cat(batches).aminmax()).tolist()
    if smallest < 0 or largest >= images.shape[0]:
        raise ValueError(
            f"batches must hold indices of the {images.shape[0]} images, from 0 to {images.shape[0] - 1}, "
            f"got {smallest} to {largest}"
        )
    return batches


def _learning_rates(lr, count, start):
    """lr as a (count,) tensor like start, differentiable in what was given."""
    if isinstance(lr, (int, float, np.number, np.ndarray)):
        lr = torch.as_tensor(lr, dtype=torch.float64, device=start.device)
    if not isinstance(lr, torch.Tensor) or not lr.is_floating_point():
        what = lr.dtype if isinstance(lr, torch.Tensor) else type(lr).__name__
        raise TypeError(f"lr must be a floating tensor or a number, got {what}")
    if lr.shape not in ((), (count,)):
        raise ValueError(f"lr must be 0-d or have shape ({count},), one for each batch, got {tuple(lr.shape)}")
    return lr.to(start.device, start.dtype).expand(count)
