"""Named rows of the papers' tables: complete, buildable, and runnable at a reduced scale."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selmatch_ext import cli, models, recipes
from selmatch_ext.methods import METHODS
from selmatch_ext.methods.gradient import LOOPS
from selmatch_ext.provenance import to_dict
from selmatch_ext.selection.difficulty import COMPUTED

SHAPES = {
    **{"CIFAR10": (3, 10, 32), "CIFAR100": (3, 100, 32), "tinyimagenet": (3, 200, 64)},
    **{"MNIST": (1, 10, 28), "FashionMNIST": (1, 10, 28), "SVHN": (3, 10, 32)},
}
SELMATCH = [name for name, r in recipes.RECIPES.items() if r.method == "selmatch" and name != recipes.DEMO]
SELECTED = [name for name, r in recipes.RECIPES.items() if r.method == recipes.SELECT]
OTHERS = [name for name in recipes.RECIPES if name not in (*SELMATCH, *SELECTED, recipes.DEMO)]
ROOT = Path(__file__).parents[1]


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


# Written once more: of each table, rows of a method and data set, and a figure for each number of images per class.
RESNET18 = """
    selmatch 82.8 85.9 90.4 91.3 50.9 54.5 62.4 67.4 44.7 50.4,
    random-resnet18 73.4 79.3 85.6 88.3 35.8 40.7 53.2 60.3 30.1 40.1,
    forgetting-resnet18 30.7 41.5 68.4 83.5 9.5 13.2 27.0 42.3 5.7 12.4,
    window-resnet18 79.3 85.2 89.9 90.6 43.2 50.0 59.2 64.7 42.5 49.2,
    dsa-resnet18 74.7 78.7 84.8 - 38.4 43.6 - - 27.8 -,
    dm-resnet18 75.3 79.1 85.6 - 37.5 42.6 - - 31.0 -,
    mtt-resnet18 80.7 82.2 86.1 88.6 49.9 51.3 58.7 63.1 40.3 44.2,
    datm-resnet18 - 84.8 87.6 - - 51.0 61.5 - 42.2 -,
    ccs-resnet18 - 86.08 - - - - - - - -"""
CELLS = [f"cifar10-ipc{i}" for i in (250, 500, 1000, 1500)] + [f"cifar100-ipc{i}" for i in (25, 50, 100, 150)]
CELLS += [f"tinyimagenet-ipc{i}" for i in (50, 100)]
CONVNET = """
    random 50.6 73.2 78.4 33.4 42.8 15.0, herding 40.4 - - 33.7 - 16.7, k-center 56.0 - - - - 22.0,
    dc 53.9 72.1 76.6 - - 12.7, dsa 60.6 73.6 78.7 42.8 - 25.3, dm 63.0 75.1 78.8 43.6 - 24.1,
    mtt 71.6 - - 47.7 49.2 28.0, tesla 72.6 - - 47.9 49.2 -, datm 76.1 83.5 85.5 55.0 57.5 39.7"""
LARGE = [f"cifar10-ipc{i}" for i in (50, 500, 1000)] + [f"cifar100-ipc{i}" for i in (50, 100)] + ["tinyimagenet-ipc50"]
SMALL = """
    mtt-cifar10 46.3 65.3 71.6, dc-mnist 91.7 97.4 98.8, dc-fashionmnist 70.5 82.3 83.6, dc-svhn 31.2 76.1 82.3,
    dc-cifar10 28.3 44.9 53.9, dsa-mnist 88.7 97.8 99.2, dsa-fashionmnist 70.6 84.6 88.7, dsa-svhn 27.5 79.2 84.4,
    dsa-cifar10 28.8 52.1 60.6, frepo-cifar10 46.8 65.5 71.7,
    ftd-cifar10 46.8 66.6 73.8, ftd-cifar100 25.2 43.4 50.7, ftd-tinyimagenet 10.4 24.5 -,
    att-cifar10 48.3 67.7 74.5, att-cifar100 26.1 44.2 51.2"""


def test_the_figures_are_those_of_the_papers():
    expected = {"dd-mnist-known-10": 94.0, "dd-mnist-unknown-100": 80.0, "dd-cifar10-known-100": 54.0}
    for table, cells in ((RESNET18, CELLS), (CONVNET, LARGE)):
        for line in table.split(","):
            row, *figures = line.split()
            name, suffix = row.removesuffix("-resnet18"), "-resnet18" * row.endswith("-resnet18")
            found = {f"{name}-{c}{suffix}": f for c, f in zip(cells, figures, strict=True)}
            expected |= {name: float(f) for name, f in found.items() if f != "-"}
    for line in SMALL.split(","):
        name, *figures = line.split()
        expected |= {f"{name}-ipc{i}": float(f) for i, f in zip((1, 10, 50), figures, strict=True) if f != "-"}
    found = {name: recipe.published for name, recipe in recipes.RECIPES.items()}
    assert {name: f for name, f in found.items() if f is not None} == expected
    assert {name for name, f in found.items() if f is None} == {
        *("dm-cifar10-ipc1", "dm-cifar10-ipc10", "datm-cifar10-ipc10", "kip-cifar10-ipc10", recipes.DEMO)
    }
    assert all(recipe.source for name, recipe in recipes.RECIPES.items() if name != recipes.DEMO)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_what_its_name_says(name):
    recipe, settings = recipes.find(name), recipes.find(name).settings
    row, dataset, ipc = re.fullmatch(
        r"(.+?)-(cifar100?|tinyimagenet|\w*mnist|svhn|digits)-.*?(\d+)(?:-resnet18)?", name
    ).groups()
    assert settings.data.dataset.lower().startswith(dataset) and recipe.data == dataset and recipe.row == row
    assert settings.start.ipc == (int(ipc) // 10 if row == "dd" else int(ipc))
    if recipe.method == recipes.SELECT:
        assert settings.start.select == row and settings.start.alpha == 1
    else:
        assert settings.method == recipe.method == ("mtt" if row in ("tesla", "ftd", "att") else row)
        assert (getattr(settings.settings, "gradient", "exact") == "tesla") == (row == "tesla")
    evaluation, resnet = settings.evaluation, name.endswith("-resnet18") or recipe.method == "selmatch"
    if dataset != "digits":
        assert evaluation.draw_per == ("image" if resnet else "batch")
        assert evaluation.model.startswith("ResNet18BN") == resnet
        tiny = {evaluation.model} if settings.method in ("mtt", "datm", "selmatch") else set()
        assert dataset != "tinyimagenet" or tiny <= {"ResNet18BN_Tiny", "ConvNetD4"}
    if dataset in ("mnist", "svhn") and recipe.method == "dsa":
        assert "flip" not in settings.settings.strategy + evaluation.distilled_strategy
    assert settings.data.zca == (recipe.method in ("mtt", "datm", "frepo", "kip") and not resnet)


def test_rows_of_one_table_are_evaluated_alike():
    found = {}
    for recipe in recipes.RECIPES.values():
        if recipe.source.startswith("SelMatch") or recipe.name in SELMATCH:
            found.setdefault((recipe.data, recipe.settings.start.ipc), set()).add(recipe.settings.evaluation)
    assert len(found) == 10 and all(len(evaluations) == 1 for evaluations in found.values())


def test_our_figures_are_those_of_the_committed_results(capsys):
    ours = {name: recipe.ours for name, recipe in recipes.RECIPES.items() if recipe.ours is not None}
    assert {"selmatch-cifar10-ipc250", "random-cifar10-ipc250-resnet18", "mtt-cifar10-ipc250-resnet18"} <= ours.keys()
    for found in ours.values():
        held = json.loads((ROOT / found.file).read_text())[found.key]
        assert (found.mean, found.std) == pytest.approx((held["mean"], held["std"]), abs=0.005)
        assert found.scale and found.machine
    assert cli.main(["recipes", "--method", "mtt", "--data", "cifar10"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mtt-cifar10-ipc250-resnet18" in line]
    assert re.search(r" 80\.7 .* 47\.4 ± 0\.9 .* 5 % of 10,000 images, .*AMD EPYC", line)


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
    if recipe.method in ("dc", "dsa"):
        assert row.outer_loop is not None or settings.start.ipc in LOOPS
    if scale == "reduced":
        whole = recipe.settings
        assert keeps_its_share(recipe, settings) and settings.data.per_class < 1000
        assert to_dict(row) != to_dict(whole.settings)


def keeps_its_share(recipe, settings):
    """Where it is 5 % or more; else the number of images per class stays."""
    size = {10: 5000, 100: 500, 200: 500}[shape(recipe)[1]]
    whole, now = recipe.settings.start.ipc, settings.start.ipc
    if whole / size < 0.05:
        return now == whole
    return now / settings.data.per_class == pytest.approx(whole / size, abs=0.006)


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("scale", ["full", "reduced"])
def test_a_recipe_of_a_selection_fits_together(name, scale):
    recipe = recipes.find(name)
    settings = recipe.settings if scale == "full" else recipes.reduced(recipe.settings)
    channels, classes, side = shape(recipe)
    start = settings.start
    for model in {settings.evaluation.model, start.scores.model, start.features.model}:
        with torch.device("meta"):
            models.build(model, channels, classes, side)
    if start.select == "window":
        size = settings.data.per_class or (5000 if classes == 10 else 500)
        assert int(start.window.beta * size + 1e-6) + start.ipc <= size
    if scale == "reduced":
        assert keeps_its_share(recipe, settings) and start.scores.source in COMPUTED
        assert settings.evaluation.model.startswith("ConvNet")


def test_a_selection_is_selected_and_evaluated(tmp_path, capsys):
    """By the two commands that the error names, on digits."""
    name = "window-cifar10-ipc250-resnet18"
    assert cli.main(["run", "--settings", name, "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    commands = re.findall(r"selmatch ((?:select|evaluate) .*?)(?:, then|$)", told.strip())
    small = ["--reduced", "--data.dataset", "digits", "--data.per-class", "50", "--device", "cpu"]
    network = ["--evaluation.model", "ConvNetD2W8", "--evaluation.networks", "1", "--evaluation.training.epochs", "2"]
    scores = ["--start.scores.model", "ConvNetD2W8", "--start.scores.training.epochs", "2"]
    for command, more in zip(commands, (scores, []), strict=True):
        words = command.replace("DIR", str(tmp_path / "out")).split()
        assert cli.main([*words, *small, *network, *more]) == 0, capsys.readouterr().err
    assert "over 1 networks" in capsys.readouterr().out


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
    assert all(name in shown for name in recipes.RECIPES) and "published" in shown and "ours" in shown
    for options, names in (
        (["--method", "tesla"], [n for n in recipes.RECIPES if n.startswith("tesla")]),
        (["--method", "select", "--data", "CIFAR100"], [n for n in SELECTED if "cifar100" in n]),
        (["--data", "svhn"], [n for n in recipes.RECIPES if "svhn" in n]),
    ):
        assert cli.main(["recipes", *options]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == names
    assert cli.main(["recipes", "--method", "mt"]) == 1
    assert "method is 'mt'; there are att, ccs, datm, dc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [{"row": "x", "data": "d"}]}, "row 0 lacks published"),
        ({"rows": [{"row": "x", "data": "d", "published": {}, "ipc": 3}]}, "row 0 has ipc; allowed are row, data"),
        ({"rows": [{"row": "x", "data": "d", "published": {"1": "2"}}]}, "published 1 is ['2']"),
        ({"rows": [{"row": "x", "data": "d", "published": {}, "bases": ["y"]}]}, "no base y"),
        ({"bases": {"b": {"by": 1}}}, "b has by; allowed are settings, by_ipc"),
    ],
)
def test_a_damaged_table_is_named(change, message, tmp_path):
    (tmp_path / "recipes.json").write_text(json.dumps({"bases": {}, "rows": [], **change}))
    with pytest.raises(ValueError, match=re.escape(message)):
        list(recipes._read(tmp_path / "recipes.json"))


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
    assert cli.main(["run", "--settings", "nothing", "--out", "x"]) == 1
    assert len(capsys.readouterr().err) < 200
    assert cli.main(["run", "--settings", "runs/nothing", "--out", "x"]) == 1
    assert "--settings runs/nothing: there is no such folder or file" in capsys.readouterr().err
