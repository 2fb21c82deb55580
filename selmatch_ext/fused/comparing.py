"""Whether what was read from a module computes what the module computes, found out on a small batch.

torch.fx sees the operations of a forward and nothing of what Python does around them: gradient modes, hooks, custom
autograd.Functions, random draws, state that changes from call to call. So the module itself runs beside the steps that
were read from it, in float64, twice, with other images, parameters and random states; random parameters, because in
some networks a branch starts with weights of zero. The result is remembered for as long as the module lives and does
not change."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from selmatch_ext.fused.forward import Forward
from selmatch_ext.fused.operations import Operation, Unsupported
from selmatch_ext.fused.reader import first_line, read
from selmatch_ext.fused.rules import Add, Linear
from selmatch_ext.modules.private import PrivateModel
from selmatch_ext.modules.records import same
from selmatch_ext.modules.signature import signature
from selmatch_ext.seeds import seed_globally

_TOLERANCE = 1e-6  # of float64 results; those of the same network differ by about 1e-12
_BATCHES = 3, 2

_known: dict[int, tuple[weakref.ref, dict]] = {}  # by the id of a model, which may have no hash


def operations_of(model: nn.Module, images: Tensor, training: bool) -> list[Operation]:
    """The steps of `model`, read and compared with it.

    images: (n, C, H, W), some like those that it will run on. training: for ordinary training, in the mode that the
    model has, with the buffers that a call leaves; else for unrolled steps, in train mode. Raises Unsupported where the
    module itself has to run."""
    private = PrivateModel(model, images.new_empty((), dtype=torch.float64))
    hooked = next((name for name, hooks in zip(private.names, private.hooks, strict=True) if hooks), None)
    if hooked is not None:
        raise Unsupported(f"the parameter {hooked} has hooks, which the fused engine does not call")
    if not training:
        private.module.train()
    # Read at each call, which takes milliseconds: what a forward decides by, such as an object, a buffer or a variable
    # of its module, may have changed where no signature shows it.
    with _called_once(private):
        steps = read(private.module)
    key = training, images.shape[1:], images.device
    now = [steps, *signature(model), [m.training for m in model.modules()] if training else None]
    known = _known_of(model)
    if key not in known or not same(known[key][0], now):
        try:
            _compare(model, private, steps, images.detach(), training)
            known[key] = now, None
        except Unsupported as problem:
            known[key] = now, str(problem)
    if known[key][1] is not None:
        raise Unsupported(known[key][1])
    return steps


def _known_of(model: nn.Module) -> dict:
    """What is known of a model, until it is gone; it must not refer to the model."""
    number = id(model)
    if number not in _known:
        _known[number] = weakref.ref(model, lambda _: _known.pop(number, None)), {}
    return _known[number][1]


def _compare(model: nn.Module, private: PrivateModel, steps: list[Operation], images: Tensor, training: bool) -> None:
    """Raises Unsupported where the steps do not compute what the module computes."""
    draw = torch.Generator().manual_seed(0)
    for number, count in enumerate(_BATCHES):
        x, theta = _small_batch(model, images, count, draw)
        try:
            with _called_once(private, number):
                expected = _results(private, private, x, theta)
            with _called_once(private):
                _check_shapes(private, steps, x, theta)
            with _called_once(private):
                found = _results(private, lambda p, x: _forward(private, p, steps)(x), x, theta)
        except (RuntimeError, ValueError, TypeError) as error:
            raise Unsupported(f"its comparison with what was read fails ({first_line(error)})") from error
        if not training:  # then nothing reads the buffers that the steps leave
            expected = {name: t for name, t in expected.items() if not name.startswith("buffer")}
        _check_near(found, expected)


@contextlib.contextmanager
def _called_once(private: PrivateModel, seed: int | None = None) -> Iterator[None]:
    """Puts everything back that a call of the module changes, and raises Unsupported where that would matter to another
    call. (The running statistics of norms do not.) seed: what the global random generators begin with."""
    before = private.state()
    try:
        if seed is not None:
            seed_globally(seed, private.device)
        started = private.state(before)
        yield
        change = started.change(private.state(started))
        if change is not None:
            raise Unsupported(f"a call of the network {change}, so that no two calls need be alike")
    finally:
        before.restore()


def _small_batch(model: nn.Module, images: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(images, (P,) parameters) near the given ones, float64."""

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64, device="cpu").to(images.device)

    x = images.double().nan_to_num() if len(images) else normal(count, *images.shape[1:])
    x = x[torch.arange(count, device=x.device) % len(x)] + 0.1 * normal(count, *images.shape[1:])
    parts = []
    for p in model.parameters():
        # A share of the tensor's own size, so that deep networks do not explode; what starts as zeros becomes small.
        size = 0.3 * p.detach().double().square().mean().sqrt().item() if p.numel() else 0
        parts.append(p.detach().double().flatten() + (size or 0.1) * normal(p.numel()))
    return x, torch.cat([*parts, x.new_empty(0)])


