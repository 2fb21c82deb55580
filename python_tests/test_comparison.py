"""The table of `make methods`, with settings that take seconds."""

import json
from dataclasses import replace

import pytest
from conftest import CPU, MODEL, tiny_run

from selmatch_ext import cli, comparison, pipeline
from selmatch_ext.comparison import Entry
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.evaluation import correct, follow_schedule
from selmatch_ext.settings import DDSettings, DMSettings


@pytest.fixture
def small(monkeypatch):
    attack = {"steps": 1, "images_per_class_per_step": 2, "epochs": 1, "objective": "attack", "init": "loaded"}
    entries = [
        Entry("dm", 2, DMSettings(ipc=2, model=MODEL, iterations=2, batch_real=4)),
        Entry("dd", 1, DDSettings(model="MLP", steps=1, epochs=2, init="known", lr_init=0.2, passes=1)),
        Entry("dd", 2, DDSettings(model=MODEL, passes=1, networks=1, **attack)),
    ]
    monkeypatch.setattr(comparison, "entries", lambda: entries)
    monkeypatch.setattr(comparison, "EXPERTS", tiny_run().experts)
    monkeypatch.setattr(comparison, "EVALUATION", tiny_run().evaluation)


def test_the_table_and_its_file(small, tmp_path, capsys):
    assert cli.main(["methods", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["ipc"]) for r in results] == [("dm", 2), ("dd", 1), ("dd-attack", 2)]
    assert all(0 <= r[key] <= 100 for r in results for key in ("random", "ours")) and results[0]["seconds"] >= 0
    assert set(results[2]["others"]) == {"before", "after"}
    shown = capsys.readouterr().out
    for name in ("random", "ours"):
        recorded = json.loads((tmp_path / "dm-ipc2" / f"evaluation-{name}.json").read_text())["accuracies"]
        (first,), (second,) = recorded
        mean, std = (first + second) / 2, abs(first - second) / 2**0.5
        assert (results[0][name], results[0][f"{name}_std"]) == pytest.approx((mean, std), abs=1e-9)
        assert f"{mean:.1f} ± {std:.1f}" in shown
        assert results[1][f"{name}_std"] is None and results[2][f"{name}_std"] is None
    assert "dd-attack" in shown
    assert comparison.run(["dm", "dd"], tmp_path, 0, CPU) == results  # finished: nothing is done twice


def test_both_figures_of_dd_are_of_the_same_steps(small, digits, tmp_path):
    (found, _) = comparison.run(["dd"], tmp_path, 0, CPU)
    ours = DistilledSet.load(tmp_path / "dd-ipc1" / "distilled.safetensors")
    random = replace(pipeline.random_set(digits, 1, 0), schedule=ours.schedule)
    for name, subset in {"random": random, "ours": ours}.items():
        model = follow_schedule(subset, digits, 0, CPU)
        assert found[name] == 100 * correct(model, digits, "test", CPU).double().mean().item()


def test_seconds_are_those_of_an_uninterrupted_distillation(small, tmp_path, monkeypatch, capsys):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparison, "evaluate", killed)
        comparison.run(["dm"], tmp_path, 0, CPU)
    (found,) = comparison.run(["dm"], tmp_path, 0, CPU)
    assert found["seconds"] is None and "interrupted" in capsys.readouterr().out


def test_other_settings_and_names_are_refused(small, tmp_path, monkeypatch):
    comparison.run(["dm"], tmp_path, 0, CPU)
    with pytest.raises(ValueError, match="made with other settings .seed: 0 → 1"):
        comparison._result(comparison.entries()[0], *_arguments(tmp_path, 1))
    changed = replace(comparison.EVALUATION, networks=3)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="evaluation.networks: 2 → 3"):
        patch.setattr(comparison, "EVALUATION", changed)
        comparison.run(["dm"], tmp_path, 0, CPU)
    with pytest.raises(ValueError, match="no method is called dx; there are dc, dsa, dm, mtt, datm, dd, selmatch"):
        comparison.run(["dx"], tmp_path, 0, CPU)


def _arguments(folder, seed):
    return None, None, folder, seed, CPU


def test_every_entry_is_of_the_whole_family():
    found = {(e.name, e.ipc) for e in comparison.entries()}
    both = {(name, ipc) for name in ("dc", "dsa", "dm", "mtt", "datm") for ipc in (1, 10)}
    assert found == both | {("dd", 1), ("dd-attack", 10), ("selmatch", 10)}
