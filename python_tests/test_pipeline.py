"""A whole run on real digits, from Python and from the command line; kills and resumption."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, MEASURED, MODEL, tiny_run
from tqdm import tqdm

from selmatch_ext import cli
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, seen_as
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.load import load_data
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import Accuracy
from selmatch_ext.methods import METHODS
from selmatch_ext.provenance import to_dict
from selmatch_ext.runner import distill, run
from selmatch_ext.selection import start, window_search
from selmatch_ext.selection.difficulty import training_difficulty
from selmatch_ext.selection.features import trained_networks
from selmatch_ext.selection.start import Chosen
from selmatch_ext.settings import Data, Features, Scores, Start, Training, Window


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, run(tiny_run(), folder, CPU)


def test_a_run_writes_what_it_promises(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results) == {"random", "start", "selmatch"}
    assert all(0 <= r["mean"] <= 100 and r["std"] >= 0 for r in results.values())
    for name in ("distilled.png", "selected.png", "beta.png", "loss.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    subset = DistilledSet.load(folder / "distilled.safetensors")
    assert subset.images.shape == (60, 1, 8, 8) and subset.distilled.sum() == 30
    saved, wanted = dict(subset.settings), json.loads(json.dumps(to_dict(tiny_run())))
    assert saved.pop("beta") in {0.0, 0.5} | {1 - 6 / 116}
    assert saved.pop("started_from") == DistilledSet.load(folder / "start.safetensors").digest()
    experts, asked = saved.pop("experts"), wanted.pop("experts")
    assert experts["count"] == asked.pop("count") and experts["settings"] == asked and not experts["zca"]
    assert saved == wanted
    assert "random" in (folder / "table.md").read_text()


def test_a_finished_run_is_not_done_again(finished):
    folder, results = finished
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("expert*")} | {
        folder / "scores.npz": (folder / "scores.npz").stat().st_mtime_ns
    }
    assert run(tiny_run(), folder, CPU) == results
    assert all(p.stat().st_mtime_ns == t for p, t in files.items())


def test_other_settings_in_the_same_folder_are_refused(finished):
    with pytest.raises(ValueError, match="seed: 0 → 5"):
        run(tiny_run(seed=5), finished[0], CPU)


def test_the_window_is_chosen_without_test_images(digits, monkeypatch, tmp_path):
    def fake(subset, *rest):
        beta = float(str(rest[2]).rpartition("_")[2][:6])
        return {"train": Accuracy([90.0 if beta == 0.5 else 80.0]), "test": Accuracy([50.0 if beta == 0.5 else 95.0])}

    monkeypatch.setattr(window_search, "evaluate", fake)
    settings = tiny_run()
    difficulty = torch.rand(len(digits.train.labels), generator=torch.Generator().manual_seed(0))
    beta, tried = window_search.search_window(
        Context(digits), difficulty, settings.start, settings.evaluation, tmp_path
    )
    assert beta == 0.5 and len(tried) == 3


def test_scores_of_the_full_set_are_picked_for_a_subset(digits, tmp_path):
    scores = np.random.default_rng(0).random(len(digits.train.labels), dtype=np.float32)
    np.savez(tmp_path / "c.npz", scores=scores, labels=digits.train.labels.numpy())
    settings = Data(dataset="digits", per_class=50)
    data = load_data(settings, seed=3)
    easier = training_difficulty(Context(data, 3), Scores(source=str(tmp_path / "c.npz")), tmp_path / "none")
    harder = training_difficulty(Context(data, 3), Scores(source=f"forgetting:{tmp_path / 'c.npz'}"), tmp_path / "none")
    assert torch.equal(harder, torch.from_numpy(scores)[data.full.kept]) and torch.equal(easier, -harder)


def test_scores_of_a_subset_are_read_back(tmp_path):
    """What is computed for a subset can be given for it, also as a file, but not for a subset of another seed."""
    settings, computed = Data(dataset="digits", per_class=50), Scores("el2n", MODEL, 1, training=Training(epochs=1))
    data = load_data(settings, seed=3)
    path = tmp_path / "scores.npz"
    scores = training_difficulty(Context(data, 3), computed, path)
    given = Scores(f"el2n:{path}")
    assert torch.equal(training_difficulty(Context(data, 3), given, tmp_path / "none"), scores)
    other = load_data(settings, seed=4)
    with pytest.raises(ValueError, match=r"other images than those of digits \(50 a class\): another subset or seed"):
        training_difficulty(Context(other, 4), given, tmp_path / "none")


def test_scores_of_the_full_set_do_not_whiten_it(tmp_path, digits, monkeypatch):
    np.save(tmp_path / "c.npy", np.arange(len(digits.train), dtype=np.float32))
    settings = Data(dataset="digits", per_class=50, zca=True)
    data = load_data(settings, seed=3)
    monkeypatch.setattr(ImageData, "whitened", lambda self: pytest.fail("whitened for nothing"))
    scores = Scores(f"el2n:{tmp_path / 'c.npy'}")
    difficulty = training_difficulty(Context(data, 3), scores, tmp_path / "none")
    assert torch.equal(difficulty, data.full.kept.float())


@pytest.mark.parametrize("change", ["images", "zca"])
def test_kept_scores_and_networks_of_other_images_under_the_same_name_are_refused(digits, tmp_path, change):
    flipped = replace(digits.train, images=digits.train.images.flip(3))
    other = digits.whitened() if change == "zca" else replace(digits, train=flipped)
    scores = Scores("el2n", MODEL, 1, training=Training(epochs=1))
    features = Features(MODEL, "none", Training(epochs=1))
    for data in (digits, other):
        if data is other:
            with pytest.raises(ValueError, match="made with other settings"):
                training_difficulty(Context(data), scores, tmp_path / "scores.npz")
            with pytest.raises(ValueError, match=f"made with other settings .*{change}: "):
                trained_networks(Context(data), features, tmp_path)
        else:
            training_difficulty(Context(data), scores, tmp_path / "scores.npz")
            trained_networks(Context(data), features, tmp_path)


def test_a_run_with_a_given_beta_searches_no_window(tmp_path):
    run(tiny_run(start=replace(tiny_run().start, window=Window(beta=0.5))), tmp_path, CPU)
    assert not (tmp_path / "window").exists() and not (tmp_path / "beta.png").exists()
    assert DistilledSet.load(tmp_path / "distilled.safetensors").settings["beta"] == 0.5


def selmatch(*arguments, check=True):
    return subprocess.run(
        [sys.executable, "-m", "selmatch_ext", *map(str, arguments)], capture_output=True, text=True, check=check
    )


DISTILL = [
    *("--data.dataset", "digits", "--iterations", "150", "--inner-steps", "4", "--expert-epochs", "1"),
    *("--max-start-epoch", "2", "--batch-syn", "25", "--checkpoint-seconds", "0", "--device", "cpu"),
]


def saved_at(path):
    return path.stat().st_mtime_ns if path.exists() else None


def test_killed_at_any_moment_it_ends_with_the_same_bits(finished, tmp_path):
    start, experts = finished[0] / "start.safetensors", finished[0] / "experts"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = ["distill", "selmatch", "--start.select", start, "--experts", experts, *DISTILL]
    selmatch(*given, "--out", whole)
    command = [sys.executable, "-m", "selmatch_ext", *given, "--out", killed]
    moments = random.Random(0)
    for _ in range(3):
        before = saved_at(killed / "checkpoint.safetensors")
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and saved_at(killed / "checkpoint.safetensors") == before:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "distilled.safetensors").exists(), "the kills came too late to show anything"
    selmatch(*command[3:])
    one, other = (DistilledSet.load(f / "distilled.safetensors") for f in (whole, killed))
    assert torch.equal(one.images, other.images) and one.lr == other.lr
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in killed.iterdir())


def run_until(folder, victim, write, half):
    """`selmatch run` in this process, killed when it writes the file `victim` for the write-th time: with half of the
    new file written beside the old one, or when it has taken its place."""
    written = []

    def die(event, arguments):
        if event == "os.rename" and Path(arguments[1]) == victim:
            written.append(victim)
            if half and len(written) == write:
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "shutil.rmtree" and len(written) == write:
            os.kill(os.getpid(), signal.SIGKILL)

    tqdm.set_lock(threading.RLock())  # its own would outlive us
    sys.addaudithook(die)
    run(tiny_run(), folder, CPU)


MOMENTS = {  # which file, and the how many-th time that a run writes it
    "settings.json": 1,
    "scores.npz": 1,
    "window/beta_0.0000.json": 1,
    "window/beta_0.5000.json": 1,
    "experts/expert_0000.safetensors": 1,
    "experts/expert_0001.safetensors": 1,
    "start.safetensors": 1,
    "losses.csv": 1,
    "checkpoint.safetensors": 2,
    "times.json": 1,
    "distilled.safetensors": 1,
    "loss.png": 1,
    "evaluation_random.json": 2,
    "evaluation_selmatch.json": 1,
    "table.md": 1,
    "results.json": 1,
    "report.html": 1,
}


def test_a_whole_run_killed_again_and_again_ends_with_the_same_bits(finished, tmp_path):
    """A killed run leaves what is on the disk, which changes where files are written: it dies there, in every stage."""
    processes = multiprocessing.get_context("forkserver")  # a new process for each run, without its imports
    processes.set_forkserver_preload(["selmatch_ext.cli", "matplotlib.figure", "sklearn.datasets"])
    whole, killed = finished[0], tmp_path / "run"
    for i, (name, write) in enumerate(MOMENTS.items()):
        process = processes.Process(target=run_until, args=(killed, killed / name, write, i % 2 == 0))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, name
    run(tiny_run(), killed, CPU)
    made, wanted = ({p.relative_to(f): p for p in f.rglob("*")} for f in (killed, whole))
    assert made.keys() == wanted.keys()
    for name, path in made.items():
        assert path.is_dir() or path.name in MEASURED or path.read_bytes() == wanted[name].read_bytes(), name


def test_each_verb_from_the_command_line(finished, tmp_path):
    folder = finished[0]
    tiny = ["--start.scores.model", MODEL, "--start.scores.runs", "1", "--start.scores.training.epochs", "1"]
    digits = ["--data.dataset", "digits", "--device", "cpu"]
    selmatch("scores", *digits, *tiny, "--start.scores.source", "el2n", "--out", tmp_path / "el2n.npz")
    window = ["--start.ipc", "6", "--start.window.beta", "0.5", "--start.alpha", "0.5"]
    scores = ["--start.scores.source", f"el2n:{tmp_path / 'el2n.npz'}"]
    selmatch("select", *digits, *scores, *window, "--out", tmp_path / "select")
    assert DistilledSet.load(tmp_path / "select" / "window.safetensors").distilled.sum() == 30
    short = ["--evaluation.networks", "1", "--evaluation.model", MODEL, "--evaluation.training.epochs", "1"]
    shown = selmatch("evaluate", folder / "distilled.safetensors", "--device", "cpu", *short)
    assert "% over 1 networks" in shown.stdout
    selmatch("report", folder / "distilled.safetensors", "--out", tmp_path / "grid.png")
    selmatch("export", folder / "distilled.safetensors", "--out", tmp_path / "pngs")
    assert len(list((tmp_path / "pngs").rglob("*_distilled.png"))) == 30


def test_select_refuses_a_folder_made_with_other_settings(finished, tmp_path, capsys):
    command = ["select", "--data.dataset", "digits", "--device", "cpu", "--out", str(tmp_path / "select")]
    command += ["--start.scores.source", f"el2n:{finished[0] / 'scores.npz'}", "--start.ipc", "6"]
    command += ["--start.window.beta"]
    assert cli.main([*command, "0.5"]) == 0
    before = DistilledSet.load(tmp_path / "select" / "window.safetensors").digest()
    assert cli.main([*command, "0.5"]) == 0
    assert cli.main([*command, "0.25"]) == 1
    assert "other settings (start.window.beta: 0.5 → 0.25); choose another --out" in capsys.readouterr().err
    assert DistilledSet.load(tmp_path / "select" / "window.safetensors").digest() == before


def test_what_cannot_be_written_is_said_before_any_training(finished, tmp_path, monkeypatch, capsys):
    for module in ("training.train", "evaluation.train", "methods.loop._iterate"):
        monkeypatch.setattr(f"selmatch_ext.{module}", lambda *rest: pytest.fail("trained for nothing"))
    (tmp_path / "file").touch()
    window, out = str(finished[0] / "start.safetensors"), str(tmp_path / "file" / "out")
    for arguments in (
        ["scores", "--start.scores.source", "el2n", "--out", out],
        ["experts", "--out", out],
        ["select", "--start.select", "herding", "--out", out],
        ["distill", "selmatch", "--start.select", window, "--experts", str(finished[0] / "experts"), "--out", out],
        ["distill", "dm", "--out", out],
        ["evaluate", window, "--record", out],
        ["coverage", window, "--out", out],
        ["cross", window, "--models", MODEL, "--out", out],
        ["continual", window, "--out", out],
        ["search", window, "--search.depths", "1", "2", "--out", out],
        ["report", window, "--out", out],
        ["export", window, "--out", out],
        ["run", "selmatch", "--out", out],
    ):
        data = [] if arguments[0] in ("report", "export") else ["--data.dataset", "digits", "--device", "cpu"]
        assert cli.main([*arguments, *data]) == 1, arguments
        assert "file is a file, not a folder" in capsys.readouterr().err.splitlines()[-1], arguments
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_damaged_settings_of_a_run_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        run(tiny_run(), tmp_path, CPU)


@pytest.mark.parametrize("verb", [*cli.VERBS, "run dm", "distill mtt"])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and {"evaluate": "--record", "doctor": "--json"}.get(verb, "--out") in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nothing.safetensors", "--data.dataset", "digits"], "nothing.safetensors"),
        (["distill", "dam"], f"no method is called 'dam'; there are {', '.join(METHODS)}, and package."),
        (["scores", "--data.dataset", "cifar", "--out", "x.npz"], "'cifar'; allowed are digits"),
        (["scores", "--data.dataset", "digits", "--start.scores.source", "loss", "--out", "x"], "one of forgetting"),
        (["scores", "--data.dataset", "digits", "--device", "cuda:77", "--out", "x"], "device 'cuda:77' is not"),
        (["run", "selmatch", "--data.dataset", "digits", "--start.ipc", "500", "--out", "{tmp}/r", "--device", "cpu",
          "--start.scores.source", "{scores}"], "ipc is 500"),
        (["run", "dm", "--data.dataset", "digits", "--start.select", "el2n", "--start.ipc", "6",
          "--start.window.beta", "0.99", "--out", "{tmp}/r",
          "--device", "cpu", "--start.scores.source", "{scores}"], "beta 0.99 runs past class"),
        (["demo", "--out", "{tmp}/file/demo", "--device", "cpu"], "cannot write"),
    ],
)  # fmt: skip
def test_errors_are_one_line_that_names_what_is_wrong(arguments, message, tmp_path, capsys, finished):
    (tmp_path / "file").write_text("")
    scores = f"el2n:{finished[0] / 'scores.npz'}"
    assert cli.main([a.format(tmp=tmp_path, scores=scores) for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("selmatch: ") and message in error


def test_a_demo_with_another_seed_sets_the_old_one_aside(tmp_path):
    place = cli.Place(tmp_path / "demo", "cpu")
    parts = {name: value for name, value in vars(tiny_run()).items() if name not in ("method", "seed")}
    cli.demo(**parts, place=place)
    first = (tmp_path / "demo" / "results.json").read_text()
    cli.demo(**parts, seed=1, place=place)
    assert (tmp_path / "demo.1" / "results.json").read_text() == first
    assert json.loads((tmp_path / "demo" / "settings.json").read_text())["seed"] == 1


def test_experts_of_other_images_are_refused(finished, digits, tmp_path):
    begin, store = Chosen(DistilledSet.load(finished[0] / "start.safetensors")), ExpertStore(finished[0] / "experts")
    other = replace(digits, train=replace(digits.train, images=digits.train.images.flip(3)))
    with pytest.raises(ValueError, match="made with other settings .images: [0-9a-f]{64} → [0-9a-f]{64}"):
        distill(tiny_run(), begin, Context(other), tmp_path, store)


def test_experts_of_plain_images_are_refused_for_whitened_ones(digits, experts, tmp_path):
    begin = start.choose(Start("random", 6), Context(digits.whitened()), None, tmp_path)
    with pytest.raises(ValueError, match="made with other settings .zca: False → True"):
        distill(tiny_run(), begin, Context(digits), tmp_path, experts)


def test_a_saved_set_says_what_it_was_made_from(digits, experts, tmp_path):
    begin = start.choose(Start("random", 6), Context(digits), None, tmp_path)
    settings = tiny_run(settings=replace(tiny_run().settings, snapshot_every=3), seed=7)
    made = distill(settings, begin, Context(digits, 7), tmp_path, experts).distilled()
    expected = json.loads(json.dumps(to_dict(settings))) | {"experts": {"count": 2, **experts.metadata}}
    expected |= {"beta": None, "started_from": begin.images.digest()}
    assert made.settings == DistilledSet.load(tmp_path / "distilled.safetensors").settings == expected
    assert DistilledSet.load(tmp_path / "snapshots" / "iteration_000003.safetensors").settings == expected


def test_a_set_of_other_images_is_refused(finished, digits):
    subset = DistilledSet.load(finished[0] / "start.safetensors")
    with pytest.raises(ValueError, match="classes"):
        seen_as(replace(subset, class_names=[f"x{i}" for i in range(10)]), digits)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\), digits of \(1, 8, 8\)"):
        seen_as(replace(subset, images=subset.images[:, :, :4, :4]), digits)
    shifted = replace(subset, mean=subset.mean + 0.1)
    assert torch.equal(seen_as(shifted, digits).mean, shifted.mean)
