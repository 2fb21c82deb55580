"""Both engines compute the network that they are given, whatever Python does around its operations."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
from given_networks import assert_same, gradients, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_networks import NETWORKS, Rounded
from reference import unrolled_sgd_full_graph
from test_unroll import CLASSES
from torch import nn
from torch.nn import functional as F

import selmatch_ext as sm
from selmatch_ext.fused.training import fast
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("make, reason", NETWORKS, ids=[make.__name__ for make, _ in NETWORKS])
def test_the_module_itself_is_computed(make, reason):
    expected = gradients(seeded(make), unrolled_sgd_full_graph)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for keep in ("nothing", "activations", "all"):
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
