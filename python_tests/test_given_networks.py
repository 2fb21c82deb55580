"""Both engines compute the network that they are given: what Python does around a network's operations, such as
gradient modes, draws, hooks and state, and operations that torch does not differentiate twice by itself."""

import copy
import functools
import random
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import unrolled_sgd_full_graph
from test_unroll import CLASSES, Problem, one_thread  # noqa: F401  (a fixture)
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

import selmatch_ext as sm
from selmatch_ext.fused.training import fast
from selmatch_ext.models.flat import flatten, unflatten
from selmatch_ext.unroll import unrolled_sgd


class Base(nn.Module):
    """Convolution, BatchNorm and a classifier; subclasses change what happens to the map in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, CLASSES)

    def middle(self, h):
        return self.second(h)

    def forward(self, x):
        return self.head(F.silu(self.middle(F.silu(self.first(x)))).mean((2, 3)))


class NoGrad(Base):
    @torch.no_grad()
    def middle(self, h):
        return self.second(h)


class GradSwitched(Base):
    def middle(self, h):
        with torch.set_grad_enabled(False):
            frozen = self.second(h)
        return h + frozen


class Detached(Base):
    def middle(self, h):
        return h + self.second(h).detach()


class Inference(Base):
    """All of the network inside torch.no_grad: the loss reaches no parameter."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class NormFrozenInForward(Base):
    def middle(self, h):
        self.norm.eval()
        return self.norm(self.second(h))


class NormFrozenAfterwards(Base):
    """The first call has the batch's statistics, all later ones the running ones, which the first has changed."""

    def middle(self, h):
        h = self.norm(h)
        self.norm.eval()
        return h


class NormFrozenByTrain(Base):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def middle(self, h):
        return self.norm(self.second(h))


class LayerDrop(Base):
    def draw(self):
        return torch.rand(()).item()

    def middle(self, h):
        return self.second(h) if self.draw() < 0.5 else h


class LayerDropByPython(LayerDrop):
    def draw(self):
        return random.random()


class LayerDropByNumpy(LayerDrop):
    def draw(self):
        return np.random.rand()


class LayerDropByOwn(LayerDrop):
    def __init__(self):
        super().__init__()
        self.rng, self.other = random.Random(3), np.random.default_rng(3)

    def draw(self):
        return (self.rng.random() + self.other.random()) / 2


class RarelyDropped(LayerDrop):
    """The same in nearly all calls: that it draws shows in the generator alone."""

    def middle(self, h):
        return self.second(h) if self.draw() < 1e-9 else h


class DropPath(Base):
    def middle(self, h):
        return h + self.second(h) * torch.empty(len(h), 1, 1, 1, dtype=h.dtype).bernoulli_(0.5)


class Dropout(Base):
    def middle(self, h):
        return F.dropout2d(self.second(h), 0.5, self.training)


class Counter(Base):
    calls = 0

    def middle(self, h):
        self.calls += 1
        return self.second(h) * self.calls


class CounterOfTheClass(Base):
    calls = 0

    def middle(self, h):
        type(self).calls += 1
        return self.second(h) if self.calls < 3 else h


class CounterInABuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def middle(self, h):
        self.calls += 1
        return self.second(h) * self.calls.item()


class CounterInAList(Base):
    def __init__(self):
        super().__init__()
        self.history = []

    def middle(self, h):
        self.history.append(len(h))
        return self.second(h) * len(self.history)


class MovingAverage(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(6))

    def middle(self, h):
        with torch.no_grad():
            self.average.mul_(0.5).add_(0.5 * h.mean((0, 2, 3)))
        return self.second(h) - self.average[:, None, None]


def replaced(where, how):
    def make():
        module = Base()
        target = module if where == "module" else module.second
        before, kind = target.forward, type(target)
        if how == "method":
            target.forward = types.MethodType(lambda self, x: 3 * kind.forward(self, x), target)
        elif how == "closure":
            target.forward = lambda x: 3 * kind.forward(target, x)
        elif how == "wrapped":
            target.forward = functools.wraps(before)(lambda x: 3 * before(x))
        else:
            target.forward = functools.partial(lambda f, x: 3 * f(x), before)
        return module

    make.__name__ = f"replaced_{where}_{how}"
    return make


def hooked(register):
    def make():
        module = Base()
        register(module)
        return module

    make.__name__ = f"hooked_{register.__name__}"
    return make


def forward_hook(module):
    module.second.register_forward_hook(lambda m, inputs, output: 2 * output)


