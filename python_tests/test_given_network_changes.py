"""Networks that change between two calls or in a call: read again, taken elsewhere, or refused."""

import pytest
import torch
from given_networks import Base, assert_same, gradients, seeded
from odd_networks import NoGrad
from reference import unrolled_sgd_full_graph
from torch import nn

import selmatch_ext as sm
from selmatch_ext.models.flat import flatten
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_known_of_a_network_is_forgotten_when_it_changes():
    module, images = seeded(Base), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    changes = [
        lambda: setattr(module, "middle", NoGrad.middle.__get__(module)),
        lambda: delattr(module, "middle"),
        lambda: module.second.register_forward_hook(lambda m, inputs, output: 2 * output),
        lambda: module.second._forward_hooks.clear(),
        lambda: setattr(module, "second", nn.Softsign()),
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


class CounterOfTheClass(Base):
    calls = 0

    def middle(self, h):
        type(self).calls += 1
        return self.second(h) if self.calls < 3 else h


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