def _forward(private: PrivateModel, parameters: list[Tensor], steps: list[Operation]) -> Forward:
    return Forward(private.module, dict(zip(private.names, parameters, strict=True)), steps, torch.float64)


@torch.no_grad()
def _check_shapes(private: PrivateModel, steps: list[Operation], x: Tensor, theta: Tensor) -> None:
    """Unsupported for sums and linear layers in shapes for which the fused engine has no derivatives."""
    values = _forward(private, private.split(theta), steps).values(x)
    for step in steps:
        inputs = [x if j < 0 else values[j] for j in step.inputs]
        if isinstance(step.rule, Linear) and inputs[0].dim() != 2:
            raise Unsupported(f"the fused engine has no rule for a linear layer ({step.rule.weight}) on a map")
        if isinstance(step.rule, Add) and inputs[0].shape != inputs[1].shape:
            shapes = " and ".join(str(tuple(t.shape)) for t in inputs)
            raise Unsupported(f"the fused engine has no rule for a sum of different shapes, here {shapes}")
    if values[-1].dim() != 2:
        raise Unsupported(f"its output has shape {tuple(values[-1].shape)}, not (B, K)")


def _results(private: PrivateModel, network: Callable, x: Tensor, theta: Tensor) -> dict[str, Tensor]:
    """What a call of the network gives and leaves. network: (parameters, images) -> logits."""
    x = x.clone().requires_grad_()
    parameters = [p.requires_grad_() for p in private.split(theta.clone())]
    with torch.enable_grad():
        logits = network(parameters, x)
        # A function of the logits whose derivative is another one at each of them.
        weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype, device=logits.device)
        loss = (logits * weights.view_as(logits)).sum()
    if network is private:
        _refuse_custom_functions(loss)
    gradients = torch.autograd.grad(loss, [*parameters, x], materialize_grads=True)
    results = {"output": logits.detach(), "gradient of the images": gradients[-1]}
    results |= {f"gradient of {name}": g for name, g in zip(private.names, gradients, strict=False)}
    return results | {f"buffer {name}": b.detach().double() for name, b in private.module.named_buffers()}


def _refuse_custom_functions(result: Tensor) -> None:
    """Unsupported where a torch.autograd.Function in Python took part: its second derivative may be any."""
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise Unsupported(
                f"it has an autograd.Function of its own ({type(node).__name__.removesuffix('Backward')})"
            )
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]


def _check_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Unsupported unless two results are equal up to rounding."""
    gradients = torch.stack([t.norm() for name, t in expected.items() if name.startswith("gradient")])
    for name, result in expected.items():
        # Of some gradients, such as that of a bias before a norm, nothing but rounding is left.
        size = result.norm() + 1e-3 * gradients.norm() * name.startswith("gradient")
        distance = (found[name] - result).norm()
        if not distance <= _TOLERANCE * size:  # NaN is not near to anything
            raise Unsupported(f"what torch.fx reads from it has another {name} than the module itself")
