"""Coresets against plain loops over exact fractions, alone and from the command line."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from conftest import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from selmatch_ext import cli, models
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, training_set
from selmatch_ext.seeds import generator
from selmatch_ext.selection import coreset
from selmatch_ext.selection.features import split_features, trained_networks
from selmatch_ext.selection.start import score_source
from selmatch_ext.selection.window import window
from selmatch_ext.settings import Data, Features, Scores, Start, Training, Window

TINY = Features(model=MODEL, strategy="none", training=Training(epochs=1))


@st.composite
def labeled_features(draw):
    """Classes of few points with whole coordinates: many ties, duplicates too."""
    counts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    labels = labels[torch.randperm(len(labels), generator=g)]
    width, reach = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 50]))
    return labels, torch.randint(-reach, reach + 1, (len(labels), width), generator=g).float(), counts


@pytest.mark.parametrize("name", ["herding", "k_center"])
@settings(max_examples=80, deadline=None)
@given(labeled_features(), st.data())
def test_greedy_choices_are_those_of_plain_loops(name, case, data):
    labels, features, counts = case
    ipc = data.draw(st.integers(1, min(counts)))
    chosen = getattr(coreset, name)(features, labels, ipc)
    assert chosen.dtype == torch.int64
    for label, mine in enumerate(chosen.view(-1, ipc)):
        members = (labels == label).nonzero().squeeze(1)
        exact = [[Fraction(int(v)) for v in row] for row in features[members]]
        assert mine.tolist() == members[getattr(reference, name)(exact, ipc)].tolist()


@settings(max_examples=40, deadline=None)
@given(labeled_features(), st.data())
def test_random_takes_ipc_different_images_of_each_class(case, data):
    labels, _, counts = case
    ipc, seed = data.draw(st.integers(1, min(counts))), data.draw(st.integers(0, 1000))
    chosen = coreset.random(labels, ipc, generator(seed))
    assert torch.equal(chosen, coreset.random(labels, ipc, generator(seed)))
    assert len(set(chosen.tolist())) == ipc * len(counts)
    assert labels[chosen].tolist() == [label for label in range(len(counts)) for _ in range(ipc)]


def test_random_is_uniform():
    labels = torch.zeros(5, dtype=torch.int64)
    hits = torch.zeros(5)
    for seed in range(2000):
        hits[coreset.random(labels, 2, generator(seed))] += 1
    assert (hits / 2000 - 0.4).abs().max() < 0.05


def test_herding_by_hand():
    features = torch.tensor([[0.0], [1], [2], [9]])  # mean 3; means so far: 2, 1.5, 4
    assert coreset.herding(features, torch.zeros(4, dtype=torch.int64), 3).tolist() == [2, 1, 3]
    assert coreset.k_center(features, torch.zeros(4, dtype=torch.int64), 3).tolist() == [2, 3, 0]


def test_errors_name_the_class_and_the_argument():
    labels = torch.tensor([0, 0, 0, 1, 1])
    x = torch.zeros(5, 2)
    for choose in (lambda ipc: coreset.random(labels, ipc, generator(0)), lambda ipc: coreset.herding(x, labels, ipc)):
        for ipc in (0, 3):
            with pytest.raises(ValueError, match=f"ipc is {ipc}; allowed is 1 to 2, the size of class 1, the smallest"):
                choose(ipc)
    with pytest.raises(ValueError, match=r"features is torch.float32 of shape \(4, 2\); it must be float \(5, …\)"):
        coreset.k_center(torch.zeros(4, 2), labels, 1)
    with pytest.raises(ValueError, match="features holds 2 values that are NaN or infinite"):
        coreset.k_center(torch.tensor([[0.0], [torch.nan], [1], [torch.inf], [2]]), labels, 1)


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("forgetting", "forgetting", "forgetting"),
        ("el2n", "forgetting", "el2n"),
        ("el2n", "el2n:a.npz", "el2n:a.npz"),
        ("c-score", "a.npy", "a.npy"),
        ("c-score", "cscore:a.npy", "cscore:a.npy"),
    ],
)
def test_where_scores_come_from(method, given, expected):
    assert score_source(method, given) == expected


def test_scores_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="C-scores come from a file"):
        score_source("c-score", "forgetting")
    with pytest.raises(ValueError, match="el2n does not go with .* 'forgetting:a.npz', a file of forgetting scores"):
        score_source("el2n", "forgetting:a.npz")
    with pytest.raises(ValueError, match="forgetting does not go with .* 'a.npy', a file of C-scores"):
        score_source("forgetting", "a.npy")


def test_networks_are_kept_and_only_read_for_the_same_settings(digits, tmp_path):
    two = trained_networks(Context(digits), TINY, tmp_path, 2)
    times = [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())]
    again = trained_networks(Context(digits), TINY, tmp_path, 2)
    assert times == [p.stat().st_mtime_ns for p in sorted(tmp_path.iterdir())] and len(times) == 2
    for a, b in zip(two, again, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(two[0].parameters()), next(two[1].parameters()))
    with pytest.raises(ValueError, match=r"features\.training\.epochs: 1 → 2"):
        trained_networks(Context(digits), replace(TINY, training=Training(epochs=2)), tmp_path)
    with pytest.raises(ValueError, match="seed: 0 → 1"):
        trained_networks(Context(digits, 1), TINY, tmp_path)


def test_features_are_what_enters_the_last_layer(digits, tmp_path):
    model = trained_networks(Context(digits), replace(TINY, model="ConvNetD2W8BN"), tmp_path)[0].eval()
    features = split_features(model, Context(digits), "test")
    with torch.no_grad():
        expected = models.embed(model, digits.normalize(digits.test.images))
    torch.testing.assert_close(features, expected)


DIGITS = ["--data.dataset", "digits", "--device", "cpu", "--start.ipc", "4", "--start.alpha", "0.5"]
SMALL = ["--start.features.model", MODEL, "--start.features.training.epochs", "1"]


@pytest.mark.parametrize("method", ["random", "herding", "k-center", "c-score", "forgetting"])
def test_select_from_the_command_line(method, digits, tmp_path, capsys):
    labels = digits.train.labels
    scores = torch.rand(len(labels), generator=generator(0))
    np.save(tmp_path / "s.npy", scores.numpy())
    source = {"c-score": f"{tmp_path / 's.npy'}", "forgetting": f"forgetting:{tmp_path / 's.npy'}"}.get(method, "el2n")
    arguments = [
        "select",
        *DIGITS,
        *SMALL,
        "--start.select",
        method,
        "--start.scores.source",
        source,
        "--out",
        str(tmp_path),
    ]
    assert cli.main(arguments) == 0
    path = tmp_path / f"{method}.safetensors"
    assert str(path) in capsys.readouterr().out
    subset = DistilledSet.load(path)
    assert subset.method == method and subset.settings["start"]["ipc"] == 4
    assert torch.equal(subset.images, digits.normalize(digits.train.images[subset.indices]))
    assert subset.distilled.view(10, 4).tolist() == [[False, False, True, True]] * 10
    assert not training_set(path).distilled.any()
    features = split_features(trained_networks(Context(digits), _small(), tmp_path / "f")[0], Context(digits))
    expected = {
        "random": lambda: coreset.random(labels, 4, generator(0, "random")),
        "herding": lambda: coreset.herding(features, labels, 4),
        "k-center": lambda: coreset.k_center(features, labels, 4),
        "c-score": lambda: window(-scores, labels, 4, 0.0),
        "forgetting": lambda: window(scores, labels, 4, 0.0),
    }[method]()
    assert torch.equal(subset.indices, expected)


def _small():
    return replace(Features(), model=MODEL, training=replace(Features().training, epochs=1))


def test_a_window_over_any_score(digits, tmp_path):
    scores = torch.rand(len(digits.train.labels), generator=generator(0))
    np.save(tmp_path / "s.npy", scores.numpy())
    source = f"el2n:{tmp_path / 's.npy'}"
    start = Start("el2n", ipc=3, window=Window(beta=0.4), scores=Scores(source))
    cli.select(Data("digits"), start, out=tmp_path, device="cpu")
    chosen = DistilledSet.load(tmp_path / "el2n.safetensors").indices
    assert torch.equal(chosen, window(scores, digits.train.labels, 3, 0.4))
