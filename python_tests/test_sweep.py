"""A sweep over shares of digits: curves as they are written, equal numbers of updates, kills, several processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import CPU, MODEL, tiny_run
from test_ranks import selmatch

from selmatch_ext import cli, ranks
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, real_subset
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import evaluate
from selmatch_ext.methods import METHODS
from selmatch_ext.runner import Run, run
from selmatch_ext.settings import Evaluation, Features, Start, Sweep, Training
from selmatch_ext.studies import sweep as sweep_module
from selmatch_ext.studies.coverage import coverage_measure
from selmatch_ext.studies.curves import Curve, cells, same_updates
from selmatch_ext.studies.sweep import sweep

DM = f"model={MODEL},iterations=2,batch-real=4,checkpoint-seconds=0"
MATCHING = "iterations=3,inner-steps=3,expert-epochs=1,max-start-epoch=2,batch-syn=25,lr-images=10,strategy=crop"
CURVES = (
    "random=select",
    f"dm-window=dm,start.select=window,start.alpha=0.5,{DM}",
    f"selmatch,{MATCHING}",
)
SHARES = (0.02, 0.05)
TINY = tiny_run()
BASE = replace(
    TINY,
    start=replace(TINY.start, features=Features(MODEL, "none", Training(epochs=1))),
    evaluation=replace(TINY.evaluation, training=replace(TINY.evaluation.training, epochs=4)),
)
SWEEP = Sweep(CURVES, SHARES, coverage_networks=1)
COMMAND = [
    *("sweep", "--data.dataset", "digits", "--curves", *CURVES[1:], "--shares", *map(str, SHARES)),
    *("--start.window.step", "0.5", "--start.window.beta", "0.2", "--start.scores.source", "el2n"),
    *("--start.scores.model", MODEL, "--start.scores.runs", "1", "--start.scores.training.epochs", "1"),
    *("--start.features.model", MODEL, "--start.features.training.epochs", "1", "--coverage-networks", "1"),
    *("--experts.model", MODEL, "--experts.count", "2", "--experts.training.epochs", "3"),
    *("--evaluation.model", MODEL, "--evaluation.networks", "1", "--evaluation.training.epochs", "2"),
    *("--evaluation.training.batch", "16", "--evaluation.selected-strategy", "crop"),
]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep(SWEEP, BASE, folder, CPU)


# --- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "curve"),
    [
        ("dm", Curve("dm", "dm", ())),
        ("select", Curve("select", "select", ())),
        ("a+b=dm,start.alpha=0.6", Curve("a+b", "dm", (("start.alpha", "0.6"),))),
        ("dm,lr-images=5", Curve("dm", "dm", (("lr_images", "5"),))),
    ],
)
def test_what_is_written_for_a_curve(text, curve):
    assert Curve.parse(text) == curve


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dx", "no method is called 'dx'"),
        ("all=dm", "called 'all'"),
        ("a b=dm", "called 'a b'"),
        ("../x=dm", "called '../x'"),
        ("dm,iterations", "curve dm: 'iterations' is not of the form SETTING=VALUE"),
        ("dm,iterations=1,iterations=2", "'iterations=2' is given twice"),
        ("dm,start.ipc=3", "start.ipc is the same for all curves"),
        ("dm,data.zca=True", "data.zca is the same for all curves"),
        ("dm,seed=1", "seed is the same for all curves"),
        ("select,iterations=3", "select learns no images, so that iterations has no effect"),
    ],
)
def test_curves_that_make_no_sense(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Curve.parse(text)


@pytest.mark.parametrize(
    ("curves", "shares", "message"),
    [
        (("dm", "dm,iterations=2"), (0.1,), "two curves are called dm; write NAME=dm"),
        ((), (0.1,), "curves is empty"),
        (("dm",), (), "shares are none; they must ascend"),
        (("dm",), (0.2, 0.1), "shares are 0.2, 0.1; they must ascend"),
        (("dm",), (0.1, 0.1), "they must ascend"),
        (("dm,start.alpha=0.1:0.2:0.3",), (0.1, 0.2), "start.alpha has 3 values for 2 shares"),
        (("dm,lr=3",), (0.1,), "curve dm: settings: lr is no setting of DMSettings"),
        (("dm,iterations=0.5",), (0.1,), "iterations is 0.5, which is not of its type"),
        (("dm,iterations=0",), (0.1,), "iterations is 0; allowed is"),
        (("select,start.select=noise",), (0.1,), "start.select is 'noise'; real images are selected by one of window"),
    ],
)
def test_sweeps_that_make_no_sense(digits, curves, shares, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cells(Sweep(curves, shares), BASE, digits)


@pytest.mark.parametrize("method", METHODS)
def test_a_curve_has_its_methods_start(digits, method):
    (cell, _) = cells(Sweep((method,), (0.05,)), BASE, digits)
    own = METHODS[method].defaults.start
    assert (cell.run.start.select, cell.run.start.alpha) == (own.select, own.alpha)
    assert cell.run.start.scores == BASE.start.scores and cell.run.experts == BASE.experts
    assert (cell.run.method, cell.run.settings) == (method, METHODS[method].settings_type())


def test_a_curves_own_settings_count(digits):
    text = "x=selmatch,start.alpha=0.2:0.4,iterations=7,keep=activations,evaluation.selected-strategy=None"
    first, second, _ = cells(Sweep((text,), (0.05, 0.1)), BASE, digits)
    assert (first.run.start.alpha, second.run.start.alpha) == (0.2, 0.4)
    for cell in (first, second):
        assert (cell.run.settings.iterations, cell.run.settings.keep) == (7, "activations")
        assert cell.run.evaluation.selected_strategy is None
    size = len(digits.train) / 10
    assert [c.run.start.ipc for c in (first, second)] == [round(0.05 * size), round(0.1 * size)]


def test_every_share_has_as_many_updates(digits):
    """Within half an epoch; on CIFAR-10 the paper has 1000, 500, 250 and 167 epochs, which are nearly as many."""
    training = Evaluation().training
    for images, paper in ((2500, 1000), (5000, 500), (10000, 250), (15000, 167)):
        epochs, batches = same_updates(training, 2500, images), -(-images // training.batch)
        assert abs(epochs * batches - 20 * 1000) <= batches / 2 and epochs == pytest.approx(paper, rel=0.015)
    found = cells(Sweep(("dm", "select"), (0.05, 0.1, 0.3)), BASE, digits)
    batch, sizes = BASE.evaluation.training.batch, [60, 120, 360] * 2 + [len(digits.train)]
    updates = [cell.run.evaluation.training.epochs * -(-n // batch) for cell, n in zip(found, sizes, strict=True)]
    assert updates[0] == BASE.evaluation.training.epochs * 2
    given = cells(Sweep(("dm,evaluation.training.epochs=9:5",), (0.05, 0.1)), BASE, digits)
    assert [cell.run.evaluation.training.epochs for cell in given[:2]] == [9, 5]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_what_a_sweep_returns_and_writes(finished, digits):
    folder, found = finished
    assert json.loads((folder / "sweep.json").read_text()) == found
    names = ["random", "dm-window", "selmatch"]
    assert [(row["method"], row["share"]) for row in found] == [
        *((name, share) for name in names for share in SHARES),
        ("all", 1.0),
    ]
    keys = ["method", "share", "mean", "std", "networks", "covered", "covered_easy", "covered_hard"]
    for row in found:
        assert list(row) == keys and row["networks"] == 2 and 0 <= row["mean"] <= 100
        assert all(0 <= row[key] <= 1 for key in keys[5:])
    for name in ("accuracy.png", "coverage.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    table = (folder / "sweep.md").read_text()
    assert all(f"| {name} " in table for name in (*names, "all")) and f"{found[0]['mean']:.1f} ± " in table


def test_a_cell_is_what_its_parts_are(finished, digits):
    """Accuracy and coverage of a cell, computed once more from its set; of a selection, from its images."""
    folder, found = finished
    context, evaluation = Context(digits), BASE.evaluation
    measure = coverage_measure(context, sweep_module.Coverage(1), BASE.start.features, folder / "measure")
    by_name = {(row["method"], row["share"]): row for row in found}
    ipcs = [round(share * len(digits.train) / 10) for share in SHARES]
    for share, ipc in zip(SHARES, ipcs, strict=True):
        training = replace(evaluation.training, epochs=same_updates(evaluation.training, 10 * ipcs[0], 10 * ipc))
        how = replace(evaluation, training=training)
        place = folder / "cells" / "dm-window" / f"{share}"
        distilled = DistilledSet.load(place / "distilled.safetensors")
        assert len(distilled) == 10 * ipc and distilled.distilled.sum() == 10 * (ipc // 2)
        chosen = DistilledSet.load(folder / "cells" / "random" / f"{share}" / "random.safetensors")
        chosen.distilled[:] = False
        for name, images in (("dm-window", distilled), ("random", chosen)):
            row, accuracy = by_name[name, share], evaluate(images, context, how)["test"]
            assert (row["mean"], row["std"]) == (accuracy.mean, accuracy.std)
            covered = measure.measure(images)
            assert [100 * row[f"covered{end}"] for end in ("", "_easy", "_hard")] == pytest.approx(
                [covered[group] for group in ("all", "easy", "hard")]
            )
    everything = real_subset(digits, torch.arange(len(digits.train)), "all")
    epochs = same_updates(evaluation.training, 10 * ipcs[0], len(digits.train))
    how = replace(evaluation, training=replace(evaluation.training, epochs=epochs))
    assert found[-1]["mean"] == evaluate(everything, context, how)["test"].mean


def test_a_cell_has_the_bits_of_selmatch_run(finished, tmp_path):
    """The cell's settings.json, run alone."""
    place = finished[0] / "cells" / "selmatch" / "0.02"
    alone = Run.load(place)
    assert alone.experts == BASE.experts and isinstance(alone.start, Start)
    run(alone, tmp_path, CPU)
    assert (tmp_path / "distilled.safetensors").read_bytes() == (place / "distilled.safetensors").read_bytes()
    record = json.loads((tmp_path / "evaluation_selmatch.json").read_text())
    assert record == json.loads((place / "evaluation_selmatch.json").read_text())


