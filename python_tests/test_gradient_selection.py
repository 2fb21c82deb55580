"""CRAIG and GradMatch against exhaustive search, plain loops and scipy's non-negative least squares."""

import math

import numpy as np
import pytest
import reference_selection as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from selmatch_ext.seeds import generator
from selmatch_ext.selection.gradients import (
    LastLayer,
    craig,
    facility_location,
    gradmatch,
    nonnegative_solution,
    pursuit,
)

SEEDS = st.integers(0, 2**32 - 1)


def problem(counts=(9, 6, 7), width=4, seed=0):
    """Logits, features and labels of a few images, in mixed order."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=g)]
    return torch.randn(len(labels), len(counts), generator=g), torch.rand(len(labels), width, generator=g), labels


def distances_of(gradients):
    return (gradients[:, None] - gradients[None]).norm(dim=2).numpy()


def test_inner_products_and_distances_are_those_of_the_gradients_by_autograd():
    logits, features, labels = problem()
    gradients = LastLayer.of(logits, features, labels)
    plain = reference.last_layer_gradients(logits, features, labels)
    for label in range(3):
        members = (labels == label).nonzero().squeeze(1)
        mine = plain[members]
        np.testing.assert_allclose(gradients.products(members), (mine @ mine.T).numpy(), rtol=1e-12, atol=1e-14)
        own = reference.own_row(mine, label, 3)
        np.testing.assert_allclose(gradients.products(members, "own"), (own @ own.T).numpy(), rtol=1e-12, atol=1e-14)


def test_gradients_of_confident_images_are_not_rounded_to_zero():
    logits = torch.tensor([[60.0, 0, 0], [50, 0, 0]])
    gradients = LastLayer.of(logits, torch.ones(2, 1), torch.tensor([0, 0]))
    assert torch.allclose(gradients.errors[:, 0], -2 * torch.tensor([-60.0, -50]).double().exp(), rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 8), st.sampled_from([2, 5, 1000]), st.data())
def test_lazy_greedy_is_full_greedy_and_keeps_its_bound(seed, size, levels, data):
    count = data.draw(st.integers(1, size))
    points = np.random.default_rng(seed).integers(levels, size=(size, 2)).astype(float)  # few levels: ties, duplicates
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    chosen = facility_location(distances, count)
    assert chosen == reference.full_greedy(distances, count) and len(set(chosen)) == count
    best = reference.best_facility(distances, count)
    assert reference.facility(distances, chosen) >= (1 - 1 / math.e) * best - 1e-9


def test_lazy_greedy_on_a_larger_problem():
    points = np.random.default_rng(0).normal(size=(150, 3))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    assert facility_location(distances, 40) == reference.full_greedy(distances, 40)


def test_craig_by_the_gradients_of_autograd():
    logits, features, labels = problem()
    indices, weights = craig(LastLayer.of(logits, features, labels), 3)
    plain, counts = reference.last_layer_gradients(logits, features, labels), []
    for label, mine in enumerate(indices.view(3, 3)):
        members = (labels == label).nonzero().squeeze(1)
        distances = distances_of(plain[members])
        expected = reference.full_greedy(distances, 3)
        assert mine.tolist() == members[expected].tolist()
        counts += reference.assigned(distances, expected)
    assert sum(counts) == len(labels) and weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(counts) * len(counts) / len(labels))


def test_craig_with_equal_gradients_whole_classes_and_one_image():
    labels = torch.tensor([0, 1, 0, 1, 0])
    same = LastLayer.of(torch.zeros(5, 2), torch.ones(5, 3), labels)
    indices, weights = craig(same, 2)
    assert indices.tolist() == [0, 2, 1, 3] and weights.tolist() == pytest.approx([3 * 0.8, 0, 2 * 0.8, 0])
    logits, features, labels = problem((3, 3))
    indices, weights = craig(LastLayer.of(logits, features, labels), 3)
    assert sorted(indices.tolist()) == list(range(6)) and weights.tolist() == [1.0] * 6
    indices, weights = craig(LastLayer.of(logits, features, labels), 1)
    assert len(indices) == 2 and weights.tolist() == [1.0, 1.0]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(1, 10), st.sampled_from([1e-3, 0.5, 10.0]))
def test_weights_solve_the_stated_problem(seed, count, width, ridge):
    rng = np.random.default_rng(seed)
    gradients, target = rng.normal(size=(count, width)), rng.normal(size=width)
    expected = reference.ridge_weights(gradients, target, ridge)
    normal = gradients @ gradients.T + ridge * np.eye(count)
    for start in (np.zeros(count), expected):
        np.testing.assert_allclose(nonnegative_solution(normal, gradients @ target, start), expected, atol=1e-8)


def test_weights_without_a_ridge_and_with_equal_gradients():
    """The solution is not unique: its residual is."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4, 6))[[0, 1, 1, 2, 3, 3]]
    target = gradients.sum(0) + rng.normal(size=6)
    weights = nonnegative_solution(gradients @ gradients.T, gradients @ target, np.zeros(6))
    assert (weights >= 0).all()
    residual = np.linalg.norm(gradients.T @ weights - target)
    assert residual == pytest.approx(nnls(gradients.T, target)[1], rel=1e-7)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.01, 0.5, 5.0]), st.data())
