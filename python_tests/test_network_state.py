"""State that a network keeps where Python lets it: nested containers and objects, classes, functions, submodules; and
that nothing which is remembered of a network keeps it alive."""

import collections
import dataclasses
import functools
import gc
import random
import types
import weakref

import numpy as np
import pytest
import torch
from reference import unrolled_sgd_full_graph
from test_given_networks import Base, assert_same, gradients, seeded
from test_unroll import one_thread  # noqa: F401  (a fixture)
from torch import nn
from torch.nn import functional as F

import selmatch_ext as sm
from selmatch_ext.models.objects import LIMIT
from selmatch_ext.models.statistics import refuses_one_image
from selmatch_ext.unroll import unrolled_sgd
from selmatch_ext.unroll.private import PrivateModel
from selmatch_ext.unroll.state import State

CPU = torch.device("cpu")


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    counts: dict


class Registry(dict):
    """A container with attributes of its own."""


class Stateful(Base):
    """Multiplies by a number that its state says, which differs from call to call."""

    def __init__(self):
        super().__init__()
        self.reset()

    def middle(self, h):
        return self.second(h) * (1 + 0.3 * self.count(h))


class ListInDictionary(Stateful):
    def reset(self):
        self.stats = {"a": []}

    def count(self, h):
        self.stats["a"].append(len(h))
        return len(self.stats["a"])


class ListOfLists(Stateful):
    def reset(self):
        self.stats = [[0], [[0]]]

    def count(self, h):
        self.stats[1][0][0] += 1
        return self.stats[1][0][0]


class ObjectInObject(Stateful):
    def reset(self):
        self.cfg = types.SimpleNamespace(counter=types.SimpleNamespace(n=0))

    def count(self, h):
        self.cfg.counter.n += 1
        return self.cfg.counter.n


class ObjectWithSlots(Stateful):
    def reset(self):
        self.kept = (Slotted(),)

    def count(self, h):
        self.kept[0].n += 1
        return self.kept[0].n


class InAFrozenObject(Stateful):
    def reset(self):
        self.kept = Frozen(collections.Counter())

    def count(self, h):
        self.kept.counts["calls"] += 1
        return self.kept.counts["calls"]


class InOtherContainers(Stateful):
    def reset(self):
        self.kept = collections.defaultdict(list), collections.UserDict(), collections.deque([0], maxlen=1)
        self.kept[1]["set"] = set()

    def count(self, h):
        found, named, last = self.kept
        found["a"].append(0)
        named["set"].add(len(found["a"]))
        last.append(len(named["set"]))
        return last[0]


class InAContainerWithAttributes(Stateful):
    def reset(self):
        self.kept = Registry(a=Registry())
        self.kept["a"].n = 0

    def count(self, h):
        self.kept["a"].n += 1
        return self.kept["a"].n


class NestedTensors(Stateful):
    """One tensor in two places, replaced in each call, and an array that is changed in place."""

    def reset(self):
        total = torch.zeros((), dtype=torch.float64)
        self.kept = {"pair": (total, [total]), "array": [np.zeros(2)]}

    def count(self, h):
        total = self.kept["pair"][1][0]
        total += h.detach().square().mean()
        self.kept["pair"] = self.kept["pair"][0] + 0, [total]
        self.kept["array"][0][1] += 1
        return self.kept["pair"][0].item() + self.kept["array"][0][1]


class NestedGenerators(Stateful):
    def reset(self):
        self.kept = {"python": [random.Random(3)], "numpy": [np.random.default_rng(3)]}
        self.kept["torch"] = [torch.Generator().manual_seed(3)]

    def count(self, h):
        draws = self.kept["python"][0].random(), self.kept["numpy"][0].random()
        return sum(draws) + torch.rand((), generator=self.kept["torch"][0]).item()


class Circular(Stateful):
    def reset(self):
        self.kept = [0, self]
        self.kept.append(self.kept)

    def count(self, h):
        self.kept[2][1].kept[2][0] += 1
        return self.kept[0]


class Callable:
    def __init__(self):
        self.n = 0

    def __call__(self, h):
        self.n += 1
        return self.n


class CallableObject(Stateful):
    def reset(self):
        self.counting = Callable()

    def count(self, h):
        return self.counting(h)


class ModuleInAList(Stateful):
    """A module that is not registered; its own norm's statistics are its state."""

    def reset(self):
        self.hidden = [nn.BatchNorm2d(6).double()]

    def count(self, h):
        self.hidden[0](h.detach())
        return self.hidden[0].running_mean.mean().item()


class SubmoduleAtFirst(Stateful):
    """Registers a submodule, a buffer and a parameter in its first call, with weights that it draws."""

    def reset(self):
        self.calls = 0

    def count(self, h):
        if not hasattr(self, "late"):
            self.late = nn.Conv2d(6, 6, 1).double().requires_grad_(False)
            self.register_buffer("shift", torch.rand((), dtype=torch.float64))
            self.factor = nn.Parameter(torch.rand((), dtype=torch.float64), requires_grad=False)
        self.calls += 1
        return self.calls + self.late(h.detach()).mean() + self.shift + self.factor


