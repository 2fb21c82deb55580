"""State that a network keeps where Python lets it: nested containers and objects, classes, functions, submodules."""

import collections
import dataclasses
import functools
import random
import types

import numpy as np
import pytest
import torch
from given_networks import Base, assert_same, gradients, seeded
from reference import unrolled_sgd_full_graph
from torch import nn

import selmatch_ext as sm
from selmatch_ext.modules.objects import LIMIT
from selmatch_ext.modules.private import PrivateModel
from selmatch_ext.modules.state import ModuleState
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")

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


class VariableOfAFunction(Stateful):
    def reset(self):
        calls, box = 0, [0]

        def counting():
            nonlocal calls
            calls += 1
            box[0] += 1
            return calls + box[0]

        self.counting = functools.lru_cache(maxsize=0)(counting)

    def count(self, h):
        return self.counting()


class DefaultOfAMethod(Stateful):
    def reset(self):
        DefaultOfAMethod.count.__defaults__[0].clear()
        DefaultOfAMethod.count.calls = 0

    def count(self, h, seen=[]):  # noqa: B006  (a default that keeps state is the case)
        seen.append(0)
        DefaultOfAMethod.count.calls += 1
        return len(seen) + DefaultOfAMethod.count.calls


class HookThatCounts(Stateful):
    """An object that is a hook, and another hook that the first call adds."""

    def reset(self):
        counting = Callable()
        self.norm.register_forward_hook(lambda m, inputs, output: output * counting(output))

    def count(self, h):
        if not hasattr(self, "hooked"):
            self.hooked = self.second.register_forward_hook(lambda m, inputs, output: 2 * output)
        return self.norm(h).mean()


KINDS = [ListInDictionary, ListOfLists, ObjectInObject, ObjectWithSlots, InAFrozenObject, InOtherContainers]
KINDS += [InAContainerWithAttributes, NestedTensors, NestedGenerators, Circular, CallableObject, ModuleInAList]
KINDS += [SubmoduleAtFirst, OfTheClass, OfAnotherClass, VariableOfAFunction, DefaultOfAMethod, HookThatCounts]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_repeated_steps_have_the_state_that_they_had(make):
    expected = gradients(seeded(make), unrolled_sgd_full_graph)
    for keep in ("nothing", "activations", "all"):
        assert_same(gradients(seeded(make), unrolled_sgd, engine="autograd", keep=keep), expected)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_nested_changes_are_seen_and_undone(make):
    module = seeded(make)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = ModuleState(module, CPU)
    first = module(x)
    change = before.change(ModuleState(module, CPU))
    assert change is not None and "changes" in change or make is SubmoduleAtFirst
    second = module(x)
    assert not torch.equal(first, second)
    before.restore()
    assert before.change(ModuleState(module, CPU)) is None
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
    state = ModuleState(module, CPU)
    assert len(state.records) < 2 * LIMIT
    module.many.pop()
    module.deep["near"][0] = module.big[5] = 1
    module.deep["array"][0][0] = 1  # too large for what is not an attribute itself
    assert state.change(ModuleState(module, CPU)) == "changes its attribute many"
    state.restore()
    assert len(module.many) == 3 * LIMIT and module.deep["near"] == [0] and not module.big.any()
    assert module.deep["array"][0][0] == 1


def test_an_unchanged_tensor_is_kept_once():
    module = seeded(NestedTensors)
    module.large = {"a": [torch.zeros(1000)]}
    first = ModuleState(module, CPU)
    second = ModuleState(module, CPU, first)
    pictures = [state.records[id(module.large["a"])].items[0].values for state in (first, second)]
    assert pictures[0] is pictures[1]


def test_parameters_that_a_module_lists_are_not_copied():
    """As torch's recurrent layers do, in `_flat_weights`."""
    private = PrivateModel(nn.LSTM(3, 5), torch.empty((), dtype=torch.float64))
    parameters = private.split(torch.randn(sum(private.sizes), dtype=torch.float64))
    private(parameters, torch.randn(2, 3, dtype=torch.float64))
    kept = private.state().records[id(private.module._flat_weights)].items
    assert len(kept) == len(parameters) and all(picture.values is None for picture in kept)
