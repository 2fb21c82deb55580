"""`python -m bench`: everything is measured in one run, at tiny sizes; what cannot be measured is an error."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, tiny_run

from bench import equal_time
from bench.timing import Setting, alternate, rotations
from selmatch_ext import runner
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.load import load_data
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.methods import MTT, Task
from selmatch_ext.runner import Run
from selmatch_ext.selection.start import Kept, choose
from selmatch_ext.settings import Data, Start

ROOT = Path(__file__).parents[1]
ALWAYS = {"build", "machine", "device", "quick", "notes", "peaks"}
NAMES = {"augment", "block", "conv3x3", "convolutions", "distance", "first_layer", "gradient_distance", "kept_memory"}
NAMES |= {"shared", "training", "unroll"}


def bench(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def numbers(value, path=()):
    """(path, number) of everything that was measured."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, (*path, name))
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def test_everything_is_measured_in_one_run(tmp_path):
    done = bench("--device", "cpu", "--quick", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {*NAMES, *ALWAYS} and figures["device"] == "cpu" and figures["quick"]
    assert json.loads(done.stdout.splitlines()[-1]) == figures
    for name in (*NAMES, "peaks"):
        found = dict(numbers(figures[name]))
        assert found, name
        for path, number in found.items():
            assert math.isfinite(number), (name, path)
            # the resident size of tiny runs may not change, and neither may exactness
            assert number > 0 or {"peak_mb", "exactness"} & set(path), (name, path, number)
    step = figures["unroll"]["steps"]["instance norm"]["fused, IEEE float32"]
    assert step.keys() >= {"seconds", "speedup", "flops", "share_of_peak"}
    directions = {(row["direction"], row["memory"]) for row in figures["convolutions"]["rows"]}
    assert len(directions) == 6
    for case in figures["conv3x3"]["cases"].values():
        assert all(
            {"ours_share", "torch_share", "ours_flops", "ours_error", "torch_error"} <= c.keys() for c in case.values()
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["unrol"], "no measurement unrol; there are augment, block, conv3x3, "),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:NUMBER, got 'tpu'"),
        (["--device", "cuda:x"], "--device must be cpu, cuda or cuda:NUMBER, got 'cuda:x'"),
        (["--device", "cuda:9999"], "--device cuda:9999: torch finds"),
    ],
    ids=str,
)
def test_unknown_names_and_devices_are_errors(arguments, message):
    done = bench("--quick", *arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_calls_take_turns_over_their_inputs():
    calls = []
    given = {"a": [lambda: calls.append(0), lambda: calls.append(1)], "b": lambda: calls.append(2)}
    seconds = alternate(Setting(), given, repeats=3, warmup=1, in_a_row=4)
    assert seconds.keys() == {"a", "b"} and all(s >= 0 for s in seconds.values())
    assert [calls.count(k) for k in range(3)] == [8, 8, 16]
    assert rotations(Setting(), 100) == 1


def test_both_loops_make_the_same_updates_for_as_long(tmp_path, monkeypatch, capsys):
    """The plain loop's gradient is ours, what it makes is a snapshot of ours, and ours is told to run as long."""
    settings = replace(tiny_run().settings, lr_lr=1e-7)
    run = tiny_run(data=Data("digits", per_class=20), start=Start("random", 4, alpha=0.5), settings=settings)
    runner.run(run, tmp_path / "run", CPU)
    experts = tmp_path / "run" / "experts"
    context = Context(load_data(run.data, run.seed), run.seed)
    start = choose(run.start, context, run.evaluation, Kept.under(tmp_path)).images
    both = [MTT(Task(start, context, ExpertStore(experts)), run.settings) for _ in range(2)]
    equal_time.as_plain(both[1])
    ours, plain = (torch.autograd.grad(m.loss(0, torch.Generator().manual_seed(1)), [m.images, m.lr]) for m in both)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)

    seconds = equal_time.seconds_of_updates(run, context, experts, Kept.under(tmp_path))
    assert seconds.keys() == {"plain", "ours"} and min(seconds.values()) > 0

    monkeypatch.setattr(equal_time, "seconds_of_updates", lambda *_: {"plain": 0.5, "ours": 0.2})
    paths = ["--settings", "run", "--experts", "run/experts", "--out", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["equal_time", *paths, "--updates", "2"])
    equal_time.main()
    found = json.loads((tmp_path / "out" / "equal_time.json").read_text())
    assert (found["plain"]["updates"], found["ours"]["updates"]) == (2, 5)
    shown = [line for line in capsys.readouterr().out.splitlines() if "s an update" in line]
    assert shown[0].startswith("plain: 0.500 s an update; after 2 updates ") and shown[1].startswith("ours: 0.200 s")
    short = replace(run, settings=replace(run.settings, iterations=2))
    runner.distill_alone(short, tmp_path / "two", CPU, experts)
    made = DistilledSet.load(tmp_path / "two" / "distilled.safetensors")
    snapshot = DistilledSet.load(tmp_path / "out" / "ours" / "snapshots" / "iteration_000002.safetensors")
    assert torch.equal(made.images, snapshot.images)


def test_loops_that_would_not_make_the_same_updates_are_refused():
    datm = Run.of("datm")
    with pytest.raises(ValueError, match="first_max_start_epoch 10; .* where it is None"):
        equal_time.check(datm)
    equal_time.check(replace(datm, settings=replace(datm.settings, first_max_start_epoch=None)))
    with pytest.raises(ValueError, match="is of the method dm; allowed are MTT"):
        equal_time.check(Run.of("dm"))


@pytest.mark.gpu
def test_graphs_and_launches_on_a_gpu():
    setting = Setting("cuda")
    x = torch.ones(1000, device="cuda")
    sets = rotations(setting, x.nbytes)
    assert sets == 64
    seconds = alternate(setting, {"graph": [lambda: x + 1] * sets, "waits": lambda: (x + 1).sum().item()})
    assert all(s > 0 for s in seconds.values())
    assert len(setting.notes) == 1 and setting.notes[0].startswith("waits: timed over launches")
    assert (x + 1).sum().item() == 2000  # the device works on after a capture that failed
