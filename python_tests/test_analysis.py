"""Cross-architecture tables, continual learning, architecture search."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import MODEL, tiny_run
from torch import nn

from selmatch_ext import cli, models
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, Schedule, real_subset, training_set
from selmatch_ext.evaluation import Accuracy, evaluate
from selmatch_ext.models import flat
from selmatch_ext.settings import Continual, Search, Training
from selmatch_ext.studies.architectures import search
from selmatch_ext.studies.continual import continual, restrict, restrict_set
from selmatch_ext.studies.cross import cross

EVALUATION = replace(tiny_run().evaluation, networks=1, training=Training(epochs=1, lr=0.02, batch=32))


def own_network(channels, classes, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], classes))


def other_classes(channels, classes, size):
    return own_network(channels, classes + 1, size)


def no_network(channels, classes, size):
    return "nothing"


@pytest.fixture
def saved(digits, tmp_path):
    paths = [tmp_path / "first.safetensors", tmp_path / "other.safetensors"]
    for start, path in enumerate(paths):
        real_subset(digits, torch.arange(start, 200 + start), "some").save(path)
    return paths


def test_cross_is_each_network_on_each_set(digits, saved, tmp_path):
    networks = [MODEL, "MLP", "test_analysis:own_network"]
    results = cross(saved, networks, Context(digits), EVALUATION, tmp_path / "out")
    assert list(results) == ["first", "other"] and all(list(r) == networks for r in results.values())
    expected = evaluate(DistilledSet.load(saved[1]), Context(digits), replace(EVALUATION, model="MLP"))["test"]
    assert results["other"]["MLP"] == expected
    made = json.loads((tmp_path / "out" / "cross.json").read_text())["accuracy"]
    assert made["other"]["MLP"] == {"mean": expected.mean, "std": expected.std}
    assert (tmp_path / "out" / "cross.png").exists() and "own_network" in (tmp_path / "out" / "cross.md").read_text()


@pytest.mark.parametrize("verb", ["cross", "continual"])
def test_sets_that_do_not_fit_are_refused_before_any_training(digits, saved, tmp_path, monkeypatch, verb):
    subset = DistilledSet.load(saved[1])
    replace(subset, images=subset.images[:, :, :7]).save(saved[1])
    for module in ("cross", "continual"):
        monkeypatch.setattr(f"selmatch_ext.studies.{module}.evaluate", lambda *_: pytest.fail("a network was trained"))
    with pytest.raises(ValueError, match=r"shape \(1, 7, 8\), digits of \(1, 8, 8\)"):
        if verb == "cross":
            cross(saved, ["MLP"], Context(digits), EVALUATION, tmp_path)
        else:
            continual(saved, Context(digits), Continual(), EVALUATION, tmp_path)


@pytest.fixture
def scheduled(digits, saved):
    """The first set again, in a file of its own, with a schedule of MLP and one start, as DD's known one has."""
    start = flat.flatten(models.build("MLP", 1, 10, 8).parameters()).detach()
    schedule = Schedule(torch.tensor([0.1, 0.2]), torch.arange(200).view(2, 100), "MLP", start.unsqueeze(0))
    path = saved[0].with_name("scheduled.safetensors")
    replace(DistilledSet.load(saved[0]), schedule=schedule).save(path)
    return path


def test_a_schedule_is_for_its_own_network_alone(digits, saved, scheduled, tmp_path, capsys):
    networks = [MODEL, "MLP"]
    results = cross([saved[0], scheduled], networks, Context(digits), EVALUATION, tmp_path / "cross")
    assert results["scheduled"] == results["first"] and results["first"][MODEL] != results["first"]["MLP"]
    grid = Search((1,), (4, 8), ("IN",), ("AR",), ("AP",), full=Training(epochs=1))
    plain, same = (search(p, Context(digits), grid, EVALUATION, tmp_path / p.stem) for p in (saved[0], scheduled))
    assert same == plain and len({on_set for on_set, _ in same[1].values()}) == 2
    capsys.readouterr()
    assert cli.main(["evaluate", str(scheduled), "--data.dataset", "digits", "--device", "cpu"]) == 0
    expected = evaluate(training_set(scheduled), Context(digits), EVALUATION)["test"]
    assert capsys.readouterr().out == f"MLP: {expected} over 1 networks, digits\n"  # more would be that one again


