"""The table of `make methods`, with settings that take seconds."""

import json

import pytest
from conftest import CPU, MODEL, tiny_run

from selmatch_ext import cli, comparison
from selmatch_ext.comparison import Entry
from selmatch_ext.settings import DDSettings, DMSettings


@pytest.fixture
def small(monkeypatch):
    attack = {"steps": 1, "images_per_class_per_step": 2, "epochs": 1, "objective": "attack", "init": "loaded"}
    entries = [
        Entry("dm", 2, DMSettings(ipc=2, model=MODEL, iterations=2, batch_real=4)),
        Entry("dd", 2, DDSettings(model=MODEL, passes=1, networks=1, **attack)),
    ]
    monkeypatch.setattr(comparison, "entries", lambda: entries)
    monkeypatch.setattr(comparison, "EXPERTS", tiny_run().experts)
    monkeypatch.setattr(comparison, "EVALUATION", tiny_run().evaluation)


def test_the_table_and_its_file(small, tmp_path, capsys):
    assert cli.main(["methods", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["ipc"]) for r in results] == [("dm", 2), ("dd-attack", 2)]
    assert all(0 <= r[key] <= 100 for r in results for key in ("random", "ours")) and results[0]["seconds"] >= 0
    assert set(results[1]["others"]) == {"before", "after"}
    assert "dd-attack" in capsys.readouterr().out
    assert comparison.run(["dm", "dd"], tmp_path, 0, CPU) == results  # finished: nothing is done twice


def test_other_settings_and_names_are_refused(small, tmp_path, monkeypatch):
    comparison.run(["dm"], tmp_path, 0, CPU)
    with pytest.raises(ValueError, match="made with other settings .seed: 0 → 1"):
        comparison._result(comparison.entries()[0], *_arguments(tmp_path, 1))
    with pytest.raises(ValueError, match="no method is called dx; there are dc, dsa, dm, mtt, datm, dd, selmatch"):
        comparison.run(["dx"], tmp_path, 0, CPU)


def _arguments(folder, seed):
    return None, None, folder, seed, CPU


def test_every_entry_is_of_the_whole_family():
    found = {(e.name, e.ipc) for e in comparison.entries()}
    both = {(name, ipc) for name in ("dc", "dsa", "dm", "mtt", "datm") for ipc in (1, 10)}
    assert found == both | {("dd", 1), ("dd-attack", 10), ("selmatch", 10)}
