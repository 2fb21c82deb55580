"""What the operations take, as public code has it: lists of any kind, None among gradients, seeds, saved tables."""

import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import reference
import torch
from torch.func import grad, jvp, vmap

import selmatch_ext as sm

ALL = "color_crop_cutout_flip_scale_rotate"
METRICS = ("layerwise", "mse", "cos")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def parameters(seed):
    return [normal(4, 3, 2, seed=seed), normal(5, seed=seed + 1)]


X = normal(6, 3, 8, 9, dtype=torch.float32)
TABLE = sm.sample_augmentation(6, 8, 9, per_sample=True, generator=seeded())


# --- containers -------------------------------------------------------------------------------------------------------


def containers(tensors, order=1):
    named = list(zip("ab", tensors, strict=True))[::order]
    return {
        "tuple": tuple(tensors),
        "generator": (x for x in tensors),
        "ParameterList": torch.nn.ParameterList(tensors),
        "dict": dict(named),
        "OrderedDict": OrderedDict(named),
        "ParameterDict": torch.nn.ParameterDict(dict(named)),
        "values of a dict": dict(zip("ab", tensors, strict=True)).values(),
    }


@pytest.mark.parametrize("name", containers(parameters(0)))
def test_containers_of_tensors(name):
    """Dicts are compared name by name, whatever their order."""
    lists = [parameters(s) for s in (1, 3, 5)]
    given = [containers(tensors, order)[name] for tensors, order in zip(lists, (1, -1, 1), strict=True)]
    assert torch.equal(sm.trajectory_distance(*given), sm.trajectory_distance(*lists))
    syn, real = (containers(tensors, order)[name] for tensors, order in zip(lists[:2], (1, -1), strict=True))
    assert torch.equal(sm.gradient_distance(syn, real), sm.gradient_distance(*lists[:2]))


def test_parameters_of_networks():
    networks = [torch.nn.Linear(3, 4) for _ in range(3)]
    value = sm.trajectory_distance(*(net.parameters() for net in networks))
    value.backward()
    assert all(p.grad.isfinite().all() for net in networks for p in net.parameters())
    states = [net.state_dict() for net in networks]
    assert torch.equal(sm.trajectory_distance(*states), value)
    with pytest.raises(TypeError, match="got tuple at position 0"):
        sm.trajectory_distance(*(net.named_parameters() for net in networks))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (({"a": X}, {"b": X}), ValueError, "the same names; only one has 'a'"),
        (({"a": X}, {"a": X, "b": X}), ValueError, "the same names; only one has 'b'"),
        (("ab", "ab"), TypeError, "must be a .* got str"),
        (([X], 3), TypeError, "must be a .* got int"),
        (([X], [[X]]), TypeError, "must be a .* got list at position 0"),
        (([X], np.zeros(1)), TypeError, "must be a .* got float64 at position 0"),
        ((iter([]), iter([])), ValueError, "has no tensors"),
    ],
)
def test_bad_containers(given, error, message):
    with pytest.raises(error, match=message):
        sm.gradient_distance(*given)
    with pytest.raises(error, match=message):
        sm.trajectory_distance(*given, given[1])


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_none_among_gradients_is_zero(metric, transformed):
    a, b, c = normal(3, 4, seed=1), normal(2, 5, seed=2), normal(6, seed=3)
    syn, real = [a, None, c, None], [a + 1, b, None, None]
    expected = reference.gradient_distance([a, torch.zeros_like(b), c], [a + 1, b, torch.zeros_like(c)], metric)
    if transformed:
        value = vmap(lambda x: sm.gradient_distance([x, *syn[1:]], real, metric))(a[None])[0]
    else:
        value = sm.gradient_distance(syn, real, metric)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)


def test_none_of_unused_parameters():
    """As torch.autograd.grad gives it; and the gradient passes through the others."""
    used, unused, x = (normal(3, 2, seed=s).requires_grad_() for s in range(3))
    syn = torch.autograd.grad((used * x).square().sum(), [used, unused], create_graph=True, allow_unused=True)
    assert syn[1] is None
    (gradient,) = torch.autograd.grad(sm.gradient_distance(syn, [normal(3, 2, seed=4), None]), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("syn", "real", "error", "message"),
    [
        ([None], [None], ValueError, "no tensors, only None"),
        ([X, None], [X], ValueError, "syn has 2 tensors, real 1"),
    ],
)
def test_bad_nones(syn, real, error, message):
    with pytest.raises(error, match=message):
        sm.gradient_distance(syn, real)
    with pytest.raises(TypeError, match="got NoneType at position"):
        sm.trajectory_distance([X, None], [X, X], [X, X])


