"""losses.csv and the log for TensorBoard."""

import csv
import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_for, tiny_run
from torch.nn import functional as F

from selmatch_ext import cli
from selmatch_ext.context import Context
from selmatch_ext.methods import Method, SelMatch, Task
from selmatch_ext.methods.dd import DD, DDSettings
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Start


class Halving(Method):
    """Two tensors with step sizes of their own, halved after every second iteration; `at`: where it is killed."""

    name = "halving"
    max_loss = 100.0

    def __init__(self, at=None, spoil=None):
        self.at, self.spoil, self.state = at, spoil, {}
        self.learned = {"x": torch.full((3,), 2.0, requires_grad=True), "rate": torch.tensor(1.0, requires_grad=True)}

    def optimizer(self):
        groups = [{"params": [self.learned["x"]], "lr": 0.1}, {"params": [self.learned["rate"]], "lr": 0.02}]
        return torch.optim.SGD(groups, momentum=0.5)

    def decay(self, iteration):
        return 0.5 ** (iteration // 2)

    def learned_rates(self):
        return {"rate": self.learned["rate"].item()}

    def loss(self, iteration, generator):
        if iteration == self.at:
            raise KeyboardInterrupt
        loss = ((self.learned["x"] - torch.rand(3, generator=generator)) ** 2).sum() + self.learned["rate"] ** 2
        return loss * 1e6 if iteration == self.spoil else loss


def rows(folder):
    with open(folder / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_losses_and_rates_of_each_iteration(tmp_path):
    method = Halving()
    losses = run_for(method, 5, tmp_path)
    found = rows(tmp_path)
    assert [int(row["iteration"]) for row in found] == [1, 2, 3, 4, 5]
    assert [float(row["loss"]) for row in found] == losses  # to the last bit
    expected = [0.5 ** (i // 2) for i in range(5)]
    assert [float(row["step_size_x"]) for row in found] == [0.1 * e for e in expected]
    assert [float(row["step_size_rate"]) for row in found] == [0.02 * e for e in expected]
    # d/dr r² = 2 r, with momentum 0.5
    rate, velocity, seen = torch.tensor(1.0), torch.tensor(0.0), []
    for e in expected:
        seen.append(rate.item())
        velocity = 0.5 * velocity + 2 * rate
        rate = rate - 0.02 * e * velocity
    assert [float(row["learned_rate"]) for row in found] == pytest.approx(seen, rel=1e-5)
    assert list(found[0]) == ["iteration", "loss", "step_size_x", "step_size_rate", "learned_rate"]


def after_a_kill(folder, at, seconds=1000.0):
    """The file as a killed run leaves it: the last checkpoint is of iteration 3, `at` − 3 rows are of later ones."""
    run_for(Halving(), 3, folder)
    with pytest.raises(KeyboardInterrupt):
        run_for(Halving(at), 9, folder, checkpoint_seconds=seconds)


@pytest.mark.parametrize("damage", ["none", "torn", "all gone after the checkpoint"])
def test_a_killed_run_ends_with_the_file_of_one_that_was_not(tmp_path, damage):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_for(Halving(), 9, whole)
    after_a_kill(killed, 7)
    path = killed / "losses.csv"
    assert len(rows(killed)) == 7
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        os.truncate(path, len(path.read_bytes()) - 5)
    elif damage != "none":
        path.write_bytes(b"".join(lines[:4]))
    run_for(Halving(), 9, killed)
    assert path.read_bytes() == (whole / "losses.csv").read_bytes()
    run_for(Halving(), 9, killed)
    assert path.read_bytes() == (whole / "losses.csv").read_bytes()


@pytest.mark.parametrize("damage", ["deleted", "other columns", "torn before the checkpoint"])
def test_rows_that_are_lost_are_made_from_the_losses(tmp_path, damage):
    after_a_kill(tmp_path, 7)
    path = tmp_path / "losses.csv"
    if damage == "deleted":
        path.unlink()
    elif damage == "other columns":
        path.write_bytes(path.read_bytes().replace(b"learned_rate", b"other"))
    else:
        os.truncate(path, len(b"".join(path.read_bytes().splitlines(keepends=True)[:4])) - 3)
    losses = run_for(Halving(), 9, tmp_path)
    assert [float(row["loss"]) for row in rows(tmp_path)] == losses
    assert [row["learned_rate"] != "" for row in rows(tmp_path)] == [False] * 3 + [True] * 6


def test_an_exploded_run_has_the_rows_of_its_last_good_state(tmp_path):
    with pytest.raises(FloatingPointError, match="after 4 iterations"):
        run_for(Halving(spoil=5), 9, tmp_path)
    assert [int(row["iteration"]) for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_learned_rates_of_the_methods(digits, experts, tmp_path):
    run, context = tiny_run(), Context(digits)
    start = choose(replace(run.start, select="random"), context, run.evaluation, None).images
    method = SelMatch(Task(start, context, experts), run.settings)
    assert method.learned_rates() == {"lr": method.lr.item()}
    settings = DDSettings(steps=1, epochs=2, lr_init=0.25, model="MLP", init="unknown")
    method = DD(Task(choose(Start("noise", 1), context, None, None).images, context), settings)
    rates = F.softplus(method.raw.detach())
    assert method.learned_rates() == {"mean_rate": pytest.approx(rates.double().mean().item(), rel=1e-6)}


def test_tensorboard(tmp_path, digits, experts):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, context = tiny_run(), Context(digits)
    start = choose(replace(run.start, select="random"), context, run.evaluation, None).images
    settings = replace(run.settings, log="tensorboard", snapshot_every=2)
    for iterations in (3, 5):  # continued once
        run_for(SelMatch(Task(start, context, experts), settings), iterations, tmp_path)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    names = {"loss", "step_size/images", "step_size/lr", "learned/lr"}
    assert set(found.Tags()["scalars"]) == names and found.Tags()["images"] == ["images"]
    columns = {name: name.replace("/", "_") for name in names}
    for name, column in columns.items():
        written = [(event.step, event.value) for event in found.Scalars(name)]
        assert written == [(i, pytest.approx(float(row[column]))) for i, row in enumerate(rows(tmp_path), 1)], name
    pictures = found.Images("images")
    assert {event.step for event in pictures} == {0, 2, 3, 4, 5}
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in pictures)


def test_a_log_without_its_package_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if the import failed
    command = ["run", "dm", "--log", "tensorboard", "--data.dataset", "digits", "--device", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "log tensorboard needs" in error[0] and "pip install 'selmatch_ext[log]'" in error[0]
    assert not (tmp_path / "run").exists()


def test_the_log_is_a_setting_that_is_saved(tmp_path):
    with pytest.raises(ValueError, match="log"):
        replace(tiny_run().settings, log="wandb")
    assert tiny_run().settings.log is None
