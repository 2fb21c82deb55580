"""Copies of a network share nothing with it that a call may change, functions run on the copy that they belong to, and
nothing that is remembered of a network keeps it alive."""

import functools
import gc
import random
import types
import weakref

import numpy as np
import pytest
import torch
from given_networks import Base, assert_same, gradients, seeded
from reference import unrolled_sgd_full_graph
from torch import nn
from torch.nn import functional as F

import selmatch_ext as sm
from selmatch_ext.models.batchnorm import refuses_one_image
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


class Holding(Base):
    """Refers to itself, in ways that a dictionary of what is known must not."""

    def __init__(self):
        super().__init__()
        self.parts, self.named, self.own = [self], {"me": {"again": (self,)}}, types.SimpleNamespace(net=self)


def forward_of_a_class_inside():
    module = Base()

    class Inside(Base):
        def forward(self, x):
            return super().forward(x) if module is not None else None

        @property
        def outside(self):
            return module

    module = Inside()
    return module


@pytest.mark.parametrize("make", [Base, Holding, forward_of_a_class_inside])
def test_nothing_that_is_known_keeps_a_network_alive(make):
    module = seeded(make)
    for _ in range(2):
        sm.explain_engine(module, torch.randn(4, 3, 8, 8, dtype=torch.float64))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


class EqualToAll(Base):
    def __eq__(self, other):
        return isinstance(other, EqualToAll)

    def __hash__(self):
        return 7


class WithoutGradients(EqualToAll):
    def middle(self, h):
        return self.second(h).detach()


def test_networks_that_are_equal_are_not_the_same():
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    modules = seeded(EqualToAll), seeded(WithoutGradients)
    assert modules[0] == modules[1]
    for _ in range(2):
        assert [sm.explain_engine(m, images).name for m in modules] == ["fused", "autograd"]
    assert_same(gradients(modules[0], unrolled_sgd), gradients(modules[0], unrolled_sgd_full_graph))


class Unhashable(Base):
    def __eq__(self, other):
        return self is other


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, lambda m: nn.Sequential(nn.Sequential(m))])
def test_a_network_without_a_hash_is_refused_in_a_sentence(wrap):
    """torch cannot list its parameters either."""
    module = wrap(Unhashable())
    with pytest.raises(TypeError, match="unhashable"):
        list(module.parameters())
    with pytest.raises(TypeError, match="^model holds a module of class Unhashable, which defines __eq__ without") as e:
        sm.explain_engine(module, torch.randn(4, 3, 8, 8))
    assert "\n" not in str(e.value)


# --- functions that refer to the network ------------------------------------------------------------------------------


def recursive():
    module = Base()

    def applied(h, times):
        return applied(module.second(h), times - 1) if times else h

    module.middle = lambda h: applied(h, 2)
    return module


def mutually_recursive():
    module = Base()

    def even(h, times):
        return odd(module.second(h), times - 1) if times else h

    def odd(h, times):
        return even(F.silu(h), times - 1) if times else h

    module.middle = functools.partial(even, times=3)
    return module


def with_an_empty_cell():
    module = Base()

    def forward(h):
        return module.second(h) if len(h) else later

    module.middle = forward
    if module is None:
        later = 0
    return module


def by_a_container():
    module = Base()
    layers = [module.second, {"again": (module.second,)}]
    module.middle = lambda h: layers[1]["again"][0](layers[0](h))
    return module


def in_a_container():
    module = Base()
    module.steps = [lambda h: module.second(h), {"then": (lambda h: module.second(h) + h,)}]
    module.middle = lambda h: module.steps[1]["then"][0](module.steps[0](h))
    return module


def by_an_object():
    module = Base()
    owner = types.SimpleNamespace(net=module)
    module.middle = lambda h, *, of=owner: of.net.second(h)
    return module


def by_a_cached_function():
    module = Base()

    @functools.lru_cache
    def layer(number):
        return module.second if number else None

    layer(1)
    module.middle = lambda h: layer(1)(h)
    return module