def forward_pre_hook(module):
    module.second.register_forward_pre_hook(lambda m, inputs: (inputs[0] + 1,))


def closing_hook(module):
    module.second.register_forward_hook(lambda m, inputs, output: module.norm(output))


def backward_hook(module):
    module.second.register_full_backward_hook(lambda m, before, after: (2 * before[0],))


def parameter_hook(module):
    module.second.weight.register_hook(lambda g: 2 * g)


class TensorHook(Base):
    def middle(self, h):
        h = self.second(h)
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return h


class Double(torch.autograd.Function):
    """Its derivative is not that of its value."""

    @staticmethod
    def forward(ctx, x):
        return 1.0 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Honest(torch.autograd.Function):
    """The first derivative is right; the second is that of the written one, which is none."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x).detach()
        return g * s * (1 + x.detach() * (1 - s))


class CustomFunction(Base):
    def middle(self, h):
        return Double.apply(self.second(h))


class CustomSwish(Base):
    def middle(self, h):
        return Honest.apply(self.second(h))


class MapAndVector(Base):
    def middle(self, h):
        return h + F.adaptive_avg_pool2d(self.second(h), 1)


class Excited(Base):
    def middle(self, h):
        return h * torch.sigmoid(self.second(h).mean((2, 3), keepdim=True))


class LinearOnMap(Base):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def middle(self, h):
        return self.mix(h)


class HardSwishes(Base):
    def __init__(self):
        super().__init__()
        self.gate = nn.Hardsigmoid(inplace=True)

    def middle(self, h):
        return F.hardswish(h) * F.hardsigmoid(self.second(h)) + self.gate(h + 1)


class SharedAndScaled(Base):
    def __init__(self):
        super().__init__()
        self.norm = self.second
        self.scale = nn.Parameter(torch.tensor(0.7))

    def middle(self, h):
        return self.scale * self.second(F.silu(self.norm(h)))


class OldWeightNorm(Base):
    def __init__(self):
        super().__init__()
        self.second = nn.utils.weight_norm(self.second)


class SpectralNorm(Base):
    """Each call in train mode moves its buffers by a step of power iteration."""

    def __init__(self):
        super().__init__()
        self.second = nn.utils.parametrizations.spectral_norm(self.second)


class Rounded(Base):
    def middle(self, h):
        with torch.autocast("cpu", torch.bfloat16):
            return F.conv2d(h.float(), self.second.weight.float(), padding=1).double()


class Attention(Base):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0] + F.scaled_dot_product_attention(h, h, h)
        return self.head(self.layer(h).mean(1))


class ConstantBranch(Base):
    """A decision by Python state that is no part of the module's parameters."""

    deep = True

    def middle(self, h):
        return self.second(h) if self.deep else h


NETWORKS = [
    (NoGrad, "without gradients"),
    (GradSwitched, "without gradients"),
    (Detached, "no rule for the method detach"),
    (NormFrozenInForward, "evaluation mode"),
    (NormFrozenAfterwards, "evaluation mode"),
    (NormFrozenByTrain, "evaluation mode"),
    *((kind, "draws random numbers") for kind in (LayerDropByPython, LayerDropByNumpy)),
    (LayerDrop, "torch.fx cannot read|draws random numbers"),
    (RarelyDropped, "draws random numbers"),
    (LayerDropByOwn, "changes its attribute"),
    (DropPath, "torch.fx cannot read"),
    (Dropout, "no rule for"),
    (Counter, "no rule for"),
    (CounterInABuffer, "no rule for|torch.fx cannot read"),
    (CounterInAList, "no rule for|torch.fx cannot read"),
    (MovingAverage, "no rule for|without gradients"),
    *((replaced("module", how), "a forward of its own") for how in ("method", "closure", "wrapped", "partial")),
    *((replaced("child", how), "second has a forward of its own") for how in ("method", "closure", "wrapped")),
    *((hooked(hook), "has hooks") for hook in (forward_hook, forward_pre_hook, closing_hook, backward_hook)),
    (hooked(parameter_hook), "parameter second.weight has hooks"),
    (TensorHook, "decides by values|no rule for"),
    (CustomFunction, "autograd.Function of its own"),
    (CustomSwish, "autograd.Function of its own"),
    (MapAndVector, "sum of different shapes"),
    (Excited, "no rule for mul of other things"),
    (LinearOnMap, r"linear layer \(mix.weight\) on a map"),
    (HardSwishes, "no rule for the function hardswish"),
    (SharedAndScaled, "no rule for the tensor scale"),
    (OldWeightNorm, "second has hooks"),
    (SpectralNorm, "no rule for"),
    (Rounded, "autocast"),
    (Attention, "no rule for|cannot read"),
    (ConstantBranch, None),
    (Base, None),
]


