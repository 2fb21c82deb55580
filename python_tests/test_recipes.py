"""Named rows of the papers' tables: complete, buildable, and runnable at a reduced scale."""

import json
import re
from dataclasses import replace

import pytest
import torch

from selmatch_ext import cli, models, recipes
from selmatch_ext.methods import METHODS
from selmatch_ext.provenance import to_dict

SHAPES = {
    **{"CIFAR10": (3, 10, 32), "CIFAR100": (3, 100, 32), "tinyimagenet": (3, 200, 64)},
    **{"MNIST": (1, 10, 28), "FashionMNIST": (1, 10, 28), "SVHN": (3, 10, 32)},
}
SELMATCH = [name for name in recipes.RECIPES if name.startswith("selmatch-") and name != recipes.DEMO]
OTHERS = [name for name in recipes.RECIPES if not name.startswith("selmatch-")]


def shape(recipe):
    return SHAPES[recipe.settings.data.dataset.partition(":")[0]]


def test_the_rows_of_selmatch_are_those_of_the_paper():
    """Class size, ipc, α, β, epochs and share, written once more from the table."""
    table = """
        cifar10 5000 250 0.6 0.5 1000 .05, cifar10 5000 500 0.2 0.3 500 .1, cifar10 5000 1000 0.1 0.2 250 .2,
        cifar10 5000 1500 0.1 0.2 167 .3, cifar100 500 25 0.8 0.8 1000 .05, cifar100 500 50 0.6 0.7 500 .1,
        cifar100 500 100 0.3 0.6 250 .2, cifar100 500 150 0.2 0.4 167 .3, tinyimagenet 500 50 0.6 0.8 500 .1,
        tinyimagenet 500 100 0.5 0.7 250 .2"""
    for row in table.split(","):
        name, size, ipc, alpha, beta, epochs, share = row.split()
        settings = recipes.find(f"selmatch-{name}-ipc{ipc}").settings
        start = settings.start
        assert (start.ipc, start.alpha, start.window.beta) == (int(ipc), float(alpha), float(beta))
        assert settings.evaluation.training.epochs == int(epochs) and int(ipc) / int(size) == float(share)
        assert settings.settings.inner_steps == (20 if name == "tinyimagenet" else 55)
        assert settings.settings.lr_images == (10000 if name == "cifar10" and int(ipc) >= 1000 else 1000)
    assert sum(r.method == "selmatch" for r in recipes.RECIPES.values()) == 11  # and the demo