def by_a_weak_reference():
    module = Base()
    module.parent = [weakref.ref(module)]
    module.middle = lambda h: module.parent[0]().second(h)
    return module


def by_a_global_of_an_inner_function():
    GLOBAL["net"] = module = Base()
    module.middle = lambda h: (lambda t: GLOBAL["net"].second(t))(h)
    return module


GLOBAL = {}
FUNCTIONS = [recursive, mutually_recursive, with_an_empty_cell, by_a_container, in_a_container, by_an_object]
FUNCTIONS += [by_a_global_of_an_inner_function, by_a_cached_function, by_a_weak_reference]


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_functions_of_a_network_run_on_its_copy(make):
    expected = gradients(seeded(make), unrolled_sgd_full_graph)
    for engine in ("auto", "autograd"):
        assert_same(gradients(seeded(make), unrolled_sgd, engine=engine), expected)


def test_what_no_copy_can_replace_is_refused():
    """A copy of a class is the class."""
    module = Base()

    class Place:
        net = module

    module.middle = lambda h: Place.net.second(h)
    with pytest.raises(TypeError, match="^model, a Base, cannot be copied .* by way of <class .*, which stays"):
        sm.explain_engine(module, torch.randn(4, 3, 8, 8))


# --- parameters that are held in more places than their module --------------------------------------------------------


def conv(h, weight, module):
    return F.conv2d(h, weight, module.second.bias, padding=1)


def in_a_list():
    module = Base()
    module.weights = [{"second": module.second.weight}]
    module.middle = lambda h: conv(h, module.weights[0]["second"], module)
    return module


def in_an_object():
    module = Base()
    module.kept = types.SimpleNamespace(weight=module.second.weight)
    module.middle = lambda h: conv(h, module.kept.weight, module)
    return module


def in_a_function():
    module = Base()
    weight = module.second.weight
    module.middle = lambda h, *, again=weight: conv(h, (weight + again) / 2, module)
    return module


def in_a_partial_function():
    module = Base()
    module.middle = functools.partial(conv, weight=module.second.weight, module=module)
    return module


def in_a_tuple():
    module = Base()
    module.weights = (module.second.weight,)
    module.middle = lambda h: conv(h, module.weights[0], module)
    return module


@pytest.mark.parametrize("make", [in_a_list, in_an_object, in_a_function, in_a_partial_function])
@pytest.mark.parametrize("keep", ["nothing", "activations", "all"])
def test_a_parameter_is_the_same_in_all_its_places(make, keep):
    expected = gradients(seeded(Base), unrolled_sgd_full_graph)
    assert_same(gradients(seeded(make), unrolled_sgd, keep=keep), expected)


def test_a_parameter_that_cannot_be_replaced_is_refused_where_it_is_used():
    with pytest.raises(
        TypeError, match="^model holds its parameter second.weight in a tuple or the like, where no other"
    ):
        gradients(seeded(in_a_tuple), unrolled_sgd)
    module = seeded(Base)
    module.weights, module.listed = tuple(module.parameters()), list(module.parameters())  # which forward does not read
    assert_same(gradients(module, unrolled_sgd, engine="fused"), gradients(seeded(Base), unrolled_sgd_full_graph))
    assert_same(gradients(module, unrolled_sgd, engine="autograd"), gradients(seeded(Base), unrolled_sgd_full_graph))


# --- BatchNorm and a single image -------------------------------------------------------------------------------------


class DrawsAndCounts(Base):
    def middle(self, h):
        random.random(), np.random.rand(), torch.rand(())
        return self.norm(F.adaptive_avg_pool2d(h, 1))


def old_weight_norm():
    module = DrawsAndCounts()
    module.second = nn.utils.weight_norm(module.second)
    module.second(torch.randn(1, 6, 4, 4))  # leaves a weight that copy.deepcopy refuses
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [DrawsAndCounts, old_weight_norm])
def test_whether_a_network_refuses_one_image_is_asked_without_a_trace(make):
    module = make().eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert refuses_one_image(module, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert not module.training and module.norm.num_batches_tracked == 0