def seeded(make):
    """A module and the global generators, always the same."""
    torch.manual_seed(0)
    module = make().train().double()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    return module


def gradients(module, function, **options):
    """Of <theta_N, a direction> after four steps: parameters, and gradients for images, labels, rates and start."""
    problem = Problem(module, lr=(0.1, 0.05, 0.2, 0.1))
    problem.batches.append(problem.batches[0])
    inputs = problem.images, problem.labels, problem.lr, problem.start
    hooks = [list((p._backward_hooks or {}).values()) for p in module.parameters()]
    if any(hooks) and function is unrolled_sgd_full_graph:
        function = functools.partial(full_graph_with_hooks, hooks=hooks)
    with sdpa_kernel(SDPBackend.MATH):
        theta = function(module, problem.start, *inputs[:2], problem.batches, problem.lr, **options)
        found = torch.autograd.grad(theta @ problem.target, inputs, materialize_grads=True)
    return theta.detach(), *found


def full_graph_with_hooks(module, start, images, labels, batches, lr, hooks):
    """unrolled_sgd_full_graph with a hook's function on each step's gradient, as on a parameter that is trained."""
    theta = start
    for i, batch in enumerate(batches):
        parts = list(unflatten(theta, module).values())
        logits = functional_call(module, dict(zip(unflatten(theta, module), parts, strict=True)), (images[batch],))
        found = torch.autograd.grad(
            F.cross_entropy(logits, labels[batch]), parts, create_graph=True, materialize_grads=True
        )
        found = [functools.reduce(lambda g, hook: hook(g), on, g) for g, on in zip(found, hooks, strict=True)]
        theta = theta - lr[i] * flatten(found)
    return theta


def assert_same(found, expected, tolerance=1e-9):
    for name, a, b in zip(("theta", "images", "labels", "lr", "start"), found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("make, reason", NETWORKS, ids=[make.__name__ for make, _ in NETWORKS])
def test_the_module_itself_is_computed(make, reason):
    expected = gradients(seeded(make), unrolled_sgd_full_graph)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for keep in ("nothing", "activations"):
        # A rounded gradient is a sum of rounded parts, which may come in another order.
        assert_same(gradients(seeded(make), unrolled_sgd, keep=keep), expected, 0.02 if make is Rounded else 1e-9)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    choice = sm.explain_engine(seeded(make), torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert choice.name == ("fused" if reason is None else "autograd"), choice
    if reason is not None:
        with pytest.raises(NotImplementedError, match=reason):
            gradients(seeded(make), unrolled_sgd, engine="fused")
        module = seeded(make).float()
        assert fast(module, torch.randn(4, 3, 8, 8)) is module


def test_what_is_known_of_a_network_is_forgotten_when_it_changes():
    module, images = seeded(Base), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    changes = [
        lambda: setattr(module, "middle", NoGrad.middle.__get__(module)),
        lambda: delattr(module, "middle"),
        lambda: module.second.register_forward_hook(lambda m, inputs, output: 2 * output),
        lambda: module.second._forward_hooks.clear(),
        lambda: setattr(module, "second", nn.Tanh()),
    ]
    engines = [sm.explain_engine(module, images).name]
    for change in changes:
        change()
        engines.append(sm.explain_engine(module, images).name)
    assert engines == ["fused", "autograd", "fused", "autograd", "fused", "autograd"]


class Config:
    act = True


class Configured(Base):
    """Decides by an object, by a buffer and by a variable of the module, none of which has to change its identity."""

    def __init__(self):
        super().__init__()
        self.config, self.nested = Config(), {"inner": {"act": True}}
        self.register_buffer("flag", torch.tensor(True))

    def middle(self, h):
        deep = self.config.act and self.nested["inner"]["act"] and bool(self.flag) and SWITCH["act"]
        return self.second(h) if deep else h


SWITCH = {"act": True}


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module.config, "act", False),
        lambda module: module.nested["inner"].update(act=False),
        lambda module: module.flag.fill_(False),
        lambda module: SWITCH.update(act=False),
    ],
    ids=["object", "nested", "buffer", "variable"],
)
def test_a_network_is_read_again_at_each_call(change):
    module = seeded(Configured)
    gradients(module, unrolled_sgd, engine="fused")
    try:
        change(module)
        assert_same(gradients(module, unrolled_sgd), gradients(module, unrolled_sgd_full_graph))
    finally:
        SWITCH.update(act=True)


