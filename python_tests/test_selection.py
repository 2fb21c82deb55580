"""Scores, the sliding window and its split."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selmatch_ext.data.images import ImageData, ImageSplit
from selmatch_ext.selection.partial_update import learned_mask
from selmatch_ext.selection.scores import difficulty, el2n, forgetting_events, load_scores
from selmatch_ext.selection.window import beta_grid, whole, window


def small_data(labels=(0, 1, 0, 1, 2, 2)):
    labels = torch.tensor(labels)
    part = ImageSplit(torch.zeros((len(labels), 1, 2, 2), dtype=torch.uint8), labels)
    return ImageData("small", part, part, ["a", "b", "c"])


# window


def test_window_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 1])
    difficulty = torch.tensor([0.1, 0.5, 0.3, 0.2, 1, 2, 3, 4, 0.4, 2.5])
    # class 0, hardest first: 1 8 2 3 0; class 1: 7 6 9 5 4
    assert window(difficulty, labels, 2, 0.0).tolist() == [1, 8, 7, 6]
    assert window(difficulty, labels, 2, 0.2).tolist() == [8, 2, 6, 9]
    assert window(difficulty, labels, 2, 0.6).tolist() == [3, 0, 5, 4]
    assert window(difficulty, labels, 2, 0.5, "ipc").tolist() == [8, 2, 6, 9]
    assert window(difficulty, labels, 2, 1.5, "ipc").tolist() == [3, 0, 5, 4]


def test_equal_difficulties_keep_their_order():
    labels = torch.zeros(1000, dtype=torch.int64)
    assert window(torch.ones(1000), labels, 10, 0.25).tolist() == list(range(250, 260))


@st.composite
def labeled_difficulties(draw):
    counts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    labels = labels[torch.randperm(len(labels), generator=g)]
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    difficulty = torch.randint(levels, (len(labels),), generator=g) / levels
    return labels, difficulty, counts


@settings(max_examples=80, deadline=None)
@given(labeled_difficulties(), st.data())
def test_window_properties(case, data):
    labels, difficulty, counts = case
    ipc = data.draw(st.integers(1, min(counts)))
    beta = data.draw(st.sampled_from(beta_grid(min(counts), ipc)))
    indices = window(difficulty, labels, ipc, beta)
    assert indices.dtype == torch.int64 and len(set(indices.tolist())) == ipc * len(counts)
    for label, chosen in enumerate(indices.view(-1, ipc)):
        members = [i for i in range(len(labels)) if labels[i] == label]
        ranked = sorted(members, key=lambda i: (-difficulty[i].item(), i))
        skip = math.floor(beta * len(members) + 1e-6)
        assert chosen.tolist() == ranked[skip : skip + ipc]


@settings(max_examples=80, deadline=None)
@given(labeled_difficulties(), st.data())
def test_window_of_the_public_code(case, data):
    labels, difficulty, counts = case
    ipc = data.draw(st.integers(1, min(counts)))
    skip = data.draw(st.integers(0, min(counts) - ipc))
    indices = window(difficulty, labels, ipc, skip / ipc, "ipc")
    for label, chosen in enumerate(indices.view(-1, ipc)):
        members = (labels == label).nonzero().squeeze(1)
        ranked = members[difficulty[members].argsort(descending=True, stable=True)]
        assert chosen.tolist() == ranked[skip : skip + ipc].tolist()


@given(st.integers(1, 10_000), st.data())
def test_last_of_the_grid_is_the_end_of_the_class(class_size, data):
    ipc = data.draw(st.integers(1, class_size))
    grid = beta_grid(class_size, ipc, data.draw(st.sampled_from([0.05, 0.1, 0.15, 0.3, 1.0])))
    assert grid == sorted(set(grid)) and grid[0] == 0
    assert whole(grid[-1], class_size) == class_size - ipc


@given(st.integers(1, 10_000), st.data())
def test_last_of_the_grid_in_units_of_ipc_is_the_end_of_the_class(class_size, data):
    ipc = data.draw(st.integers(max(1, class_size // 100), class_size))
    grid = beta_grid(class_size, ipc, data.draw(st.sampled_from([0.1, 0.15, 1.0])), "ipc")
    assert grid == sorted(set(grid)) and grid[0] == 0
    assert whole(grid[-1], ipc) == class_size - ipc


def test_grid_values():
    assert beta_grid(5000, 250, 5.0, "ipc") == [0, 5, 10, 15, 19]
    assert beta_grid(5000, 500) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert beta_grid(5000, 250)[-2:] == [0.9, 0.95]
    assert beta_grid(10, 10) == [0]


def test_whole_numbers_survive_floating_point():
    assert whole(0.29, 100) == 29 and int(0.29 * 100) == 28
    assert whole(0.6, 50) == 30 and whole(0.58, 50) == 29 and whole(0.599, 50) == 29
    assert all(whole(k / n, n) == k for n in range(1, 300) for k in range(n + 1))


@given(st.integers(1, 100), st.integers(1, 5), st.floats(0, 1))
def test_split_keeps_the_hardest(ipc, classes, alpha):
    mask = learned_mask(torch.arange(classes * ipc), ipc, alpha).view(classes, ipc)
    selected = ipc - whole(alpha, ipc)
    assert mask.dtype == torch.bool
    assert not mask[:, :selected].any() and mask[:, selected:].all()


def test_window_errors():
    labels, difficulty = torch.tensor([0, 0, 0, 1, 1]), torch.arange(5.0)
    with pytest.raises(ValueError, match="class 1 is empty: labels go to 2"):
        window(difficulty, torch.tensor([0, 0, 2, 2, 2]), 1, 0)
    for ipc in (0, 3):
        with pytest.raises(ValueError, match=f"ipc is {ipc}; allowed is 1 to 2, the size of class 1, the smallest"):
            window(difficulty, labels, ipc, 0)
    with pytest.raises(ValueError, match=r"beta 0.7 runs past class 0: .* allowed is a beta of at most 0.33"):
        window(difficulty, labels, 2, 0.7)
    with pytest.raises(ValueError, match=r"beta 3 runs past class 0: .* at most 2"):
        window(difficulty, labels, 1, 3, "ipc")
    for beta in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="allowed is 0 to 1"):
            window(difficulty, labels, 1, beta)
    with pytest.raises(ValueError, match="beta_unit is 'share'; allowed are"):
        window(difficulty, labels, 1, 0, "share")
    with pytest.raises(ValueError, match=r"difficulty has shape \(4,\)"):
        window(difficulty[:4], labels, 1, 0)
    with pytest.raises(ValueError, match="difficulty holds 2 values that are NaN or infinite"):
        window(torch.tensor([0, math.nan, 1, math.inf, 2]), labels, 1, 0)
    with pytest.raises(TypeError, match="labels is torch.int32"):
        window(difficulty, labels.int(), 1, 0)
    with pytest.raises(ValueError, match="labels holds values from -1 to 1"):
        window(difficulty, torch.tensor([0, -1, 0, 1, 1]), 1, 0)
    with pytest.raises(ValueError, match=r"labels has shape \(5, 1\)"):
        window(difficulty, labels[:, None], 1, 0)
    with pytest.raises(ValueError, match="alpha is 1.1"):
        learned_mask(torch.arange(4), 2, 1.1)
    with pytest.raises(ValueError, match=r"\(5,\); it must be \(classes \* ipc,\) with ipc 2"):
        learned_mask(torch.arange(5), 2, 0.5)
    with pytest.raises(ValueError, match="ipc is 11; allowed is 1 to 10"):
        beta_grid(10, 11)
    with pytest.raises(ValueError, match="step is 0"):
        beta_grid(10, 1, 0)


# scores


def test_scores_come_back_from_every_kind_of_file(tmp_path):
    data, scores = small_data(), np.array([3.0, 1, 2, 6, 5, 4])
    np.save(tmp_path / "a.npy", scores)
    np.savez(tmp_path / "b.npz", scores=scores)
    np.savez_compressed(tmp_path / "c.npz", scores=scores.astype(int), labels=data.train.labels.numpy(), other=1)
    for name in ("a.npy", "b.npz", "c.npz"):
        loaded = load_scores(tmp_path / name, data.train.labels, data.name)
        assert loaded.dtype == torch.float64 and loaded.tolist() == scores.tolist()


def test_scores_that_differ_in_their_last_bits_are_no_ties(tmp_path):
    data, scores = small_data(), 0.7 + np.arange(6) * 1e-12
    np.save(tmp_path / "a.npy", scores)
    assert difficulty(
        load_scores(tmp_path / "a.npy", data.train.labels, data.name), "forgetting"
    ).argsort().tolist() == list(range(6))
    assert len(np.unique(scores.astype(np.float32))) == 1


def test_direction():
    scores = torch.tensor([1.0, 2])
    assert difficulty(scores, "cscore").tolist() == [-1, -2]
    assert difficulty(scores, "forgetting").tolist() == difficulty(scores, "el2n").tolist() == [1, 2]
    with pytest.raises(ValueError, match="kind is 'c-score'; allowed are cscore, forgetting, el2n"):
        difficulty(scores, "c-score")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(5), r"shape \(5,\); small needs numbers of shape \(6,\)"),
        (np.zeros((6, 1)), r"shape \(6, 1\)"),
        (np.array(["a"] * 6), "dtype <U1"),
        (np.array([1 + 1j] * 6), "dtype complex128"),
        (np.array([0, 1, np.nan, 3, np.inf, 5]), "2 of 6 scores are NaN or infinite, the first at 2"),
        (np.array([None] * 6, dtype=object), "is no score file"),
        ({"values": np.zeros(6)}, "holds values, and no 'scores'"),
        ({}, "holds nothing, and no 'scores'"),
        (
            {"scores": np.zeros(6), "labels": np.array([0, 1, 1, 1, 0, 2])},
            r"2 of 6 images, the first at 2 \(1 there, 0",
        ),
        ({"scores": np.zeros(6), "labels": np.zeros(7, int)}, r"expected integers \(6,\)"),
        ({"scores": np.zeros(6), "labels": np.zeros(6)}, "labels have dtype float64"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_score_files_that_do_not_fit(tmp_path, content, message):
    path = tmp_path / ("x.npz" if isinstance(content, dict) else "x.npy")
    np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_scores(path, small_data().train.labels, small_data().name)
    assert str(path) in str(caught.value)


def test_truncated_and_foreign_score_files(tmp_path):
    data = small_data()
    with pytest.raises(FileNotFoundError, match=r"none.npy is not a file; expected score file"):
        load_scores(tmp_path / "none.npy", data.train.labels, data.name)
    for name, save in (("a.npy", np.save), ("b.npz", lambda p, s: np.savez(p, scores=s))):
        save(tmp_path / name, np.zeros(6))
        whole_file = (tmp_path / name).read_bytes()
        for kept in (0, 3, 30, len(whole_file) - 5):
            (tmp_path / name).write_bytes(whole_file[:kept])
            with pytest.raises(ValueError, match=f"{name} is no score file"):
                load_scores(tmp_path / name, data.train.labels, data.name)
    (tmp_path / "c.npy").write_text("0.5\n0.6\n")
    with pytest.raises(ValueError, match="c.npy is no score file"):
        load_scores(tmp_path / "c.npy", data.train.labels, data.name)


def test_forgetting_by_hand():
    histories = [[0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]
    correct = torch.tensor(histories, dtype=torch.bool).T
    assert forgetting_events(correct[None]).tolist() == [2, 0, 5, 0, 1]
    assert forgetting_events(torch.stack([correct, correct.flip(1)])).tolist() == [1.5, 0, 5, 0, 1.5]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 7))
def test_forgetting_against_a_plain_count(seed, runs, epochs):
    correct = torch.rand((runs, epochs, 5), generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = []
    for i in range(5):
        counts = []
        for run in correct[:, :, i].tolist():
            events = sum(before and not after for before, after in zip(run, run[1:], strict=False))
            counts.append(events if any(run) else epochs)
        expected.append(sum(counts) / runs)
    assert forgetting_events(correct).tolist() == torch.tensor(expected).tolist()


def test_el2n_by_hand():
    probabilities = torch.tensor([[[1.0, 0, 0], [0, 0.5, 0.5]], [[0, 1, 0], [0, 1, 0]]])
    scores = el2n(probabilities, torch.tensor([0, 1]))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([2**0.5 / 2, 0.5**0.5 / 2]))


def test_score_function_errors():
    with pytest.raises(ValueError, match="correct is torch.float32"):
        forgetting_events(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match=r"of shape \(2, 3\); it must be torch.bool \(runs, epochs, n\)"):
        forgetting_events(torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"it must be float \(runs, n, K\)"):
        el2n(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels holds values from 0 to 2; allowed are 0 to 1"):
        el2n(torch.zeros(1, 2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="labels has 1 entries; probabilities is for 2 images"):
        el2n(torch.zeros(1, 2, 2), torch.tensor([0]))
