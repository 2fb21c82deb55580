"""Networks given to both engines: the one that tests vary, and gradients through it with either engine."""

import functools
import random

import numpy as np
import torch
from reference import unrolled_sgd_full_graph
from test_unroll import CLASSES, Problem
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from selmatch_ext.models.flat import flatten, unflatten


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
