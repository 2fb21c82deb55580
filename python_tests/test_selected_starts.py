"""Every way to choose real images as the start of a distillation, killed and repeated; and on the command line."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, MEASURED, MODEL, tiny_run

from selmatch_ext import cli
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.load import load_data
from selmatch_ext.methods import METHODS, loop
from selmatch_ext.provenance import to_dict
from selmatch_ext.runner import Run, run
from selmatch_ext.selection import coreset, start
from selmatch_ext.selection.difficulty import COMPUTED
from selmatch_ext.settings import SELECTIONS, Data, Features, Graph, Pursuit, Scores, Start, Strata, Training

NEW = ("craig", "gradmatch", "ccs", "d2", "moderate", "grand", "aum", "least-confidence", "entropy", "margin")
WEIGHTED = ("craig", "gradmatch")
SHORT = Training(epochs=1, batch=50)
DATA = Data("digits", per_class=12)


def asked(select, **changes):
    tiny = tiny_run()
    settings = METHODS["dm"].settings_type(iterations=3, batch_real=5, model=MODEL, checkpoint_seconds=0.0)
    begin = Start(
        select,
        ipc=4,
        alpha=0.5,
        scores=Scores("aum", MODEL, runs=1, training=SHORT),
        features=Features(MODEL, "none", SHORT),
        ccs=Strata(0.3, 5),
        d2=Graph(0.3, 3, 0.1),
    )
    evaluation = replace(tiny.evaluation, networks=1, training=replace(tiny.evaluation.training, epochs=1))
    return Run("dm", settings, DATA, replace(begin, **changes), tiny.experts, evaluation, seed=5)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in MEASURED}


def dying(monkeypatch, place, name, after=0):
    """Ctrl-C at a call of a function."""
    function, calls = getattr(place, name), []

    def call(*given, **options):
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*given, **options)

    monkeypatch.setattr(place, name, call)


@pytest.mark.parametrize("select", NEW)
def test_the_start_of_a_run_killed_and_repeated_to_the_same_bytes(select, tmp_path, monkeypatch):
    whole, killed, made_from = tmp_path / "whole", tmp_path / "killed", asked(select)
    results = run(made_from, whole, CPU)
    begun, made = (DistilledSet.load(whole / f"{name}.safetensors") for name in ("start", "distilled"))
    assert begun.method == select and torch.equal(begun.hard_labels, torch.arange(10).repeat_interleave(4))
    assert len(set(begun.indices.tolist())) == 40
    assert made.distilled.view(10, 4).tolist() == [[False, False, True, True]] * 10
    moved = (begun.images != made.images).flatten(1).any(1)
    assert not moved[~made.distilled].any()
    assert moved[made.distilled & (begun.weights > 0 if select in WEIGHTED else made.distilled)].all()
    assert (begun.weights is not None) == (made.weights is not None) == (select in WEIGHTED)
    if select in WEIGHTED:
        assert torch.equal(begun.weights, made.weights) and begun.weights.mean().item() == pytest.approx(1)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if select in coreset.BY_SCORE:
            dying(patch, start, "window_set")
        else:
            dying(patch, start, "real_subset", after=1)  # the first call is of the checks before the run
        run(made_from, killed, CPU)
    kept = [p for p in files(killed) if p.name == "scores.npz" or p.parent.name == "features"]
    needs = [select in coreset.BY_DIFFICULTY, select in coreset.BY_NETWORK]
    assert len(kept) == sum(needs)
    times = {p: (killed / p).stat().st_mtime_ns for p in kept}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dying(patch, loop, "_iterate", after=2)
        run(made_from, killed, CPU)
    assert times == {p: (killed / p).stat().st_mtime_ns for p in kept}  # nothing is trained again
    assert run(made_from, killed, CPU) == results and files(killed) == files(whole)


def test_every_choice_is_known_everywhere():
    assert set(NEW) < set(SELECTIONS)
    known = {"random", *coreset.BY_NETWORK, *coreset.BY_DIFFICULTY}
    assert set(SELECTIONS) == known
    assert set(coreset.BY_SCORE.values()) == {*COMPUTED, "cscore"}


def test_select_from_the_command_line_with_weights(tmp_path, capsys):
    command = ["--data.dataset", "digits", "--data.per-class", "12", "--device", "cpu", "--start.ipc", "3"]
    command += ["--start.features.model", MODEL, "--start.features.training.epochs", "1"]
    assert cli.main(["select", *command, "--start.select", "craig", "--out", str(tmp_path / "craig")]) == 0
    made = DistilledSet.load(tmp_path / "craig" / "craig.safetensors")
    assert made.weights.mean().item() == pytest.approx(1) and made.weights.sum().item() == pytest.approx(30)
    assert cli.main(["export", str(tmp_path / "craig" / "craig.safetensors"), "--out", str(tmp_path / "png")]) == 0
    assert len((tmp_path / "png" / "weights.csv").read_text().splitlines()) == 31
    evaluation = ["--evaluation.model", MODEL, "--evaluation.networks", "1", "--evaluation.training.epochs", "1"]
    capsys.readouterr()
    path = str(tmp_path / "craig" / "craig.safetensors")
    assert cli.main(["evaluate", path, "--device", "cpu", *evaluation]) == 0
    assert re.search(f"{MODEL}: [0-9.]+ % over 1 networks", capsys.readouterr().out)


def test_gradmatch_with_fewer_images(tmp_path, monkeypatch):
    """Not as the start of a run, whose images have to be known before it; but as a file, which can start one."""
    few = asked("gradmatch", gradmatch=Pursuit(fill=False))
    with pytest.raises(ValueError, match="start.gradmatch.fill is off, .* run `selmatch select` with these settings"):
        run(few, tmp_path / "run", CPU)
    choice = start.gradmatch
    monkeypatch.setattr(start, "gradmatch", lambda *given: tuple(t[1:] for t in choice(*given)))
    context = Context(load_data(DATA, 5), 5)
    chosen = start.choose(few.start, context, few.evaluation, tmp_path / "select").images
    assert len(chosen) < 40 and len(chosen.weights) == len(chosen)
    counts = torch.bincount(chosen.labels, minlength=10)
    learned = torch.bincount(chosen.labels[chosen.distilled], minlength=10)
    assert torch.equal(learned, (0.5 * counts).int())
    chosen.save(tmp_path / "few.safetensors")
    results = run(replace(few, start=Start(str(tmp_path / "few.safetensors"))), tmp_path / "from_file", CPU)
    made = DistilledSet.load(tmp_path / "from_file" / "distilled.safetensors")
    assert torch.equal(made.weights, chosen.weights) and set(results) == {"random", "start", "dm"}


@pytest.mark.parametrize(
    ("select", "changes", "message"),
    [
        ("ccs", {"ccs": Strata(0.9)}, "cutoff 0.9 leaves 2 of 12 images of class 0, and ipc is 4; .* at most 0.66"),
        ("d2", {"d2": Graph(0.9)}, "cutoff 0.9 leaves 2 of 12 images of class 0"),
        ("craig", {"ipc": 13}, "ipc is 13; allowed is 1 to 12, the size of class 0, the smallest"),
        ("d2", {"features": Features("NoNet")}, "start.features.model: .*NoNet"),
        ("ccs", {"scores": Scores("aum", "NoNet")}, "start.scores.model: .*NoNet"),
        ("margin", {"scores": Scores("aum:x.npz")}, "start.select margin does not go with .* a file of aum scores"),
        ("d2", {"scores": Scores("nofile.npz")}, "nofile.npz"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(select, changes, message, tmp_path, monkeypatch):
    for module in ("difficulty", "features"):
        monkeypatch.setattr(f"selmatch_ext.selection.{module}.train_on_real", lambda *rest: pytest.fail("trained"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(asked(select, **changes), tmp_path, CPU)


def test_settings_of_an_older_file_still_load(tmp_path):
    given = to_dict(asked("random"))
    for name in ("ccs", "d2", "gradmatch"):
        del given["start"][name]
    (tmp_path / "settings.json").write_text(json.dumps(given))
    expected = replace(asked("random").start, ccs=Strata(), d2=Graph())
    assert Run.load(tmp_path).start == expected


def test_scores_of_a_kind_from_a_file(tmp_path):
    np.save(tmp_path / "s.npy", np.arange(120.0))
    context = Context(load_data(DATA, 5), 5)
    for kind, lowest in (("aum", True), ("margin", True), ("grand", False), ("entropy", False)):
        begin = asked(kind, scores=Scores(f"{kind}:{tmp_path / 's.npy'}")).start
        chosen = start.choose(begin, context, None, tmp_path).images
        members = context.data.members[0]
        assert chosen.indices[:4].tolist() == (members[:4] if lowest else members.flip(0)[:4]).tolist()
