"""Every setting has a range, and what is not in it is refused by its name before any work."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Optional

import pytest
import torch
from conftest import CPU, MODEL, tiny_run

from selmatch_ext import cli, methods, precision, preflight, runner, settings
from selmatch_ext.methods.mtt import MTTSettings
from selmatch_ext.ranges import Checked, SettingError, numeric_fields, settings_classes

CLASSES = [*settings_classes(settings, runner), *(m.settings_type for m in methods.METHODS.values())]
NUMBERS = [(kind, name) for kind in CLASSES for name in numeric_fields(kind)]
ZERO = {  # what may be 0
    *("momentum", "labels_momentum", "weight_decay", "alpha", "beta", "lr_lr", "lr_rates", "lr_labels", "seed"),
    *("checkpoint_seconds", "snapshot_every", "min_start_epoch", "attack_class", "target_class"),
    *("ema", "skip_first", "skip_smallest", "sharpness_rho", "sharpness_alpha"),
    *("cutoff", "gamma", "ridge", "inner_momentum", "inner_weight_decay"),
    *("warmup", "label_weight", "augmentation_weight"),
}


def make(kind, name, value):
    return kind(**{name: (value,) if numeric_fields(kind)[name][3] else value})


def test_the_settings_are_found():
    assert len(CLASSES) >= 15 and len(NUMBERS) > 90


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_numbers_out_of_any_sense_are_refused(kind, name):
    refused = [float("nan"), float("inf"), float("-inf"), 10**40, -(10**40), 1e300, True, "1"]
    refused += [0] * (name not in ZERO) + [-1, -0.5] * (name != "seed")
    refused += [1.5] * (numeric_fields(kind)[name][0] is int)
    for value in refused:
        with pytest.raises(SettingError, match=f"^{name} is {re.escape(str(value))}; allowed is "):
            make(kind, name, value)
    for value in [0] * (name in ZERO) + [0.5 if numeric_fields(kind)[name][0] is float else 1]:
        make(kind, name, value)


def test_a_number_without_a_range_is_no_setting():
    @dataclass(frozen=True)
    class Forgotten(Checked):
        rate: float = 1.0

    numeric_fields.cache_clear()
    with pytest.raises(TypeError, match="Forgotten.rate is a number without a range"):
        Forgotten.__annotations__["rate"] = float
        Forgotten()


def test_choices_are_refused_by_name():
    with pytest.raises(SettingError, match="^labels is 'best'; allowed is hard, soft, learned$"):
        MTTSettings(labels="best")
    with pytest.raises(SettingError, match="^beta is 1.5; allowed is 0 to 1, where beta_unit is class$"):
        settings.Window(beta=1.5)
    settings.Window(beta=1.5, beta_unit="ipc")


@dataclass(frozen=True)
class Optionals(Checked):
    one: Literal["a", "b"] | None = None
    other: Optional[Annotated[Literal["a", "b"], "by name"]] = "a"  # noqa: UP045  (as people write it)
    two: Literal["a"] | Literal[3] = "a"
    free: Literal["a"] | str = "a"


def test_choices_that_may_be_absent_are_refused_by_name():
    Optionals("a", None, 3, "anything")
    refused = {"one": "a, b, None", "other": "a, b, None", "two": "a, 3"}
    for name, allowed in refused.items():
        with pytest.raises(SettingError, match=f"^{name} is 'c'; allowed is {allowed}$"):
            Optionals(**{name: "c"})
    with pytest.raises(SettingError, match="^two is None; allowed is a, 3$"):
        Optionals(two=None)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "mtt", "--max-loss", "nan"], "--max-loss is nan; allowed is above 0 to 1e+30"),
        (["run", "dm", "--start.window.step=1e-9"], "--start.window.step is 1e-09; allowed is 0.001 to 1e+06"),
        (["run", "dc", "--start.scores.training.lr", "1", "--experts.training.lr", "inf"], "--experts.training.lr is"),
        (["run", "dsa", "--seed", "9" * 30], f"--seed is {'9' * 30}; allowed is a whole number from -92"),
        (["scores", "--seed", "9" * 30], f"--seed is {'9' * 30}; allowed is a whole number from -92"),
        (["distill", "dm", "--lr-images", "-1"], "--lr-images is -1.0; allowed is above 0 to 1e+30"),
        (["search", "set", "--search.depths", "1", "0"], "--search.depths is 0; allowed is a whole number"),
        (["run", "--settings", "dm-cifar10-ipc1", "--batch-real", "0"], "--batch-real is 0; allowed is a whole number"),
    ],
)  # fmt: skip
def test_the_command_line_names_the_option_as_it_was_typed(arguments, line, tmp_path, capsys):
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"selmatch: {line}") and shown.err.count("\n") == 1 and not shown.out
    assert not list(tmp_path.iterdir())


TINY = [
    *("--data.dataset", "digits", "--device", "cpu", "--start.scores.source", "el2n", "--start.scores.model", MODEL),
    *("--start.ipc", "6", "--start.alpha", "0.5", "--experts.model", MODEL, "--experts.training.epochs", "3"),
    *("--expert-epochs", "1", "--max-start-epoch", "2", "--batch-syn", "25"),
    *("--evaluation.model", MODEL),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--start.ipc 500", "ipc is 500; allowed is 1 to 116"),
        ("--start.alpha 0.01", "alpha times ipc must be at least 1"),
        ("--start.window.beta 0.99", "beta 0.99 runs past class"),
        ("--start.window.step 50", "step is 50.0; allowed is above 0, up to 1"),
        ("--start.scores.model ConvNetX", "start.scores.model: network 'ConvNetX'"),
        ("--experts.model ConvNetX", "experts.model: network 'ConvNetX'"),
        ("--evaluation.model ConvNetD9", "evaluation.model: network 'ConvNetD9'"),
        ("--start.scores.strategy colr", "start.scores.strategy: strategy 'colr'"),
        ("--strategy colr", "strategy: strategy 'colr'"),
        ("--evaluation.selected-strategy colr", "evaluation.selected_strategy: strategy 'colr'"),
        ("--max-start-epoch 9", "need trajectories of 9 epochs"),
        ("--min-start-epoch 2", "min_start_epoch must be at least 0 and below max_start_epoch 2"),
        ("--precision tf32", "precision is tf32, which needs a CUDA device"),
        ("--experts.training.precision bfloat16", "experts.training.precision is bfloat16, which takes 12 times"),
        ("--cuda-graphs True", "cuda_graphs needs a CUDA device"),
        ("--engine fused --experts.model torchvision:shufflenet_v2_x0_5", "engine is fused, but"),
        ("--experts.count 100000000", "GB are free there"),
        ("--device tpu", "there are auto, cpu"),
        ("--device meta", "device 'meta' is not supported; there are auto, cpu"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_work(arguments, message, tmp_path, monkeypatch, capsys):
    for module in ("training.train", "evaluation.train", "methods.loop._iterate"):
        monkeypatch.setattr(f"selmatch_ext.{module}", lambda *rest: pytest.fail("trained for nothing"))
    monkeypatch.setattr(precision, "bfloat16_slowdown", lambda: 12.0)
    assert cli.main(["run", "selmatch", *TINY, *arguments.split(), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("selmatch: ") and shown.count("\n") == 1
    assert not list(tmp_path.rglob("*.*"))


def test_the_wanted_number_of_processes_is_asked_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr("selmatch_ext.ranks.world", lambda: 2)
    monkeypatch.setattr("selmatch_ext.training.train", lambda *rest: pytest.fail("trained for nothing"))
    with pytest.raises(ValueError, match="the number of processes, 2, .* got 3 .* it is experts_per_iteration"):
        settings = replace(tiny_run().settings, experts_per_iteration=3)
        runner.run(tiny_run(settings=settings), tmp_path, CPU)


def test_slow_bfloat16_is_refused_unless_insisted_on(monkeypatch):
    for slowdown, device in ((0.5, CPU), (12.0, torch.device("cuda"))):
        monkeypatch.setattr(precision, "bfloat16_slowdown", lambda slowdown=slowdown: slowdown)
        precision.check_precision("a.precision", "bfloat16", device)
    monkeypatch.setattr(precision, "bfloat16_slowdown", lambda: 12.0)
    with pytest.raises(ValueError, match="a.precision is bfloat16, which takes 12 times .* --insist-on-bfloat16"):
        precision.check_precision("a.precision", "bfloat16", CPU)
    precision.check_precision("a.precision", "float32", CPU)
    with precision.insist_on_bfloat16():
        precision.check_precision("a.precision", "bfloat16", CPU)


def test_slow_bfloat16_is_warned_about_once(monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_slowdown", lambda: 12.0)
    precision._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="bfloat16 takes 12 times as long") as found:
        for _ in range(3):
            with precision.precision_scope("bfloat16", CPU):
                pass
    assert len(found) == 1


def test_bfloat16_is_measured_without_touching_the_generator():
    before = torch.get_rng_state()
    precision.bfloat16_slowdown.cache_clear()
    assert 0.01 < precision.bfloat16_slowdown() < 1e4
    assert torch.equal(torch.get_rng_state(), before)


def test_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    preflight.check_room({"experts": 10**9}, tmp_path / "not" / "there")
    with pytest.raises(
        OSError, match=r"will take about 1.10 GB \(experts 1.00 GB, snapshots 0.10 GB\), and 1.00 GB are"
    ):
        preflight.check_room({"experts": 10**9, "snapshots": 10**8, "set": 0}, tmp_path)
