"""The table of `make methods`, with settings that take seconds."""

import json
import re
from dataclasses import replace

import pytest
from conftest import CPU, MODEL, random_set, tiny_run

from selmatch_ext import cli
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.evaluation import correct
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods import METHODS
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.distribution import DMSettings
from selmatch_ext.runner import Run
from selmatch_ext.selection import coreset
from selmatch_ext.settings import SELECTIONS, Data, Features, Scores, Start, Training
from selmatch_ext.studies import comparison


@pytest.fixture
def small(monkeypatch):
    attack = {"steps": 1, "epochs": 1, "objective": "attack", "init": "loaded", "passes": 1, "networks": 1}
    rows = {
        "dm-ipc2": ("dm", Start(ipc=2), DMSettings(model=MODEL, iterations=2, batch_real=4)),
        "dd-ipc1": (
            "dd",
            Start(ipc=1),
            DDSettings(model="MLP", steps=1, epochs=2, init="known", lr_init=0.2, passes=1),
        ),
        "dd-attack-ipc2": ("dd", Start(ipc=2), DDSettings(model=MODEL, **attack)),
    }
    tiny = tiny_run(data=Data("digits"))

    def entries(seed):
        parts = {"data": tiny.data, "experts": tiny.experts, "evaluation": tiny.evaluation, "seed": seed}
        return {name: Run(method, settings, start=start, **parts) for name, (method, start, settings) in rows.items()}

    monkeypatch.setattr(comparison, "entries", entries)
    training = Training(epochs=1)
    scores, features = Scores("aum", MODEL, 1, training=training), Features(MODEL, "none", training)
    two = {name: Start(name, ipc=2, scores=scores, features=features) for name in ("random", "craig", "aum")}
    monkeypatch.setattr(comparison, "selections", lambda: two)
    monkeypatch.setattr(comparison, "EVALUATION", tiny.evaluation)


def test_the_table_and_its_file(small, tmp_path, capsys):
    assert cli.main(["methods", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    selected = ["selection-craig", "selection-aum"]
    assert list(results) == ["dm-ipc2", "dd-ipc1", "dd-attack-ipc2", *selected]
    shown = capsys.readouterr().out
    for name, method in (("dm-ipc2", "dm"), ("dd-ipc1", "dd"), ("dd-attack-ipc2", "dd")):
        assert {"random", "start", method} <= results[name].keys()
        assert results[name] == json.loads((tmp_path / name / "results.json").read_text())
    recorded = json.loads((tmp_path / "dm-ipc2" / "evaluation_dm.json").read_text())["accuracies"]
    (first,), (second,) = recorded
    mean, std = (first + second) / 2, abs(first - second) / 2**0.5
    assert (results["dm-ipc2"]["dm"]["mean"], results["dm-ipc2"]["dm"]["std"]) == pytest.approx((mean, std), abs=1e-9)
    assert f"{mean:.1f} ± {std:.1f}" in shown and "dd-attack, 2: flipped" in shown
    attack = results["dd-attack-ipc2"]["attack"]
    assert set(attack) == {"flipped", "others"} and set(attack["others"]) == {"before", "random", "start", "dd"}
    for name in ("random", "craig", "aum"):
        recorded = json.loads((tmp_path / "selection" / f"evaluation_{name}.json").read_text())["accuracies"]
        held = results["selection-aum"]["random"] if name == "random" else results[f"selection-{name}"]["start"]
        assert held["mean"] == pytest.approx(sum(a for (a,) in recorded) / 2)
    assert re.search("aum .*hardest images: not expected to be above random", shown)
    assert not re.search("craig .*hardest", shown)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert comparison.compare(["dm", "dd", "selection"], tmp_path, 0, CPU) == results
    assert {p for p, t in before.items() if p.stat().st_mtime_ns != t} <= {
        p for p in before if p.name in ("start.safetensors", "distilled.safetensors", "checkpoint.safetensors")
    }


def test_both_figures_of_dd_are_of_the_same_steps(small, digits, tmp_path):
    found = comparison.compare(["dd"], tmp_path, 0, CPU)["dd-ipc1"]
    ours = DistilledSet.load(tmp_path / "dd-ipc1" / "distilled.safetensors")
    random = replace(random_set(digits, 1), schedule=ours.schedule)
    for name, subset in {"random": random, "dd": ours}.items():
        model = follow_schedule(subset, Context(digits))
        assert found[name]["mean"] == 100 * correct(model, Context(digits), "test").double().mean().item()


def test_other_settings_and_names_are_refused(small, tmp_path, monkeypatch):
    comparison.compare(["dm"], tmp_path, 0, CPU)
    with pytest.raises(ValueError, match="other settings .seed: 0 → 1"):
        comparison.compare(["dm"], tmp_path, 1, CPU)
    with pytest.raises(ValueError, match="no method is called dx; there are dm, dd"):
        comparison.compare(["dx"], tmp_path, 0, CPU)


def test_every_selection_has_a_row():
    found = comparison.selections()
    assert set(found) == set(SELECTIONS) - {"c-score"} and all(start.ipc == 10 for start in found.values())
    assert all(found[name].scores.source == name for name in coreset.BY_SCORE if name != "c-score")


def test_every_entry_is_of_the_whole_family():
    found = comparison.entries(3)
    two = ("dc", "dsa", "dm", "mtt", "datm", "kip", "label-solve", "frepo")
    both = {f"{name}-ipc{ipc}" for name in two for ipc in (1, 10)}
    assert set(found) == both | {"dd-ipc1", "dd-attack-ipc10", "selmatch-ipc10"}
    assert {run.method for run in found.values()} == set(METHODS) and {run.seed for run in found.values()} == {3}
