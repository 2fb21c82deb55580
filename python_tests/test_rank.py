"""DD-Ranking's scores: the formulas by hand, held-out images, and that test images choose nothing."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import MODEL, random_set, tiny_run

from selmatch_ext import cli
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import real_subset
from selmatch_ext.data.soft_labels import centered
from selmatch_ext.evaluation import Accuracy
from selmatch_ext.settings import Ranking, Training
from selmatch_ext.studies import rank as module
from selmatch_ext.studies.rank import held_out, rank, score

BRIEF = Training(epochs=1, lr=0.02, batch=64)
RANKING = Ranking((0.02, 0.1), strategy="crop", hard=BRIEF, full=BRIEF)
EVALUATION = replace(tiny_run().evaluation, training=BRIEF)


def test_the_scale_of_the_scores():
    assert (
        score(-1) == 0 and score(1) == 100 and score(0) == pytest.approx(100 * (1 - 1 / math.e) / (math.e - 1 / math.e))
    )


def test_held_out_images_are_training_images_that_random_ones_do_not_share(digits):
    data = held_out(Context(digits, 3), Ranking())
    counts = torch.bincount(digits.train.labels)
    assert torch.equal(torch.bincount(data.test.labels), (counts * 0.1).round().long())

    def keys(split):
        return {image.numpy().tobytes() for image in split.images}

    assert len(data.train) + len(data.test) == len(digits.train)
    assert keys(data.train) | keys(data.test) == keys(digits.train)
    assert not torch.equal(held_out(Context(digits, 4), Ranking()).test.images, data.test.images)
    few = digits.subset(1, torch.Generator())
    with pytest.raises(ValueError, match="held_out is 0.1, which is 1 of the 1 training images of 0; at least"):
        held_out(Context(few), Ranking())


@pytest.fixture
def answers(monkeypatch):
    """Accuracies by what is trained on, without training; a list of (label, split's size, rate, set) that were
    asked."""
    asked = []
    means = {
        "all training images": 90.0,
        "set: hard": 40.0,
        "set: own": 70.0,
        "set: augmented": 65.0,
        "set: plain": 60.0,
    }
    means |= {"random: own": 50.0, "random: augmented": 45.0, "random: plain": 30.0}

    def evaluate(subset, context, how, record, label):
        asked.append((label, len(context.data.test), how, subset))
        if "lr " in label:
            if how.training.lr == 0.1:
                raise FloatingPointError
            return {"test": Accuracy([{0.02: 10.0, 0.05: 30.0}[how.training.lr]])}
        return {"test": Accuracy([means[label]] * how.networks)}

    monkeypatch.setattr(module, "evaluate", evaluate)
    return asked


def test_the_scores_are_the_formulas_and_rates_are_chosen_on_held_out_images(digits, tmp_path, answers):
    subset = replace(random_set(digits, 2), scores=centered(random_set(digits, 2).labels, 10))
    soft = torch.nn.functional.one_hot(subset.labels, 10) * 0.8 + 0.02
    subset = replace(subset, labels=soft, distilled=~subset.distilled)
    subset.save(tmp_path / "set.safetensors")
    settings = replace(RANKING, rates=(0.02, 0.05, 0.1), label_weight=0.25, augmentation_weight=0.75)
    found = rank(tmp_path / "set.safetensors", Context(digits), settings, replace(EVALUATION, loss="mse"), tmp_path)
    e = math.exp
    assert found["hard_label_recovery"] == pytest.approx(50) and found["improvement_over_random"] == pytest.approx(20)
    label, augmented = 0.25 * 0.2 - 0.75 * 0.5, 0.75 * 0.2 + 0.25 * 0.3
    assert found["label_robust"] == pytest.approx(100 * (e(label) - e(-1)) / (e(1) - e(-1)))
    assert found["augmentation_robust"] == pytest.approx(100 * (e(augmented) - e(-1)) / (e(1) - e(-1)))
    held = len(held_out(Context(digits), RANKING).test)
    for name, size, how, given in answers:
        assert size == (held if "lr " in name else len(digits.test))
        if name in ("set: hard", "all training images"):
            assert (
                how.loss == "cross-entropy"
                and how.distilled_strategy == "crop"
                and not given.labels.is_floating_point()
            )
        if name.startswith(("set:", "random:")):
            assert how.training.lr == 0.05 and len(given) == 20
        if name in ("set: own", "set: plain"):
            assert how.loss == "mse" and torch.equal(given.scores, subset.scores)
            assert how.distilled_strategy == ("none" if "plain" in name else EVALUATION.distilled_strategy)
    draws = {given.digest() for name, _, _, given in answers if name == "random: own"}
    assert len(draws) == EVALUATION.networks
    made = json.loads((tmp_path / "rank.json").read_text())
    assert set(made["rates"].values()) == {0.05} and made["label_robust"] == found["label_robust"]


def test_rates_that_all_diverge_are_named(digits, tmp_path, answers):
    random_set(digits, 1).save(tmp_path / "set.safetensors")
    evaluation = replace(EVALUATION, training=replace(BRIEF, lr=0.1))
    settings = replace(RANKING, rates=(0.1,), hard=replace(BRIEF, lr=0.1))
    with pytest.raises(ValueError, match="diverges at all of ranking.rates"):
        rank(tmp_path / "set.safetensors", Context(digits), settings, evaluation, tmp_path)


def test_the_verb_writes_what_it_promises_and_continues(digits, tmp_path, capsys):
    subset = real_subset(digits, torch.cat([m[:1] for m in digits.members]), "elsewhere")
    subset.save(tmp_path / "set.safetensors")
    out = tmp_path / "out"
    command = [
        "rank",
        str(tmp_path / "set.safetensors"),
        "--data.dataset",
        "digits",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    command += ["--data.per-class", "30"]
    command += ["--ranking.rates", "0.1", "--evaluation.model", MODEL, "--evaluation.networks", "2"]
    for part in ("evaluation.training", "ranking.hard", "ranking.full"):
        command += [f"--{part}.epochs", "1", f"--{part}.lr", "0.1"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    made = json.loads((out / "rank.json").read_text())
    assert (out / "rank.md").exists() and (out / "rank.png").exists()
    assert f"label robust: {made['label_robust']:.1f}" in shown
    assert set(made["accuracy"]) == {"all training images", "set", "random"} and 0 <= made["augmentation_robust"] <= 100
    times = {p: p.stat().st_mtime_ns for p in out.glob("random_*.json")}
    assert len(times) == 6 and cli.main(command) == 0
    assert times == {p: p.stat().st_mtime_ns for p in out.glob("random_*.json")}
    assert json.loads((out / "rank.json").read_text()) == made
