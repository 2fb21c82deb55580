"""Networks around whose operations Python does something, and why the fused engine does not take each of them."""

import functools
import random
import types

import numpy as np
import torch
from given_networks import Base
from test_unroll import CLASSES
from torch import nn
from torch.nn import functional as F


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
    (Excited, None),
    (LinearOnMap, r"linear layer \(mix.weight\) on a map"),
    (HardSwishes, "no rule for add of 1"),
    (SharedAndScaled, "no rule for the tensor scale"),
    (OldWeightNorm, "second has hooks"),
    (SpectralNorm, "no rule for"),
    (Rounded, "autocast"),
    (Attention, "no rule for|cannot read"),
    (ConstantBranch, None),
    (Base, None),
]