def test_the_pursuit_is_that_of_a_plain_loop(seed, size, width, ridge, data):
    count = data.draw(st.integers(1, size))
    gradients = np.random.default_rng(seed).normal(size=(size, width))
    chosen, weights = pursuit(gradients @ gradients.T, count, ridge)
    expected, expected_weights = reference.pursuit(gradients, count, ridge)
    assert chosen.tolist() == expected
    np.testing.assert_allclose(weights, expected_weights, atol=1e-7)


@pytest.mark.parametrize("rows", ["own", "all"])
def test_gradmatch_by_the_gradients_of_autograd(rows):
    logits, features, labels = problem((20, 15, 15), seed=3)
    indices, weights = gradmatch(LastLayer.of(logits, features, labels), 6, 0.5, rows)
    plain, found, amounts = reference.last_layer_gradients(logits, features, labels), [], []
    for label in range(3):
        members = (labels == label).nonzero().squeeze(1)
        mine = reference.own_row(plain[members], label, 3) if rows == "own" else plain[members]
        chosen, w = reference.pursuit(mine.numpy(), 6, 0.5)
        found += [int(members[j]) for j, amount in zip(chosen, w, strict=True) if amount > 0]
        amounts += [amount for amount in w if amount > 0]
    assert indices.tolist() == found and len(found) <= 18
    np.testing.assert_allclose(weights.numpy(), np.array(amounts) / np.mean(amounts), rtol=1e-5)


def test_gradmatch_finds_fewer_and_fills_on_request():
    """Two of three directions are needed for the sum; and a class whose gradients are all 0."""
    errors = torch.tensor([[1.0, 0], [0, 1], [-0.1, -0.1], [1, 0], [0, 0], [0, 0], [0, 0], [0, 0]]).double()
    gradients = LastLayer(errors, torch.ones(8, 1, dtype=torch.float64), torch.tensor([0] * 4 + [1] * 4))
    with pytest.raises(ValueError, match="class 1: all gradients are 0, so there is nothing to match"):
        gradmatch(gradients, 3, 0.0, "all")
    first = LastLayer(errors[:4], gradients.inputs[:4], gradients.labels[:4])
    indices, weights = gradmatch(first, 4, 0.0, "all")
    assert indices.tolist() == [0, 1]  # 1.9 and 0.9 of them are the sum
    torch.testing.assert_close(weights, torch.tensor([1.9, 0.9]) / 1.4)
    indices, weights = gradmatch(gradients, 3, 0.0, "all", generator(0))
    assert indices.view(2, 3)[0, :2].tolist() == [0, 1] and len(set(indices.tolist())) == 6
    assert gradients.labels[indices].tolist() == [0] * 3 + [1] * 3
    torch.testing.assert_close(weights, torch.tensor([1.9 / 1.4, 0.9 / 1.4, 1, 1, 1, 1]))
    assert torch.equal(indices, gradmatch(gradients, 3, 0.0, "all", generator(0))[0])


def test_gradmatch_of_whole_classes_and_of_one_image():
    logits, features, labels = problem((4, 4))
    gradients = LastLayer.of(logits, features, labels)
    for ipc in (1, 4):
        indices, weights = gradmatch(gradients, ipc, 0.5, "all", generator(0))
        assert len(set(indices.tolist())) == 2 * ipc and labels[indices].tolist() == [0] * ipc + [1] * ipc
        assert (weights > 0).all() and weights.mean().item() == pytest.approx(1)


def test_errors():
    logits, features, labels = problem((3, 4))
    for wrong, message in (
        ((logits[:6], features, labels), r"logits is torch.float32 of shape \(6, 2\); it must be float \(7, …\)"),
        ((logits, features.long(), labels), "features is torch.int64"),
        ((logits.where(logits != logits[0, 0], torch.nan), features, labels), "logits holds 1 values that are NaN"),
        ((logits, features, labels + 1), "labels holds values from 1 to 2; allowed are 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LastLayer.of(*wrong)
    gradients = LastLayer.of(logits, features, labels)
    for choose in (craig, gradmatch):
        with pytest.raises(ValueError, match="ipc is 4; allowed is 1 to 3, the size of class 0, the smallest"):
            choose(gradients, 4)