class Meter:
    count = 0


class CounterInAnObject(Base):
    def __init__(self):
        super().__init__()
        self.meter = Meter()

    def middle(self, h):
        self.meter.count += 1
        return self.second(h) if self.meter.count < 3 else h


class BufferThatDecides(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def middle(self, h):
        self.calls += 1
        return self.second(h) if int(self.calls) < 3 else h


class Passing(torch.autograd.Function):
    """The first derivative is that of the identity; the second is none."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g.detach()


class PassedOn(Base):
    def middle(self, h):
        return Passing.apply(self.second(h))


@pytest.mark.parametrize(
    "make, reason",
    [
        (CounterInAnObject, "changes its attribute meter"),
        (BufferThatDecides, "changes its buffer calls"),
        (PassedOn, "autograd.Function of its own"),
    ],
)
def test_what_torch_fx_cannot_see_is_found(make, reason):
    choice = sm.explain_engine(seeded(make), torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert choice.name == "autograd" and reason in choice.reason, choice
    assert_same(gradients(seeded(make), unrolled_sgd), gradients(seeded(make), unrolled_sgd_full_graph))


class Checkpointed(Base):
    """The sizes keep the fused engine away."""

    reentrant = False

    def middle(self, h):
        if len(h) == 0:
            return h
        return checkpoint(lambda t: self.norm(F.silu(self.second(t))), h, use_reentrant=self.reentrant)


class NotCheckpointed(Base):
    def middle(self, h):
        return self.norm(F.silu(self.second(h)))


@pytest.mark.parametrize("keep", ["nothing", "activations"])
def test_checkpoints_inside_see_the_parameters_of_their_step(keep):
    expected = gradients(seeded(NotCheckpointed), unrolled_sgd_full_graph)
    assert_same(gradients(seeded(Checkpointed), unrolled_sgd, keep=keep), expected)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g


class Aligned(Base):
    def middle(self, h):
        boxes = torch.tensor([[i, 0, 0, 7, 7] for i in range(len(h))], dtype=h.dtype)
        return roi_align(self.second(h), boxes, 4)


class Bag(Base):
    def middle(self, h):
        return h + F.embedding_bag(torch.tensor([[0, 1]]), self.head.weight.T).mean()


class OnceOnly(Base):
    def middle(self, h):
        return Once.apply(self.second(h))


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.parametrize(
    "make, reason",
    [
        (Aligned, "roi_align"),
        (Bag, "embedding_bag"),
        (OnceOnly, "once_differentiable"),
        (Reentrant, "use_reentrant=False works"),
    ],
)
def test_what_torch_cannot_differentiate_twice_is_named(make, reason):
    with pytest.raises(NotImplementedError, match=f"no gradient of its gradient.*{reason}"):
        gradients(seeded(make), unrolled_sgd)


class Clipped(Base):
    def middle(self, h):
        with torch.no_grad():
            self.second.weight.clamp_(-0.1, 0.1)
        return self.second(h)


def test_a_forward_that_changes_its_parameters_is_refused():
    with pytest.raises(ValueError, match="model changes its parameters in its forward"):
        gradients(seeded(Clipped), unrolled_sgd)


HIDDEN = {"calls": 0}


class HiddenState(Base):
    def middle(self, h):
        HIDDEN["calls"] += 1
        return self.second(h) * HIDDEN["calls"]


def test_state_that_cannot_be_put_back_is_noticed():
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert "changes an attribute of a class" in sm.explain_engine(seeded(CounterOfTheClass), images).reason
    with pytest.raises(RuntimeError, match="computes something else when a step is repeated.*keep="):
        gradients(seeded(HiddenState), unrolled_sgd, engine="autograd")
    HIDDEN["calls"] = 0
    expected = gradients(seeded(HiddenState), unrolled_sgd_full_graph)
    HIDDEN["calls"] = 0
    assert_same(gradients(seeded(HiddenState), unrolled_sgd, engine="autograd", keep="activations"), expected)


class SignedByHiddenState(Base):
    """Its gradient has another sign in each call and always the same length."""

    def forward(self, x):
        HIDDEN["calls"] += 1
        logits = super().forward(x)
        return logits if HIDDEN["calls"] % 3 else -logits


def test_another_gradient_of_the_same_length_is_noticed():
    """Where all parameters are zero, the other sign of the logits gives the other sign of the gradient."""
    HIDDEN["calls"] = 0
    module = seeded(SignedByHiddenState)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    start = flatten(module.parameters()).detach().requires_grad_()
    images, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    theta = unrolled_sgd(module, start, images, labels, [torch.arange(3)] * 2, 0.0, engine="autograd")
    with pytest.raises(RuntimeError, match="computes something else when a step is repeated"):
        theta.sum().backward()


def test_hard_sigmoid_has_a_second_derivative():
    x = torch.linspace(-4, 4, 10, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(F.hardsigmoid, x) and torch.autograd.gradgradcheck(F.hardsigmoid, x)
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-4, 4, 1001, dtype=dtype).requires_grad_()
        first = torch.autograd.grad(F.hardsigmoid(x).sum(), x)[0]
        assert torch.equal(torch.autograd.grad(F.hardsigmoid(x).sum(), x, create_graph=True)[0], first)


PARTS = ("plain", "no grad", "eval norm", "norm", "torch", "python", "numpy", "dropout", "replaced", "hook", "shared")
PARTS += ("sum", "broadcast", "product", "detach", "counter", "swish", "pool")


class Random(nn.Module):
    """A network of parts in any order, each of which does one of the things that this file is about."""

    def __init__(self, parts):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, CLASSES)
        self.parts, self.calls = list(parts), 0
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in parts)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if i % 2 else nn.GroupNorm(2, 4) for i in range(len(self.parts)))
        for part, layer, norm in zip(self.parts, self.layers, self.norms, strict=True):
            if part == "replaced":
                layer.forward = functools.partial(lambda kind, m, x: 2 * kind.forward(m, x), nn.Conv2d, layer)
            elif part == "hook":
                norm.register_forward_hook(lambda m, inputs, output: output + inputs[0])
            elif part == "shared":
                layer.weight = self.layers[0].weight

    def train(self, mode=True):
        super().train(mode)
        for part, norm in zip(self.parts, self.norms, strict=True):
            if part == "eval norm":
                norm.eval()
        return self

    def forward(self, x):
        h = self.first(x)
        for part, layer, norm in zip(self.parts, self.layers, self.norms, strict=True):
            h = F.silu(getattr(self, f"_{part.replace(' ', '_')}", self._plain)(h, layer, norm))
        return self.head(h.mean((2, 3)))

    def _plain(self, h, layer, norm):
        return norm(layer(h))

    def _no_grad(self, h, layer, norm):
        with torch.no_grad():
            h = layer(h)
        return norm(h)

    def _torch(self, h, layer, norm):
        return h + layer(h) if torch.rand(()) < 0.5 else norm(h)

    def _python(self, h, layer, norm):
        return h + layer(h) if random.random() < 0.5 else norm(h)

    def _numpy(self, h, layer, norm):
        return h + layer(h) if np.random.rand() < 0.5 else norm(h)

    def _dropout(self, h, layer, norm):
        return F.dropout(layer(h), 0.3)

    def _sum(self, h, layer, norm):
        return h + norm(layer(h))

    def _broadcast(self, h, layer, norm):
        return h + F.adaptive_avg_pool2d(layer(h), 1)

    def _product(self, h, layer, norm):
        return h * torch.sigmoid(layer(h))

    def _detach(self, h, layer, norm):
        return norm(h + layer(h).detach())

    def _counter(self, h, layer, norm):
        self.calls += 1
        return layer(h) / self.calls

    def _pool(self, h, layer, norm):
        return F.interpolate(F.avg_pool2d(layer(h), 2), scale_factor=2.0)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4))
def test_random_networks(parts):
    expected = gradients(seeded(lambda: Random(parts)), unrolled_sgd_full_graph)
    for engine in ("auto", "autograd"):
        assert_same(gradients(seeded(lambda: Random(parts)), unrolled_sgd, engine=engine), expected)
    plain = seeded(lambda: Random(parts)).float()
    trained, x = copy.deepcopy(plain), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for module, run in ((plain, plain), (trained, fast(trained, x))):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(6)
        F.cross_entropy(run(x), torch.arange(6) % CLASSES).backward()
        results.append([p.grad for p in module.parameters()] + list(module.buffers()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
