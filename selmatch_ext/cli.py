"""The command line: `selmatch VERB`. Each verb is a function here, with the same arguments from Python."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from selmatch_ext import analysis, comparison, models, pipeline, ranks, recipes, report
from selmatch_ext.coverage import coverage as measure_coverage
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.trajectories import ExpertStore, import_replay_buffer
from selmatch_ext.evaluation import evaluate as evaluate_set
from selmatch_ext.evaluation import training_set
from selmatch_ext.experts import train_experts
from selmatch_ext.methods import METHODS, Method
from selmatch_ext.selection.window import split
from selmatch_ext.settings import (
    Continual,
    Coverage,
    Data,
    Evaluation,
    Experts,
    Features,
    Matching,
    Run,
    Scores,
    Search,
    Window,
    digits_demo,
    to_dict,
)

Positional = tyro.conf.Positional


def device_of(name: str) -> torch.device:
    """auto = a GPU where there is one; of several processes on a machine each takes the next.

    Raises ValueError for a device that this machine does not have."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here: {error}") from error
    return device


def run(settings: Annotated[Run, tyro.conf.arg(name="")] = Run(), *, out: Path, device: str = "auto") -> None:
    """All stages of SelMatch, from data set to evaluated distilled set; continues after a kill.

    With --recipe NAME [--reduced] the defaults are those of a recipe (selmatch recipes).

    Args:
        out: Folder of the run.
        device: auto, cpu, cuda, cuda:1 …
    """
    pipeline.run(settings, out, device_of(device))


def demo(
    settings: Annotated[Run, tyro.conf.arg(name="")] = digits_demo(),
    *,
    out: Path = Path("runs/demo"),
    device: str = "cpu",
) -> None:
    """The same on scikit-learn's digits, with settings for a few minutes on two cores.

    Args:
        out: Folder of the run. A run with other settings that is there is renamed first, to demo.1, demo.2 and so on.
        device: auto, cpu, cuda, cuda:1 …
    """
    where = device_of(device)
    if ranks.first() and pipeline.other_settings(out, to_dict(settings)):
        n = next(n for n in itertools.count(1) if not out.with_name(f"{out.name}.{n}").exists())
        out.rename(out.with_name(f"{out.name}.{n}"))
    ranks.barrier()
    pipeline.run(settings, out, where)


def scores(data: Data = Data(), scores: Scores = Scores(), *, out: Path, seed: int = 0, device: str = "auto") -> None:
    """Difficulty of each training image, from networks trained here; writes an .npz with scores and labels.

    Args:
        out: The file to write.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    if scores.source not in ("forgetting", "el2n"):
        raise ValueError(f"scores.source must be forgetting or el2n here, got {scores.source!r}")
    images, kept = pipeline.load_data(data, seed)
    pipeline.training_difficulty(scores, data, images, kept, seed, device_of(device), out)
    print(out)


def select(
    data: Data = Data(),
    scores: Scores = Scores(),
    window: Window = Window(),
    evaluation: Evaluation = Evaluation(),
    features: Features = Features(),
    *,
    out: Path,
    method: Literal["window", "random", "herding", "k-center", "forgetting", "el2n", "c-score"] = "window",
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Real images to train on, or to start a distillation from; writes METHOD.safetensors.

    window searches β unless window.beta is given, and draws beta.png. forgetting, el2n and c-score take the hardest
    images, or with window.beta those after that share. Distillation that keeps part of the set (window.alpha) keeps
    those that were chosen first.

    Args:
        out: Folder for the results.
        method: How the images are chosen.
        seed: Seed of every random choice.
        device: auto, cpu, cuda, cuda:1 …
    """
    where = device_of(device)
    images, kept = pipeline.load_data(data, seed)
    parts = {"data": data, "scores": scores, "window": window, "evaluation": evaluation, "features": features}
    pipeline.claim(out, {name: to_dict(part) for name, part in parts.items()} | {"seed": seed})
    if method == "random":
        subset = pipeline.random_set(images, window.ipc, seed)
    elif method in ("herding", "k-center"):
        subset = pipeline.feature_set(method, images, window.ipc, features, seed, where, out / "features")
    else:
        if method != "window":
            scores = replace(scores, source=pipeline.score_source(method, scores.source))
            window = replace(window, beta=window.beta or 0.0)
        hardness = pipeline.training_difficulty(scores, data, images, kept, seed, where, out / "scores.npz")
        if window.beta is None:
            best, tried = pipeline.search_window(images, hardness, window, evaluation, seed, where, out / "window")
            if ranks.first():
                report.plot_beta({b: (r.mean, r.std) for b, r in tried.items()}, out / "beta.png", best)
            window = replace(window, beta=best)
        subset = replace(pipeline.starting_set(images, hardness, window), method=method)
        print(f"β = {window.beta:.4g}")
    how = {"data": data, "scores": scores, "window": window, "features": features}
    settings = {name: to_dict(value) for name, value in how.items()} | {"seed": seed}
    distilled, path = split(subset.indices, window.ipc, window.alpha), out / f"{method}.safetensors"
    if ranks.first():
        replace(subset, distilled=distilled, settings=settings).save(path)
    print(path)