class OfTheClass(Stateful):
    history = [0]
    table = {"calls": [0]}
    calls = 0
    total = torch.zeros(2)

    def reset(self):
        OfTheClass.history, OfTheClass.table, OfTheClass.calls = [0], {"calls": [0]}, 0
        OfTheClass.total = torch.zeros(2)

    def count(self, h):
        type(self).calls += 1
        self.history.append(0)
        self.table["calls"][0] += 1
        self.total += 1
        OfTheClass.late = 1
        return self.calls + len(self.history) + self.table["calls"][0] + self.total[0].item()


class OfAnotherClass(Stateful):
    """The class is an attribute, as some people write their settings."""

    class Settings:
        counts = [0]

    def reset(self):
        self.settings = self.Settings
        self.settings.counts[0] = 0

    def count(self, h):
        self.settings.counts[0] += 1
        return self.settings.counts[0]


KINDS = [ListInDictionary, ListOfLists, ObjectInObject, ObjectWithSlots, InAFrozenObject, InOtherContainers]
KINDS += [InAContainerWithAttributes, NestedTensors, NestedGenerators, Circular, CallableObject, ModuleInAList]
KINDS += [SubmoduleAtFirst, OfTheClass, OfAnotherClass]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_repeated_steps_have_the_state_that_they_had(make):
    expected = gradients(seeded(make), unrolled_sgd_full_graph)
    for keep in ("nothing", "activations"):
        assert_same(gradients(seeded(make), unrolled_sgd, engine="autograd", keep=keep), expected)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_nested_changes_are_seen_and_undone(make):
    module = seeded(make)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = State(module, CPU)
    first = module(x)
    change = before.change(State(module, CPU))
    assert change is not None and "changes" in change or make is SubmoduleAtFirst
    second = module(x)
    assert not torch.equal(first, second)
    before.restore()
    assert before.change(State(module, CPU)) is None
    assert torch.equal(module(x), first) and torch.equal(module(x), second)


class OnlyCounts(Base):
    """What it keeps decides nothing, so that torch.fx reads it."""

    history = {"calls": []}

    def middle(self, h):
        self.history["calls"].append(1)
        return self.second(h)


class CountsInside(Base):
    def __init__(self):
        super().__init__()
        self.stats = {"a": [[]]}

    def middle(self, h):
        self.stats["a"][0].append(1)
        return self.second(h)


def test_a_comparison_leaves_no_trace():
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    reason = sm.explain_engine(seeded(OnlyCounts), images).reason
    assert "changes an attribute of a class, OnlyCounts.history" in reason and OnlyCounts.history == {"calls": []}
    gradients(seeded(OnlyCounts), unrolled_sgd)
    assert OnlyCounts.history == {"calls": []}
    module = seeded(CountsInside)
    assert "changes its attribute stats" in sm.explain_engine(module, images).reason
    gradients(module, unrolled_sgd)
    assert module.stats == {"a": [[]]}


def test_a_state_looks_at_a_limited_number_of_objects():
    module = Base()
    module.many = [[k] for k in range(3 * LIMIT)]
    module.deep = {"near": [0], "far": [[[k]] for k in range(LIMIT)], "array": [np.zeros(10**7)]}
    module.big = np.zeros(10**6)
    state = State(module, CPU)
    assert len(state.records) < 2 * LIMIT
    module.many.pop()
    module.deep["near"][0] = module.big[5] = 1
    module.deep["array"][0][0] = 1  # too large for what is not an attribute itself
    assert state.change(State(module, CPU)) == "changes its attribute many"
    state.restore()
    assert len(module.many) == 3 * LIMIT and module.deep["near"] == [0] and not module.big.any()
    assert module.deep["array"][0][0] == 1


def test_an_unchanged_tensor_is_kept_once():
    module = seeded(NestedTensors)
    module.large = {"a": [torch.zeros(1000)]}
    first = State(module, CPU)
    second = State(module, CPU, first)
    pictures = [state.records[id(module.large["a"])].items[0].values for state in (first, second)]
    assert pictures[0] is pictures[1]


def test_parameters_that_a_module_lists_are_not_copied():
    """As torch's recurrent layers do, in `_flat_weights`."""
    private = PrivateModel(nn.LSTM(3, 5), torch.empty((), dtype=torch.float64))
    parameters = private.split(torch.randn(sum(private.sizes), dtype=torch.float64))
    private(parameters, torch.randn(2, 3, dtype=torch.float64))
    kept = private.state().records[id(private.module._flat_weights)].items
    assert all(a is b for a, b in zip(kept, parameters, strict=True))


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


def by_a_global_of_an_inner_function():
    GLOBAL["net"] = module = Base()
    module.middle = lambda h: (lambda t: GLOBAL["net"].second(t))(h)
    return module


GLOBAL = {}
FUNCTIONS = [recursive, mutually_recursive, with_an_empty_cell, by_a_container, in_a_container, by_an_object]
FUNCTIONS += [by_a_global_of_an_inner_function]


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_functions_of_a_network_run_on_its_copy(make):
    expected = gradients(seeded(make), unrolled_sgd_full_graph)
    for engine in ("auto", "autograd"):
        assert_same(gradients(seeded(make), unrolled_sgd, engine=engine), expected)


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