def test_experts_and_scores_are_made_once(finished):
    folder = finished[0]
    made = sorted(p.name.partition("-")[0] for p in (folder / "shared").iterdir())
    assert made == ["experts", "features", "scores"]
    (store,) = (folder / "shared").glob("experts-*")
    assert ExpertStore(store).count == 2
    assert not [p for p in (folder / "cells").rglob("*") if "expert" in p.name or p.name == "scores.npz"]


def test_a_finished_cell_is_not_run_again(finished, monkeypatch):
    folder, found = finished
    before = files(folder)
    for name in ("prepare", "run", "coverage"):
        monkeypatch.setattr(sweep_module._Study, name, lambda *rest: pytest.fail("worked for nothing"))
    assert sweep(SWEEP, BASE, folder, CPU) == found and files(folder) == before


def test_more_curves_and_other_settings(finished, tmp_path):
    folder, found = finished
    few = replace(SWEEP, curves=CURVES[:1])
    assert sweep(few, BASE, folder, CPU) == [*found[:2], found[-1]]
    with pytest.raises(ValueError, match="other settings .evaluation.networks: 2 → 1"):
        sweep(SWEEP, replace(BASE, evaluation=replace(BASE.evaluation, networks=1)), folder, CPU)
    with pytest.raises(ValueError, match="other settings .networks: 1 → 2"):
        sweep(replace(SWEEP, coverage_networks=2), BASE, folder, CPU)
    assert sweep(SWEEP, BASE, folder, CPU) == found