def experts(
    data: Data = Data(),
    experts: Experts = Experts(),
    *,
    out: Path,
    replay_buffer: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Trains expert trajectories that `out` still lacks, or imports a replay_buffer_*.pt of the public code.

    Args:
        out: Folder of the expert store.
        replay_buffer: A file to import instead of training.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    images, _ = pipeline.load_data(data, seed)
    if replay_buffer is None:
        store = train_experts(images, experts, out, seed, device_of(device))
    else:
        model = models.build(experts.model, images.channels, images.classes, images.image_size)
        store = import_replay_buffer(replay_buffer, out, model, {"model": experts.model, "dataset": images.name})
    print(f"{store.count} experts of {store.epochs} epochs in {out}")


def distill(
    start: Positional[Path],
    data: Data = Data(),
    matching: Matching = Matching(),
    *,
    experts: Path,
    out: Path,
    experts_model: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """SelMatch from a starting set of `selmatch select`; writes distilled.safetensors; continues after a kill.

    Other methods: selmatch distill NAME, for the names dc, dsa, dm, dd, mtt and datm; each has its own --help.

    A row of a paper's table, all stages: selmatch distill --recipe NAME [--reduced]; see selmatch recipes.

    Args:
        start: The starting set (window.safetensors).
        experts: Folder of the expert store.
        out: Folder of the run.
        experts_model: The network of the experts, where it is a function of yours (package.module:function).
        seed: Seed of every random choice.
        device: auto, cpu, cuda, cuda:1 …
    """
    subset, store = DistilledSet.load(start), ExpertStore(experts, trusted=(experts_model,))
    images, _ = pipeline.load_data(data, seed)
    context = {"data": to_dict(data), "matching": to_dict(matching), "model": store.model}
    pipeline.distil("selmatch", matching, subset, images, seed, device_of(device), out, context, store)
    print(out / "distilled.safetensors")


def distill_by(method: type[Method]) -> Callable[..., None]:
    """The verb `selmatch distill NAME` of a method that chooses its own starting images."""
    kind = method.settings_type

    def verb(
        settings: Annotated[kind, tyro.conf.arg(name="")] = kind(),  # noqa: B008
        data: Data = Data(),
        *,
        out: Path,
        experts: Path | None = None,
        experts_model: str | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        where = device_of(device)
        named = experts_model, getattr(settings, "model", None)
        store = None if experts is None else ExpertStore(experts, trusted=named)
        images, _ = pipeline.load_data(data, seed)
        start = pipeline.initial_set(settings.start, settings.ipc, images, seed, where, store)
        context = {"data": to_dict(data), "settings": to_dict(settings)}
        pipeline.distil(method.name, settings, start, images, seed, where, out, context, store)
        print(out / "distilled.safetensors")

    verb.__annotations__.update(settings=Annotated[kind, tyro.conf.arg(name="")])
    verb.__doc__ = f"""{kind.__doc__}

    Args:
        out: Folder of the run; distilled.safetensors is written there. A killed run continues.
        experts: Folder of the expert store, for methods that match trajectories or start from trained networks.
        experts_model: The network of the experts, where it is a function of yours (package.module:function).
        seed: Seed of every random choice.
        device: auto, cpu, cuda, cuda:1 …
    """
    return verb


def evaluate(
    path: Positional[Path],
    data: Data = Data(),
    evaluation: Evaluation = Evaluation(),
    *,
    record: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Trains networks on a distilled or selected set and tests them on real test images.

    A set of DD comes with its training: network, starting points and learning rates. It is trained on in that way, and
    the evaluation's settings other than evaluation.networks say nothing; selmatch cross trains other networks on it.

    Args:
        path: The set (a .safetensors file of selmatch).
        record: A JSON file for the accuracies; a killed evaluation continues from it.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    images, _ = pipeline.load_data(data, seed)
    subset = training_set(path)
    result = evaluate_set(subset, images, evaluation, seed, device_of(device), record)["test"]
    model = evaluation.model if subset.schedule is None else subset.schedule.model
    print(f"{model}: {result} over {len(result.values)} networks")


def coverage(
    paths: Positional[tuple[Path, ...]],
    data: Data = Data(),
    coverage: Coverage = Coverage(),
    features: Features = Features(),
    evaluation: Evaluation = Evaluation(),
    *,
    out: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Share of the test images, of the easy and of the hard half, that lie near an image of a set, and the accuracy on
    each; over iterations for runs with snapshots.

    Args:
        paths: Sets (.safetensors files of selmatch), or folders of runs with matching.snapshot-every above 0.
        out: Folder for coverage.json, coverage.png, accuracy.png and table.md.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    images, _ = pipeline.load_data(data, seed)
    measure_coverage(list(paths), images, coverage, features, evaluation, seed, device_of(device), out)


def cross(
    paths: Positional[tuple[Path, ...]],
    data: Data = Data(),
    evaluation: Evaluation = Evaluation(),
    *,
    models: tuple[str, ...],
    out: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Cross-architecture table: every network trained on every set, tested on real images.

    Args:
        paths: Sets (.safetensors files of selmatch).
        models: Networks: names as in experts.model, or a module of yours, package.module:function.
        out: Folder for cross.json, cross.md, cross.png and the records that a killed call continues from.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    images, _ = pipeline.load_data(data, seed)
    analysis.cross(list(paths), list(models), images, evaluation, seed, device_of(device), out)


def continual(
    paths: Positional[tuple[Path, ...]],
    data: Data = Data(),
    continual: Continual = Continual(),
    evaluation: Evaluation = Evaluation(),
    *,
    out: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Continual learning: classes arrive in steps, and networks learn from a set's images of those seen so far.

    Args:
        paths: Sets (.safetensors files of selmatch) to compare as the memory.
        out: Folder for continual.json, continual.md, continual.png and the records that a killed call continues from.
        seed: Seed of the order of classes, initial weights, order and augmentation of images.
        device: auto, cpu, cuda, cuda:1 …
    """
    images, _ = pipeline.load_data(data, seed)
    analysis.continual(list(paths), images, continual, evaluation, seed, device_of(device), out)


def search(
    path: Positional[Path],
    data: Data = Data(),
    search: Search = Search(),
    evaluation: Evaluation = Evaluation(),
    *,
    out: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Architecture search: ranks a grid of ConvNets by training on a set, and compares with training on all images.

    Args:
        path: The set (a .safetensors file of selmatch).
        out: Folder for search.json, search.md, search.png and the records that a killed call continues from.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    images, _ = pipeline.load_data(data, seed)
    analysis.search(path, images, search, evaluation, seed, device_of(device), out)


def report_(path: Positional[Path], *, out: Path, columns: int = 10) -> None:
    """A PNG of a set's images, a row for each class (20 classes at most); or one of each class, with all its images.

    Args:
        path: The set (a .safetensors file of selmatch).
        out: The PNG to write; or, where the name does not end in .png, a new folder for one PNG of each class.
        columns: Images a class at most, for one PNG.
    """
    subset = DistilledSet.load(path)
    if out.suffix.lower() == ".png":
        report.image_grid(subset.denormalised(), out, subset.hard_labels, subset.class_names, columns, subset.method)
    else:
        report.class_grids(subset.denormalised(), subset.hard_labels, subset.class_names, out)
    print(out)


def export(path: Positional[Path], *, out: Path) -> None:
    """A set as a folder of PNGs that torchvision's ImageFolder reads; with allow_empty=True where learned labels left a
    class without images.

    Args:
        path: The set (a .safetensors file of selmatch).
        out: The folder to make; it must not exist or be empty.
    """
    DistilledSet.load(path).export(out)
    print(out)


def recipes_() -> None:
    """The rows of the papers' tables as named settings, with the published figures.

    `selmatch distill --recipe NAME --out FOLDER` runs one from data set to evaluated distilled set; with --reduced at a
    scale for a laptop. All its settings can be changed as in `selmatch run`, and --help lists them.
    """
    print(report.table(recipes.listing()))


def _with_recipe(arguments: list[str]) -> None:
    """distill or run, given --recipe NAME [--reduced]: all stages, with that recipe's settings as the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--reduced", action="store_true")
    chosen, rest = parser.parse_known_args(arguments[1:])
    recipe = recipes.find(chosen.recipe)
    settings = recipes.reduced(recipe.settings) if chosen.reduced else recipe.settings
    parts = {f.name: getattr(settings, f.name) for f in fields(settings)}
    parts = {name: value for name, value in parts.items() if value is not None}
    shown = {"settings": tyro.conf.arg(name=""), "seed": tyro.conf.arg(help="Seed of every random choice.")}
    options = [
        (name, Annotated[type(value), shown.get(name, tyro.conf.arg())], field(default=value))
        for name, value in parts.items()
    ]
    options += [
        ("out", Annotated[Path, tyro.conf.arg(help="Folder of the run.")]),
        ("device", Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:1 …")], field(default="auto")),
    ]
    prog = f"selmatch {arguments[0]} --recipe {recipe.name}{' --reduced' * chosen.reduced}"
    given = tyro.cli(make_dataclass("Given", options, kw_only=True), prog=prog, args=rest, description=recipe.name)
    settings, where = replace(settings, **{name: getattr(given, name) for name in parts}), device_of(given.device)
    if isinstance(settings, Run):
        pipeline.run(settings, given.out, where)
    else:
        pipeline.run_method_alone(recipe.method, settings, given.out, where)


def methods(
    names: Positional[tuple[str, ...]] = (), *, out: Path = Path("runs/methods"), seed: int = 0, device: str = "cpu"
) -> None:
    """Every method on scikit-learn's digits against random selection; continues after a kill.

    Args:
        names: Of the methods, by default all.
        out: Folder for results.json and one folder a run.
        seed: Seed of every random choice.
        device: auto, cpu, cuda, cuda:1 …
    """
    comparison.run(names or comparison.NAMES, out, seed, device_of(device))


DISTILL = {"selmatch": distill} | {n: distill_by(m) for n, m in METHODS.items() if n != "selmatch"}
VERBS = {
    "run": run,
    "demo": demo,
    "scores": scores,
    "select": select,
    "experts": experts,
    "distill": distill,
    "evaluate": evaluate,
    "coverage": coverage,
    "recipes": recipes_,
    "cross": cross,
    "continual": continual,
    "search": search,
    "methods": methods,
    "report": report_,
    "export": export,
}


def _check_start(given: list[str]) -> None:
    """FileNotFoundError where the word after `selmatch distill` is neither a method nor a file to start from."""
    if given and not given[0].startswith("-") and not Path(given[0]).exists():
        raise FileNotFoundError(
            f"{given[0]!r} is no file to start from, and no method; methods are {', '.join(DISTILL)}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; an error that the user can mend is one line on standard error and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    verbs, prog = VERBS, "selmatch"
    if arguments[:1] == ["distill"] and set(arguments[1:2]) & set(DISTILL):
        verbs, prog, arguments = DISTILL, "selmatch distill", arguments[1:]
    try:
        with ranks.processes(), contextlib.ExitStack() as stack:
            if not ranks.first():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if arguments[:1] in (["distill"], ["run"]) and any(a.partition("=")[0] == "--recipe" for a in arguments):
                _with_recipe(arguments)
                return 0
            if prog == "selmatch" and arguments[:1] == ["distill"]:
                _check_start(arguments[1:2])
            tyro.extras.subcommand_cli_from_dict(verbs, prog=prog, args=arguments, description=__doc__)
    except (ValueError, TypeError, OSError, FloatingPointError, NotImplementedError, ImportError) as error:
        print(f"selmatch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("selmatch: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0
