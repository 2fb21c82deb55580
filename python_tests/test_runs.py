"""One path for every method: where the images come from, which share of them is learned, and how."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CPU, MEASURED, MODEL, tiny_run
from torch.nn.functional import one_hot

from selmatch_ext import cli
from selmatch_ext.cli_settings import OF_THE_SET, data_of
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, real_subset
from selmatch_ext.methods import METHODS, loop
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.provenance import from_dict, to_dict
from selmatch_ext.runner import Run, run
from selmatch_ext.seeds import generator
from selmatch_ext.selection.start import random_like
from selmatch_ext.settings import Data, Scores, Start, Training, Window
from selmatch_ext.training import combined_augmenter

LOOPS = {"outer_loop": 1, "inner_loop": 1, "batch_real": 5, "model": MODEL, "lr_images": 1.0}
# Two batches are all 40 images, so that each of them is learned.
MATCHING = {
    "inner_steps": 2,
    "expert_epochs": 1,
    "max_start_epoch": 2,
    "batch_syn": 20,
    "lr_images": 10.0,
    "lr_lr": 1e-8,
}
SHORT = {
    "dc": {**LOOPS, "iterations": 3},
    "dsa": {**LOOPS, "iterations": 3},
    "dm": {"iterations": 3, "batch_real": 5, "model": MODEL},
    "mtt": {**MATCHING, "iterations": 3},
    "datm": {**MATCHING, "iterations": 3, "first_max_start_epoch": 1},
    "selmatch": {**MATCHING, "iterations": 3},
    "dd": {"steps": 2, "epochs": 1, "networks": 1, "passes": 3, "batch_real": 300, "model": MODEL, "lr_init": 0.05},
    "ld": {"iterations": 3, "batch_syn": 20, "batch_real": 50, "model": MODEL, "lr_labels": 0.05},
}
"""Methods of real images and networks; test_kernel_methods.py has those of kernel regression."""


@pytest.fixture(scope="module")
def scores(digits, tmp_path_factory):
    """A file of scores, so that no network has to be trained for them."""
    path = tmp_path_factory.mktemp("scores") / "s.npy"
    np.save(path, np.random.default_rng(0).random(len(digits.train)))
    return str(path)


def short_run(method, select, alpha, scores):
    tiny = tiny_run()
    start = Start(select, 4, alpha, Window(0.25), Scores(f"el2n:{scores}"))
    settings = METHODS[method].settings_type(**SHORT[method], checkpoint_seconds=0.0)
    evaluation = replace(tiny.evaluation, networks=1, training=replace(tiny.evaluation.training, epochs=1))
    parts = {"data": Data("digits", per_class=30), "start": start, "experts": tiny.experts, "evaluation": evaluation}
    return Run(method, settings, **parts, seed=5)


@pytest.fixture(scope="module")
def experts(scores, tmp_path_factory):
    """The folder of expert trajectories that all these runs use."""
    folder = tmp_path_factory.mktemp("experts")
    run(short_run("mtt", "random", 1.0, scores), tmp_path_factory.mktemp("first"), CPU, folder)
    return folder


def changes(start, made):
    """(n,) bool: the images of `made` that are not those of `start`, or have other labels."""
    found = (start.images != made.images).flatten(1).any(1)
    if made.labels.is_floating_point():
        found |= (made.labels != one_hot(start.hard_labels, 10)).any(1)
    return found


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in MEASURED}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("select", ["random", "window"])
@pytest.mark.parametrize("method", SHORT)
def test_every_method_from_every_start(method, select, alpha, scores, experts, tmp_path, monkeypatch):
    asked, whole, killed = short_run(method, select, alpha, scores), tmp_path / "whole", tmp_path / "killed"
    results = run(asked, whole, CPU, experts)
    assert set(results) == {"random", "start", method} and all(0 <= r["mean"] <= 100 for r in results.values())
    start, made = (DistilledSet.load(whole / f"{name}.safetensors") for name in ("start", "distilled"))
    assert made.distilled.view(10, 4).tolist() == [[alpha == 1] * 2 + [True] * 2] * 10
    assert torch.equal(changes(start, made), made.distilled) and made.method == method and start.method == select

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        step, steps = loop._iterate, []

        def dying(*rest):
            steps.append(rest)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return step(*rest)

        patch.setattr(loop, "_iterate", dying)
        run(asked, killed, CPU, experts)
    assert not (killed / "distilled.safetensors").exists() and (killed / "checkpoint.safetensors").exists()
    assert run(asked, killed, CPU, experts) == results
    assert files(killed) == files(whole)


@pytest.mark.parametrize("select", ["noise", "correct", "herding", "el2n"])
def test_other_starts(select, scores, experts, tmp_path):
    asked = short_run("dm", select, 0.5, scores)
    features = replace(asked.start.features, model=MODEL, training=Training(epochs=1))
    asked = replace(asked, start=replace(asked.start, features=features))
    run(asked, tmp_path, CPU, experts)
    start, made = (DistilledSet.load(tmp_path / f"{name}.safetensors") for name in ("start", "distilled"))
    assert torch.equal((start.images != made.images).flatten(1).any(1), made.distilled) and made.distilled.sum() == 20
    assert torch.equal(start.indices == -1, made.distilled if select == "noise" else torch.zeros(40, dtype=torch.bool))


def test_a_set_in_a_file_says_which_images_are_learned(scores, experts, tmp_path):
    run(short_run("dm", "window", 0.5, scores), tmp_path / "first", CPU)
    path = tmp_path / "first" / "distilled.safetensors"
    run(short_run("mtt", str(path), 1.0, scores), tmp_path / "second", CPU, experts)
    first, second = DistilledSet.load(path), DistilledSet.load(tmp_path / "second" / "distilled.safetensors")
    changed = (first.images != second.images).flatten(1).any(1)
    assert torch.equal(changed, first.distilled) and torch.equal(second.distilled, first.distilled)


def test_a_start_that_there_is_not(scores, tmp_path):
    with pytest.raises(ValueError, match="start.select is 'widow'; it must be one of window, random, .*path of a set"):
        run(short_run("dm", "widow", 1.0, scores), tmp_path, CPU)
    with pytest.raises(ValueError, match="steps is 3: .* start.ipc must be a multiple of it"):
        asked = short_run("dd", "random", 1.0, scores)
        run(replace(asked, settings=replace(asked.settings, steps=3)), tmp_path, CPU)


def test_the_three_sets_are_trained_on_alike(digits):
    """By default in the methods whose papers do so: real images are augmented as learned ones."""
    for method in METHODS:
        evaluation = Run.of(method).evaluation
        assert evaluation.selected_strategy == ("simple" if method == "selmatch" else None)
    same = combined_augmenter(torch.arange(10) < 5, "flip", None, (8, 8))(torch.arange(10), generator(0))
    flips = sample_augmentation(10, 8, 8, strategy="flip", per_sample=True, generator=generator(0))
    assert all(torch.equal(a, b) for a, b in zip(same, flips, strict=True))


def test_random_images_stand_where_those_of_the_start_do(digits):
    labels = torch.tensor([3, 1, 3, 0, 9, 9, 9])
    chosen = torch.stack([digits.members[c][0] for c in labels])
    start = real_subset(digits, chosen, "window")
    start = replace(start, mean=start.mean + 0.5)
    random = random_like(start, Context(digits, 4))
    assert torch.equal(random.labels, labels) and len(random.indices.unique()) == 7
    assert torch.equal(random.mean, start.mean)


def test_a_learned_start_is_trained_on_as_what_it_is(scores, tmp_path):
    first = short_run("dm", "random", 1.0, scores)
    first = replace(first, evaluation=replace(first.evaluation, selected_strategy="crop"))
    made = run(first, tmp_path / "a", CPU)
    path = str(tmp_path / "a" / "distilled.safetensors")
    second = run(replace(first, start=replace(first.start, select=path)), tmp_path / "b", CPU)
    assert second["start"] == made["dm"]


def test_a_wrong_score_file_is_refused_before_experts_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("selmatch_ext.experts.train_on_real", lambda *rest: pytest.fail("trained for nothing"))
    with pytest.raises(FileNotFoundError, match="nofile.npz"):
        run(short_run("mtt", "window", 1.0, tmp_path / "nofile.npz"), tmp_path / "out", CPU)


def test_settings_of_another_method_are_refused():
    with pytest.raises(ValueError, match="settings is of the class SelMatchSettings; .* dm are DMSettings"):
        Run("dm")


# from the command line


QUICK = [
    *("--data.dataset", "digits", "--device", "cpu", "--evaluation.model", MODEL, "--evaluation.networks", "1"),
    *("--evaluation.training.epochs", "1"),
]


def test_a_window_partly_learned_by_dm_and_the_run_repeated_from_its_settings(scores, tmp_path, capsys):
    start = ["--start.select", "window", "--start.alpha", "0.6", "--start.scores.source", f"el2n:{scores}"]
    method = ["--model", MODEL, "--iterations", "2", "--start.window.beta", "0.2"]
    assert cli.main(["run", "dm", *QUICK, *start, *method, "--out", str(tmp_path / "a")]) == 0
    for number, given in enumerate((tmp_path / "a" / "settings.json", tmp_path / "a")):
        out = tmp_path / str(number)
        assert cli.main(["run", "--settings", str(given), "--device", "cpu", "--out", str(out)]) == 0
        assert files(out) == files(tmp_path / "a")
    assert DistilledSet.load(tmp_path / "a" / "distilled.safetensors").distilled.sum() == 60
    assert "digits, 10 images per class, β = 0.20" in capsys.readouterr().out


MODULE = '''
from selmatch_ext.methods import Method, MethodSettings
import torch
from dataclasses import dataclass
from selmatch_ext.ranges import Positive

@dataclass(frozen=True)
class Settings(MethodSettings):
    """Fades."""
    speed: Positive = 0.5
    """How fast."""

class Fading(Method):
    name = "fading"
    settings_type = Settings
    def optimizer(self):
        return torch.optim.SGD([self.images], lr=self.settings.speed)
    def loss(self, iteration, generator):
        return self.images.square().sum()

class random(Fading):
    name = "random"

@dataclass(frozen=True)
class Clash(MethodSettings):
    seed: Positive = 0.5

class Clashing(Fading):
    settings_type = Clash
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "fading_method.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_method_of_ones_own_with_its_settings_as_options(module, tmp_path, capsys):
    name, out = "fading_method:Fading", tmp_path / "out"
    command = ["run", name, *QUICK, "--iterations", "2", "--start.ipc", "2", "--out"]
    assert cli.main([*command, str(out), "--speed", "0.25"]) == 0
    start, made = (DistilledSet.load(out / f"{part}.safetensors") for part in ("start", "distilled"))
    torch.testing.assert_close(made.images, start.images / 4)
    assert set(json.loads((out / "results.json").read_text())) == {"random", "start", "fading"}
    assert cli.main([*command, str(tmp_path / "x"), "--speed", "-1"]) == 2
    assert "--speed is -1.0; allowed is above 0" in capsys.readouterr().err
    settings = ["--settings", str(out), "--device", "cpu", "--out", str(tmp_path / "again")]
    assert cli.main(["run", *settings]) == 1
    assert "data file does not choose which code runs; name the method" in capsys.readouterr().err
    assert cli.main(["run", name, *settings]) == 0
    assert (tmp_path / "again" / "distilled.safetensors").read_bytes() == (out / "distilled.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_module:X", "No module named 'no_module'"),
        ("fading_method.py:Fading", "is written without .py, and from the folder of the file: fading_method:Fading"),
        ("fading_method:Nothing", "has no class Nothing that is a selmatch_ext.methods.Method"),
        ("fading_method:torch", "has no class torch that is a selmatch_ext.methods.Method"),
        ("fading_method:random", "its name is 'random'; it must consist of .* and not be one of random, start"),
        ("fading_method:Clashing", "its settings cannot be called seed, as other options are"),
        (":X", "no method is called ':X'"),
        ("dx", f"no method is called 'dx'; there are {', '.join(METHODS)}, and package.module:Class"),
    ],
)
def test_methods_that_there_are_not(module, name, message, tmp_path, capsys):
    assert cli.main(["run", name, "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(message, line)


def test_a_settings_file_does_not_choose_code(scores, tmp_path, capsys):
    asked = short_run("dm", "random", 1.0, scores)
    asked = replace(asked, settings=replace(asked.settings, model="my_module:make"))
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(to_dict(asked)))
    assert cli.main(["run", "--settings", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "add --model my_module:make" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, "seed is 1, which is not of its type, int"),
        ({"seed": True}, "seed is True, which is not of its type, int"),
        ({"sed": 1}, "sed is no setting of Run"),
        ({"start": {"ipc": 0}}, "start: ipc is 0; allowed is a whole number from 1"),
        ({"start": {"window": {"beta": "x"}}}, "start: window: beta is x, which is not of its type, "),
        ({"start": [1]}, "start is .1.; it must be an object"),
        ({"evaluation": {"training": {"schedule": "no"}}}, "schedule is no, which is not of its type, "),
        ({"method": 3}, "method is 3"),
        ({"method": "dx"}, "no method is called 'dx'"),
    ],
)
def test_settings_files_that_make_no_sense(scores, tmp_path, change, message):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(to_dict(short_run("dm", "random", 1.0, scores)) | change))
    with pytest.raises(ValueError, match=f"settings.json.*{message}" if "dx" not in message else message):
        Run.load(path)


@pytest.mark.parametrize("method", METHODS)
def test_settings_survive_their_file(method, tmp_path):
    asked = Run.of(method, seed=3)
    (tmp_path / "settings.json").write_text(json.dumps(to_dict(asked)))
    assert Run.load(tmp_path) == asked == from_dict(Run, json.loads(json.dumps(to_dict(asked))), "x", Run.of(method))


def test_the_data_set_comes_from_the_set_unless_it_is_named(scores, tmp_path, capsys):
    asked = short_run("dm", "random", 1.0, scores)
    run(asked, tmp_path / "run", CPU)
    path = str(tmp_path / "run" / "distilled.safetensors")
    command = ["evaluate", path, "--device", "cpu", *QUICK[4:]]
    assert cli.main(command) == 0
    capsys.readouterr()
    assert cli.main([*command, "--data.dataset", "MNIST", "--data.root", str(tmp_path)]) == 1
    assert "MNIST is not under" in capsys.readouterr().err
    nameless = replace(DistilledSet.load(path), settings={})
    nameless.save(tmp_path / "nameless.safetensors")
    assert cli.main(["evaluate", str(tmp_path / "nameless.safetensors"), *command[2:]]) == 1
    assert "does not say of which data set it is; name it by --data.dataset" in capsys.readouterr().err


def test_the_seed_that_drew_the_images_comes_from_the_set_too(scores, tmp_path):
    run(short_run("dm", "random", 1.0, scores), tmp_path / "run", CPU)
    path = tmp_path / "run" / "distilled.safetensors"
    data, seed = data_of(OF_THE_SET, path, 0)
    assert (data.dataset, data.per_class, seed) == ("digits", 30, 5)
    assert data_of(Data("digits"), path, 2) == (Data("digits"), 2)


def test_settings_of_a_selection_are_for_verbs_without_a_method(scores, tmp_path, capsys):
    select = ["select", "--data.dataset", "digits", "--device", "cpu", "--start.ipc", "3", "--start.select", "random"]
    assert cli.main([*select, "--out", str(tmp_path / "a")]) == 0
    again = ["select", "--settings", str(tmp_path / "a"), "--device", "cpu", "--out", str(tmp_path / "b")]
    assert cli.main(again) == 0 and files(tmp_path / "a") == files(tmp_path / "b")
    capsys.readouterr()
    assert cli.main(["run", *again[1:]]) == 1
    assert "has no method: it is not of selmatch run or selmatch distill" in capsys.readouterr().err
    assert cli.main(["run", "dm", "--reduced", "--out", "x"]) == 1
    assert "--reduced needs --settings" in capsys.readouterr().err