# --- augmentations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor], ids=lambda kind: kind.__name__)
def test_seeds_of_any_integer_kind(kind):
    assert torch.equal(sm.DiffAugment(X, ALL, kind(7)), sm.DiffAugment(X, ALL, 7))


def test_minus_one_of_any_integer_kind():
    results = []
    for seed in (-1, np.int32(-1), torch.tensor(-1)):
        torch.manual_seed(2)
        results.append(sm.DiffAugment(X, ALL, seed))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("seed", [1.5, "1", None, torch.tensor(1.5)])
def test_seeds_that_are_no_integers(seed):
    with pytest.raises(TypeError, match="seed must be an integer, got"):
        sm.DiffAugment(X, ALL, seed)


def test_the_default_strategy_is_the_public_codes():
    assert sm.DiffAugment(X) is X
    assert sm.DiffAugment(X, seed=3, param=sm.ParamDiffAug()) is X


def test_params_that_require_a_gradient_are_refused():
    p, x = TABLE, X
    leaf = p.params.clone().requires_grad_()
    with pytest.raises(ValueError, match="with respect to the images only.*detach"):
        sm.augment(x, sm.Augmentation(p.ops, leaf))
    with pytest.raises(ValueError, match="with respect to the images only"):
        grad(lambda params: sm.augment(x, sm.Augmentation(p.ops, params)).sum())(p.params)
    with pytest.raises(RuntimeError, match="with respect to the images only"):
        jvp(lambda params: sm.augment(x, sm.Augmentation(p.ops, params)), (p.params,), (p.params,))
    with pytest.raises(RuntimeError, match="with respect to the images only"):
        jvp(lambda x, params: sm.augment(x, sm.Augmentation(p.ops, params)), (x, p.params), (x, p.params))
    strength = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="with respect to the images only"):
        sm.DiffAugment(x, "color", 0, sm.ParamDiffAug(brightness=strength))
    with torch.no_grad():
        assert torch.equal(sm.augment(x, sm.Augmentation(p.ops, leaf)), sm.augment(x, p))


LOAD = """
import sys, torch, selmatch_ext as sm
p, x = torch.load(sys.argv[1], weights_only=True)
assert type(p) is sm.Augmentation
torch.save(sm.augment(x, p), sys.argv[1])
"""


def test_a_saved_augmentation_loads_as_weights(tmp_path):
    path = tmp_path / "table.pt"
    torch.save((TABLE, X), path)
    subprocess.run([sys.executable, "-c", LOAD, str(path)], check=True)
    assert torch.equal(torch.load(path, weights_only=True), sm.augment(X, TABLE))


def test_the_default_generator_keeps_the_draws_of_the_public_code():
    """The loop in the documentation of sample_augmentation, against the public code's order: batch, then images."""
    images, param = normal(20, 3, 8, 8, dtype=torch.float32), sm.ParamDiffAug()

    def draws():
        torch.manual_seed(11)
        chunks = []
        for _ in range(7):
            if not chunks:
                chunks = list(torch.randperm(len(images)).split(8))
            yield chunks.pop()

    expected = [(batch, reference.DiffAugment(images[batch], ALL, -1, param)) for batch in draws()]
    state = torch.get_rng_state()
    batches, tables = [], []
    for batch in draws():
        batches.append(batch)
        size = (len(batch), *images.shape[2:])
        tables.append(sm.sample_augmentation(*size, ALL, generator=torch.default_generator))
    assert torch.equal(torch.get_rng_state(), state)
    for batch, p, (public_batch, public_images) in zip(batches, tables, expected, strict=True):
        assert torch.equal(batch, public_batch)
        torch.testing.assert_close(sm.augment(images[batch], p), public_images, rtol=3e-5, atol=3e-5)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    start, lr, labels = torch.zeros(772), torch.tensor(0.1), torch.arange(20) % 4
    student = sm.unrolled_sgd(network, start, images, labels, batches, lr, augmentations=tables)
    theta = start.clone().requires_grad_()
    for batch, x in expected:
        logits = x.flatten(1) @ theta[:768].view(4, 192).T + theta[768:]
        theta = theta - lr * torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels[batch]), theta)[0]
    torch.testing.assert_close(student, theta, rtol=1e-4, atol=1e-5)