def test_the_figures_of_the_other_methods_are_those_of_the_papers():
    """Written once more: rows of ipc 1, 10, 50, and DD's three."""
    table = """
        mtt-cifar10 46.3 65.3 71.6, dc-mnist 91.7 97.4 98.8, dc-fashionmnist 70.5 82.3 83.6, dc-svhn 31.2 76.1 82.3,
        dc-cifar10 28.3 44.9 53.9, dsa-mnist 88.7 97.8 99.2, dsa-fashionmnist 70.6 84.6 88.7, dsa-svhn 27.5 79.2 84.4,
        dsa-cifar10 28.8 52.1 60.6, frepo-cifar10 46.8 65.5 71.7"""
    expected = {"dd-mnist-known-10": 94.0, "dd-mnist-unknown-100": 80.0, "dd-cifar10-known-100": 54.0}
    for row in table.split(","):
        name, *figures = row.split()
        expected |= {f"{name}-ipc{ipc}": float(f) for ipc, f in zip((1, 10, 50), figures, strict=True)}
    assert {n: r.published for n, r in recipes.RECIPES.items() if r.published is not None} == expected
    for name, recipe in recipes.RECIPES.items():
        method, dataset, *_, last = name.split("-")
        assert recipe.method == method and recipe.settings.data.dataset.lower().startswith(dataset)
        assert recipe.settings.start.ipc == (int(last) // 10 if method == "dd" else int(last.removeprefix("ipc")))
        if dataset in ("mnist", "svhn") and method in ("dsa", "dm"):
            assert "flip" not in recipe.settings.settings.strategy + recipe.settings.evaluation.distilled_strategy


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("scale", ["full", "reduced"])
def test_a_recipe_of_another_method_fits_together(name, scale):
    recipe = recipes.find(name)
    settings = recipe.settings if scale == "full" else recipes.reduced(recipe.settings)
    row, channels, classes, side = settings.settings, *shape(recipe)
    assert isinstance(row, METHODS[recipe.method].settings_type)
    for model in {getattr(row, "model", "ConvNet"), settings.evaluation.model}:
        with torch.device("meta"):
            models.build(model, channels, classes, side)
    if recipe.method in ("mtt", "datm"):
        assert row.max_start_epoch - 1 + row.expert_epochs <= settings.experts.training.epochs
        assert row.first_max_start_epoch is None or 0 < row.first_max_start_epoch <= row.max_start_epoch
    if scale == "reduced":
        whole = recipe.settings
        assert settings.start == whole.start and settings.data.per_class < 1000
        assert to_dict(row) != to_dict(whole.settings)


def test_a_method_is_run_to_the_end(tmp_path, capsys):
    """DM's and MTT's recipes on digits, in seconds; what is there is not done again."""
    small = ["--reduced", "--data.dataset", "digits", "--data.per-class", "50", "--evaluation.model", "ConvNetD2W8"]
    quick = ["--evaluation.networks", "1", "--evaluation.training.epochs", "2", "--iterations", "2", "--device", "cpu"]
    experts = ["--experts.model", "ConvNetD2W8", "--experts.count", "1", "--inner-steps", "2", "--data.no-zca"]
    for name, more in (("dm-cifar10-ipc1", ["--model", "ConvNetD2W8"]), ("mtt-cifar10-ipc1", experts)):
        method, out = name.partition("-")[0], tmp_path / name
        arguments = ["run", "--settings", name, *small, *quick, *more, "--out", str(out)]
        assert cli.main(arguments) == 0, capsys.readouterr().err
        results = json.loads((out / "results.json").read_text())
        assert set(results) == {"random", "start", method} and "1 images per class" in capsys.readouterr().out
        assert all(
            (out / f).exists() for f in ("start.safetensors", "distilled.safetensors", "distilled.png", "table.md")
        )
        times = {p: p.stat().st_mtime_ns for p in [*out.glob("experts/*"), *out.glob("evaluation*")]}
        assert cli.main(arguments) == 0 and all(p.stat().st_mtime_ns == t for p, t in times.items())
        assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.parametrize("name", SELMATCH)
@pytest.mark.parametrize("scale", ["full", "reduced"])
def test_a_recipe_fits_together(name, scale):
    recipe = recipes.find(name)
    settings = recipe.settings if scale == "full" else recipes.reduced(recipe.settings)
    channels, classes, side = shape(recipe)
    for model in {settings.experts.model, settings.evaluation.model, settings.start.scores.model}:
        with torch.device("meta"):  # no weights
            models.build(model, channels, classes, side)
    matching, start = settings.settings, settings.start
    assert matching.max_start_epoch - 1 + matching.expert_epochs <= settings.experts.training.epochs
    size = settings.data.per_class or (5000 if classes == 10 else 500)
    assert int(start.window.beta * size + 1e-6) + start.ipc <= size
    if scale == "reduced":
        whole = recipe.settings
        assert start.ipc / size == pytest.approx(whole.start.ipc / (5000 if classes == 10 else 500))
        assert matching.iterations < whole.settings.iterations and settings.experts.count < whole.experts.count
        assert (start.alpha, start.window) == (whole.start.alpha, whole.start.window)


@pytest.mark.parametrize(
    ("wide", "small"),
    [
        ("ConvNetBN", "ConvNetW32BN"),
        ("ConvNetD4BN", "ConvNetW32D4BN"),
        ("ConvNetW256", "ConvNetW32"),
        ("FRePoNetD4BN", "FRePoNetD4W16BN"),
        ("FRePoNet", "FRePoNetW16"),
        ("ResNet18BN_Tiny", "ConvNetW32BN"),
        ("LeNet", "LeNet"),
    ],
)
def test_narrow_networks(wide, small):
    assert recipes.narrow(wide) == small
    models.build(small, 3, 10, 32)


def test_the_list_names_all(capsys):
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipes.RECIPES) and "published" in shown and "ours" not in shown


BARE = r"(--[\w.-]+)(?:, --[\w.-]+)?(?: (?:[{\[][^ ]*|[A-Z]+\]*|\.\.\.\]*))* \((?:default|required)"
COMMANDS = [
    *([verb] for verb in cli.VERBS),
    *([verb, method] for verb in cli.METHOD_VERBS for method in METHODS),
    *(["run", "--settings", f"{name}-cifar10-ipc{ipc}"] for name, ipc in (("selmatch", 250), ("mtt", 1), ("dm", 1))),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_says_what_every_setting_means(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")  # one option under the other
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--help" in shown and re.findall(BARE, shown) == []


def test_a_recipe_is_run_with_its_settings_and_changes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.runner, "run", lambda *arguments: seen.append(arguments))
    name = "selmatch-cifar10-ipc500"
    base = ["run", "--out", str(tmp_path), "--device", "cpu", "--iterations", "7", "--seed", "4"]
    assert cli.main([*base, "--settings", name]) == 0
    assert cli.main([*base, f"--settings={name}", "--reduced"]) == 0
    recipe = recipes.find(name).settings
    for settings, (given, out, device) in zip((recipe, recipes.reduced(recipe)), seen, strict=True):
        changed = replace(settings, seed=4, settings=replace(settings.settings, iterations=7))
        assert to_dict(given) == to_dict(changed) and out == tmp_path and device.type == "cpu"


def test_an_unknown_recipe_names_its_neighbors(capsys):
    assert cli.main(["run", "--settings", "selmatch-cifar10", "--out", "x"]) == 1
    assert "no recipe is named 'selmatch-cifar10'; there are selmatch-cifar10-ipc250" in capsys.readouterr().err
