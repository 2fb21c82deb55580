"""Coverage against plain loops; snapshots of a run; the verb."""

import json
from dataclasses import replace

import pytest
import reference
import torch
from conftest import MODEL, run_for, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from selmatch_ext import cli, models, report
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, real_subset
from selmatch_ext.data.images import ImageData
from selmatch_ext.evaluation import evaluate
from selmatch_ext.seeds import generator
from selmatch_ext.selection.features import trained_networks
from selmatch_ext.settings import Coverage, Evaluation, Features, Training
from selmatch_ext.studies import coverage as coverage_module
from selmatch_ext.studies.coverage import coverage_measure, easy_half, nearest, shares, snapshots
from selmatch_ext.studies.sets import named

TINY = Features(model=MODEL, strategy="none", training=Training(epochs=1))


def points(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 12), st.integers(1, 5), st.sampled_from([1, 7, 2**24]))
def test_nearest_is_a_plain_minimum_whatever_the_block(seed, queries, count, width, block):
    a, b = points(seed, queries, width), points(seed + 1, count, width)
    plain = torch.tensor([min(float((x - y).square().sum().sqrt()) for y in b) for x in a], dtype=torch.float64)
    torch.testing.assert_close(nearest(a, b, block=block), plain, rtol=1e-9, atol=1e-12)
    others = [min(float((b[i] - b[j]).norm()) for j in range(count) if j != i) for i in range(count)]
    alone = nearest(b, b, themselves=True, block=block)
    torch.testing.assert_close(alone, torch.tensor(others, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_twins_are_neighbors_but_no_point_is_its_own():
    twins = torch.tensor([[0.0], [0.0], [5.0]])
    assert nearest(twins, twins, themselves=True).tolist() == [0, 0, 5]
    with pytest.raises(ValueError, match="1 points are too few"):
        nearest(twins[:1], twins[:1], themselves=True)
    with pytest.raises(ValueError, match="0 points are too few"):
        nearest(twins, twins[:0])


def test_halves_and_shares_by_hand():
    easy = easy_half(torch.tensor([3.0, 1, 1, 1, 2]))
    assert easy.tolist() == [False, True, True, False, False]
    covered = torch.tensor([True, True, False, False, False])
    found = shares(covered, easy)
    assert found == pytest.approx({"all": 40.0, "easy": 50.0, "hard": 100 / 3}, abs=1e-12)


def few(data, train, test):
    part = {"train": data.train.take(torch.arange(train)), "test": data.test.take(torch.arange(test))}
    return ImageData("few digits", **part, class_names=data.class_names)


def test_measuring_is_the_formula(digits, tmp_path):
    """Whole way, from images to percentages, in float32 features; margins to the radius are far above rounding."""
    data = few(digits, 60, 50)
    measure = coverage_measure(Context(data, 3), Coverage(networks=2), TINY, tmp_path)
    subset = real_subset(data, torch.arange(10, 30), "some")
    subset = replace(subset, images=subset.images + 0.3 * torch.randn(subset.images.shape, generator=generator(0)))
    networks = [n.eval() for n in trained_networks(Context(data, 3), TINY, tmp_path, 2)]
    with torch.no_grad():
        seen = [
            models.embed(networks[0], x).double()
            for x in (_images(data, "train"), _images(data, "test"), subset.images)
        ]
        errors = [n(_images(data, "test")).softmax(1) - F.one_hot(data.test.labels, 10) for n in networks]
    difficulty = sum(e.square().sum(1).sqrt() for e in errors) / 2
    order = difficulty.argsort(stable=True).tolist()
    found = measure.measure(subset)
    for name, group in {"all": range(50), "easy": order[:25], "hard": order[25:]}.items():
        assert found[name] == pytest.approx(reference.coverage(*seen, list(group)), abs=1e-9)
    assert 0 < found["all"] < 100


def _images(data, split):
    return data.normalize(getattr(data, split).images)


def test_real_images_cover_themselves_and_other_normalizations_are_undone(digits, tmp_path):
    data = few(digits, 60, 50)
    measure = coverage_measure(Context(replace(data, test=data.train)), Coverage(networks=1), TINY, tmp_path)
    subset = real_subset(data, torch.arange(60), "all")
    assert measure.measure(subset) == {"all": 100, "easy": 100, "hard": 100}
    mean, std = torch.tensor([0.1]), torch.tensor([2.0])
    other = replace(subset, images=(data.train.images / 255 - mean) / std, mean=mean, std=std)
    assert measure.measure(other) == {"all": 100, "easy": 100, "hard": 100}


def test_whitening_of_the_set_is_undone(digits, tmp_path):
    data = few(digits, 60, 50)
    measure = coverage_measure(Context(data), Coverage(networks=1), TINY, tmp_path / "plain")
    assert measure.measure(real_subset(data, torch.arange(20), "some")) == measure.measure(
        real_subset(data.whitened(), torch.arange(20), "some")
    )


def test_groups_split_the_accuracy(digits, tmp_path):
    subset = real_subset(digits, torch.arange(0, 1000, 10), "every tenth")
    half = torch.arange(len(digits.test.labels)) % 2 == 0
    groups = {"even": half, "odd": ~half}
    settings, record = tiny_run().evaluation, tmp_path / "r.json"
    found = evaluate(subset, Context(digits), settings, record, groups=groups)
    assert found["test"] == evaluate(subset, Context(digits), settings)["test"]
    for both, even, odd in zip(*(found[n].values for n in ("test", "even", "odd")), strict=True):
        share = half.double().mean().item()
        assert both == pytest.approx(even * share + odd * (1 - share), abs=1e-9)
    assert evaluate(subset, Context(digits), settings, record, groups=groups) == found
    with pytest.raises(ValueError, match="groups"):
        evaluate(subset, Context(digits), settings, record, groups={"even": ~half, "odd": half})


class Growing:
    """A method whose set tells how many updates it has had."""

    name = "growing"
    max_loss = float("inf")
    state: dict = {}
    losses_per_iteration, iterations = 1, 0

    def largest_batch(self):
        return None

    def decay(self, iteration):
        return 1.0

    def learned_rates(self):
        return {}

    def updated(self):
        pass

    def __init__(self, subset):
        self.subset, self.learned = subset, {"x": torch.zeros((), requires_grad=True)}

    def optimizer(self):
        return torch.optim.SGD(self.learned.values(), lr=1.0)

    def loss(self, iteration, generator):
        return -self.learned["x"]

    def check(self):
        pass

    def distilled(self):
        images = torch.full_like(self.subset.images, self.learned["x"].item())
        return replace(self.subset, images=images, method=self.name)


def test_snapshots_also_of_a_run_in_pieces(digits, tmp_path):
    subset = real_subset(digits, torch.arange(10), "ten")
    for iterations in (3, 7):
        run_for(Growing(subset), iterations, tmp_path, {"a": 1}, snapshot_every=2)
    files = snapshots(tmp_path)
    assert list(files) == [0, 2, 3, 4, 6, 7]
    for iteration, path in files.items():
        saved = DistilledSet.load(path)
        assert (saved.images == iteration).all() and saved.settings == {"a": 1}
    run_for(Growing(subset), 3, tmp_path / "off")
    with pytest.raises(FileNotFoundError, match="off has no snapshots: distill with a snapshot_every above 0"):
        snapshots(tmp_path / "off")


def test_sets_that_do_not_fit_are_refused_before_any_training(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(coverage_module, "coverage_measure", lambda *rest: pytest.fail("it trained"))
    wide = real_subset(digits, torch.arange(20), "wide")
    replace(wide, images=torch.zeros(20, 1, 8, 9)).save(tmp_path / "wide")
    for name, message in (("none", "none is not a file"), ("wide", r"shape \(1, 8, 9\), digits of \(1, 8, 8\)")):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            coverage_module.coverage([tmp_path / name], Context(digits), Coverage(), TINY, Evaluation(), tmp_path)


def test_names_differ(tmp_path):
    a, b = tmp_path / "a" / "set.safetensors", tmp_path / "b" / "set.safetensors"
    assert list(named([a, tmp_path / "c"])) == ["set", "c"]
    assert list(named([a, b])) == ["a_set", "b_set"]
    assert list(named([tmp_path / "demo", tmp_path / "demo.1", a])) == ["demo", "demo.1", "set"]
    with pytest.raises(ValueError, match="the same set is given twice"):
        named([a, a])
    with pytest.raises(ValueError, match="no set is given"):
        named([])


def test_the_verb_writes_what_it_promises(digits, tmp_path, capsys):
    run_for(Growing(real_subset(digits, torch.arange(20), "ten")), 4, tmp_path / "run", {}, snapshot_every=2)
    real_subset(digits, torch.arange(30), "random").save(tmp_path / "random.safetensors")
    tiny = ["--features.model", MODEL, "--features.training.epochs", "1", "--coverage.networks", "1"]
    short = ["--evaluation.model", MODEL, "--evaluation.networks", "1", "--evaluation.training.epochs", "1"]
    paths = [str(tmp_path / "run"), str(tmp_path / "random.safetensors")]
    out = tmp_path / "out"
    arguments = ["coverage", *paths, "--data.dataset", "digits", *tiny, *short, "--device", "cpu", "--out", str(out)]
    assert cli.main(arguments) == 0
    result = json.loads((out / "coverage.json").read_text())
    assert result["coverage"]["run"]["iterations"] == [0, 2, 4]
    assert set(result["accuracy"]) == {"run", "random"} and set(result["accuracy"]["run"]) == {"all", "easy", "hard"}
    assert "accuracy: hard" in capsys.readouterr().out and "random" in (out / "table.md").read_text()
    assert Image.open(out / "coverage.png").size == (1100, 380) and Image.open(out / "accuracy.png").size[1] == 400
    times = {p: p.stat().st_mtime_ns for p in [*out.glob("networks/*"), *out.glob("evaluation*")]}
    assert cli.main(arguments) == 0
    assert times and all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert json.loads((out / "coverage.json").read_text()) == result


def test_plots_of_many_series(tmp_path):
    one = {"iterations": [-1], "all": [10.0], "easy": [20.0], "hard": [5.0]}
    report.plot_coverage({"alone": one}, tmp_path / "a.png")
    report.plot_curves({f"s{i}": {2: (50.0, 1.0), 4: (40.0 + i, 2.0)} for i in range(9)}, tmp_path / "b.png", "x", "y")
    report.plot_bars({"s": {f"network {i}": (50.0, 1.0) for i in range(30)}}, tmp_path / "c.png", "%")
    report.plot_ranking({"A": (50.0, 60.0), "B": (55.0, 58.0)}, tmp_path / "d.png", "title")
    assert Image.open(tmp_path / "c.png").size[0] > 2000