def test_a_wrong_name_is_refused_before_any_training(digits, saved, tmp_path, monkeypatch):
    for module in ("cross", "continual"):
        monkeypatch.setattr(f"selmatch_ext.studies.{module}.evaluate", lambda *a: pytest.fail("it trained"))
    for name, message in (
        ("ResNet19", "near ones: ResNet18"),
        ("test_analysis:nothing", "no function 'nothing' in a module 'test_analysis'"),
        ("no_such_module:f", "no function 'f' in a module 'no_such_module'"),
        ("test_analysis:no_network", "returned a str; it must return an nn.Module"),
        ("test_analysis:other_classes", r"for one image it returns \[1, 11\]; it must be a tensor \[1, 10\]"),
        ("torchvision:resnet19", "torchvision has no classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            cross(saved, [MODEL, name], Context(digits), EVALUATION, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_of_the_users_own_is_drawn_from_the_seed():
    first, again = (
        models.build("test_analysis:own_network", 1, 10, 8, generator=torch.Generator().manual_seed(3)) for _ in "ab"
    )
    assert torch.equal(first[1].weight, again[1].weight) and first(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_finished_network_is_not_trained_again(digits, saved, tmp_path, monkeypatch):
    from selmatch_ext import evaluation

    first = cross(saved, [MODEL], Context(digits), EVALUATION, tmp_path / "out")
    monkeypatch.setattr(evaluation, "train", lambda *a: pytest.fail("it trained again"))
    assert cross(saved, [MODEL], Context(digits), EVALUATION, tmp_path / "out") == first


def test_restriction_to_some_classes(digits):
    classes = torch.tensor([2, 5, 9])
    part = restrict(digits, classes)
    assert part.class_names == ["2", "5", "9"] and part.classes == 3
    expected = [i for i, label in enumerate(digits.test.labels.tolist()) if label in (2, 5, 9)]
    assert torch.equal(part.test.images, digits.test.images[expected])
    assert [part.class_names[c] for c in part.test.labels.tolist()] == [
        digits.class_names[c] for c in digits.test.labels[expected].tolist()
    ]
    subset = real_subset(digits, torch.arange(100), "some")
    two = restrict_set(subset, classes, 2)
    assert [subset.class_names[c] for c in digits.train.labels[two.indices].tolist()] == [*"225599"]
    assert two.labels.tolist() == [0, 0, 1, 1, 2, 2] and two.class_names == ["2", "5", "9"]
    for label in range(3):
        members = (subset.labels == classes[label]).nonzero().squeeze(1)[:2]
        assert torch.equal(two.images[2 * label : 2 * label + 2], subset.images[members])


def test_soft_labels_keep_their_odds(digits):
    subset = real_subset(digits, torch.arange(40), "some")
    soft = torch.rand(40, 10, generator=torch.Generator().manual_seed(0)).softmax(1)
    classes = torch.tensor([0, 1, 4])
    part = restrict_set(replace(subset, labels=soft), classes)
    kept = [i for c in (0, 1, 4) for i in range(40) if int(soft[i].argmax()) == c]
    torch.testing.assert_close(part.labels.sum(1), torch.ones(len(kept)))
    torch.testing.assert_close(part.labels[:, 1] / part.labels[:, 0], soft[kept, 1] / soft[kept, 0])


def test_continual_learning_sees_ever_more_classes(digits, saved, tmp_path, monkeypatch):
    seen = []

    def fake(subset, context, settings, *rest):
        seen.append((set(subset.class_names), set(context.data.class_names), len(subset)))
        return {"test": Accuracy([float(len(seen))])}

    monkeypatch.setattr("selmatch_ext.studies.continual.evaluate", fake)
    results = continual(saved[:1], Context(digits, 1), Continual(4, memory=3), EVALUATION, tmp_path / "out")
    assert list(results["first"]) == [3, 6, 8, 10]
    assert all(a == b and n == 3 * len(a) for a, b, n in seen)
    assert all(earlier < later for (earlier, *_), (later, *_) in zip(seen, seen[1:], strict=False))
    order = json.loads((tmp_path / "out" / "continual.json").read_text())["order"]
    assert set(order[:3]) == seen[0][0] and sorted(order) == digits.class_names
    with pytest.raises(ValueError, match="steps is 11; allowed is 1 to 10"):
        continual(saved, Context(digits), Continual(11), EVALUATION, tmp_path)


def test_search_ranks_and_correlates(digits, saved, tmp_path, monkeypatch):
    made_up = {8: (10.0, 50.0), 16: (30.0, 40.0), 32: (20.0, 90.0), 64: (40.0, 60.0)}

    def fake(subset, data, settings, *rest):
        width = int(settings.model.split("W")[1][:2].rstrip("I"))
        return {"test": Accuracy([made_up[width][len(subset) > 200]])}

    monkeypatch.setattr("selmatch_ext.studies.architectures.evaluate", fake)
    grid = Search(depths=(1, 4), widths=(8, 16, 32, 64), norms=("IN",), activations=("AR",), poolings=("AP",))
    correlation, points = search(saved[0], Context(digits), grid, EVALUATION, tmp_path / "out")
    # ranks on the set 1 3 2 4, on all images 2 1 4 3: 1 - 6 * (1 + 4 + 4 + 1) / (4 * 15)
    assert correlation == pytest.approx(0.0, abs=1e-12)
    assert list(points.values()) == [(40.0, 60.0), (30.0, 40.0), (20.0, 90.0), (10.0, 50.0)]
    made = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(made["left_out"]) == 4 and made["left_out"][0].startswith("ConvNetD4")  # 8x8 digits vanish
    made_up.update({w: (50.0, p[1]) for w, p in made_up.items()})
    assert search(saved[0], Context(digits), grid, EVALUATION, tmp_path / "out")[0] is None
    with pytest.raises(ValueError, match="0 of the grid's 2 networks take digits's images"):
        search(saved[0], Context(digits), replace(grid, depths=(5,), widths=(8, 16)), EVALUATION, tmp_path)


def test_the_verbs(saved, tmp_path, capsys):
    digits = ["--data.dataset", "digits", "--device", "cpu", "--evaluation.networks", "1"]
    short = [*digits, "--evaluation.training.epochs", "1", "--evaluation.training.batch", "64"]
    first, other = map(str, saved)
    out = str(tmp_path / "out")
    assert cli.main(["cross", first, other, *short, "--models", MODEL, "MLP", "--out", out]) == 0
    two = ["--continual.steps", "2", "--evaluation.model", MODEL]
    assert cli.main(["continual", first, other, *short, *two, "--out", out]) == 0
    grid = ["--search.depths", "1", "--search.widths", "4", "8", "--search.norms", "IN", "--search.poolings", "AP"]
    quick = ["--search.activations", "AR", "--search.full.epochs", "1"]
    assert cli.main(["search", first, *short, *grid, *quick, "--out", out]) == 0
    shown = capsys.readouterr().out
    assert "10 classes" in shown and "Spearman" in shown and "other" in shown
    for name in ("cross", "continual", "search"):
        assert all((tmp_path / "out" / f"{name}.{kind}").exists() for kind in ("json", "md", "png"))