def test_what_cannot_work_is_refused_before_any_training(tmp_path, monkeypatch):
    for module in ("training.train", "experts.train_on_real", "methods.loop._iterate"):
        monkeypatch.setattr(f"selmatch_ext.{module}", lambda *rest: pytest.fail("trained for nothing"))
    for curve, message in (
        ("selmatch,max-start-epoch=99", "99"),
        ("dm,model=LeNet", "LeNet"),
        ("select,start.select=window,start.window.beta=0.99", "beta 0.99 runs past class"),
        ("dm,strategy=blur", "strategy"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep(Sweep(("random=select", curve), (0.05,)), BASE, tmp_path, CPU)


def test_alone_a_rank_waits_for_nobody(monkeypatch, capsys):
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 1)
    assert (ranks.world(), ranks.first()) == (2, False)
    with ranks.alone():
        assert (ranks.world(), ranks.first(), list(ranks.mine(2))) == (1, True, [0, 1])
        ranks.barrier()
        for _ in ranks.progress(iterable=range(3)):
            pass
    assert (ranks.world(), ranks.first()) == (2, False) and capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process leaves that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = selmatch(1, *COMMAND, "--out", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_killed_at_any_cell_it_ends_with_the_same_bytes(whole, tmp_path):
    killed = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "selmatch_ext", *COMMAND, "--device", "cpu", "--out", str(killed)]
    for wanted in ("dm-window/0.02/checkpoint.safetensors", "selmatch/0.02/evaluation_selmatch.json"):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (killed / "cells" / wanted).exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "sweep.json").exists(), "the kills came too late to show anything"
    done = {p: p.stat().st_mtime_ns for p in killed.glob("cells/*/*/results.json")}  # none half written
    last = selmatch(1, *COMMAND, "--out", killed)
    assert last.returncode == 0 and done and all(p.stat().st_mtime_ns == t for p, t in done.items())
    assert files(killed) == files(whole)
    bars = set(re.findall(r"(\d+)/5 ", last.stderr))
    assert str(len(done)) in bars and "5" in bars and not re.search("evaluation|iteration/s", last.stderr)


def test_two_processes_end_with_the_bytes_of_one(whole, tmp_path):
    done = selmatch(2, *COMMAND, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("test accuracy") == 1  # one rank reports
    assert files(tmp_path) == files(whole)


def test_the_settings_of_a_recipe_are_the_sweeps(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(cli.cli_studies, "run_sweep", lambda *arguments: seen.append(arguments))
    arguments = ["sweep", "--settings", "selmatch-cifar10-ipc250", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main(arguments) == 0
    (settings, base, folder, device), recipe = seen[0], cli.recipes.find("selmatch-cifar10-ipc250").settings
    assert settings == Sweep() and (folder, device) == (tmp_path, CPU)
    assert (base.data, base.evaluation, base.start.scores) == (recipe.data, recipe.evaluation, recipe.start.scores)
