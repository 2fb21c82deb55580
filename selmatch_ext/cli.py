"""The command line: `selmatch VERB`. Each verb is a function here, with the same arguments from Python."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from selmatch_ext import cli_studies, models, pipeline, preflight, ranks, recipes, report, surroundings
from selmatch_ext.claims import claim, other_settings, recognize
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.trajectories import ExpertStore, import_replay_buffer
from selmatch_ext.evaluation import Accuracy
from selmatch_ext.experts import train_experts
from selmatch_ext.methods import METHODS, Method
from selmatch_ext.output import attempt, say
from selmatch_ext.ranges import Seed, check_number
from selmatch_ext.selection.window import check_classes, split
from selmatch_ext.settings import (
    Data,
    Evaluation,
    Experts,
    Features,
    Matching,
    Run,
    Scores,
    Window,
    digits_demo,
    to_dict,
)
from selmatch_ext.surroundings import device_of

Positional = tyro.conf.Positional


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
    if ranks.first() and other_settings(out, to_dict(settings)):
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
    where = device_of(device)
    preflight.check_choices({"scores": scores}, where)
    images, kept = pipeline.load_data(data, seed)
    preflight.check_networks({"scores": scores}, images)
    pipeline.training_difficulty(scores, data, images, kept, seed, where, out)
    say(out)


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
    parts = {"data": data, "scores": scores, "window": window, "evaluation": evaluation, "features": features}
    plain = {name: to_dict(part) for name, part in parts.items()} | {"seed": seed}
    preflight.check_choices(parts, where)
    claim(out, plain)
    images, kept = pipeline.load_data(data, seed)
    _check_selection(method, parts, images)
    images = recognize(out, plain, images)
    tried = {}
    if method == "random":
        subset = pipeline.random_set(images, window.ipc, seed)
    elif method in ("herding", "k-center"):
        subset = pipeline.feature_set(method, images, window.ipc, features, seed, where, out / "features")
    else:
        subset, scores, window, tried = _by_difficulty(method, parts, images, kept, seed, where, out)
    how = {"data": data, "scores": scores, "window": window, "features": features}
    settings = {name: to_dict(value) for name, value in how.items()} | {"seed": seed}
    distilled, path = split(subset.indices, window.ipc, window.alpha), out / f"{method}.safetensors"
    if ranks.first():
        replace(subset, distilled=distilled, settings=settings).save(path)
        if tried:
            attempt(report.plot_beta, {b: (r.mean, r.std) for b, r in tried.items()}, out / "beta.png", window.beta)
    if method not in ("random", "herding", "k-center"):
        say(f"β = {window.beta:.4g}")
    say(path)


def _by_difficulty(
    method: str,
    parts: dict[str, Any],
    images: ImageData,
    kept: Tensor | None,
    seed: int,
    where: torch.device,
    out: Path,
) -> tuple[DistilledSet, Scores, Window, dict[float, Accuracy]]:
    """The images that `select` chooses by their scores, the settings with what was decided here (the source of the
    scores, β), and the accuracies of a search."""
    scores, window, tried = parts["scores"], parts["window"], {}
    if method != "window":
        scores = replace(scores, source=pipeline.score_source(method, scores.source))
        window = replace(window, beta=window.beta or 0.0)
    hardness = pipeline.training_difficulty(scores, parts["data"], images, kept, seed, where, out / "scores.npz")
    if window.beta is None:
        best, tried = pipeline.search_window(images, hardness, window, parts["evaluation"], seed, where, out / "window")
        window = replace(window, beta=best)
    return replace(pipeline.starting_set(images, hardness, window), method=method), scores, window, tried


def _check_selection(method: str, parts: dict[str, Any], images: ImageData) -> None:
    """Errors of `select` that are certain before its work."""
    window = parts["window"]
    if method in ("random", "herding", "k-center"):
        check_classes(images.train.labels, window.ipc)
    else:
        beta = window.beta if method == "window" else window.beta or 0.0
        preflight.check_window(replace(window, beta=beta), images)
    unused = {"random": parts, "herding": ("scores", "evaluation"), "k-center": ("scores", "evaluation")}.get(
        method, ()
    )
    preflight.check_networks({name: part for name, part in parts.items() if name not in unused}, images)


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
    where = device_of(device)
    preflight.check_choices({"experts": experts}, where)
    images, _ = pipeline.load_data(data, seed)
    if replay_buffer is None:
        preflight.check_networks({"experts": experts}, images)
        preflight.check_room({"experts": preflight.PlannedExperts.of(experts, images, out).bytes_missing()}, out)
        store = train_experts(images, experts, out, seed, where)
    else:
        model = models.build(experts.model, images.channels, images.classes, images.image_size)
        store = import_replay_buffer(replay_buffer, out, model, {"model": experts.model, "dataset": images.name})
    say(f"{store.count} experts of {store.epochs} epochs in {out}")


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
    where = device_of(device)
    preflight.check_choices({"matching": matching}, where)
    subset, store = DistilledSet.load(start), ExpertStore(experts, trusted=(experts_model,))
    images, _ = pipeline.load_data(data, seed)
    context = {"data": to_dict(data), "matching": to_dict(matching), "model": store.model}
    pipeline.distil("selmatch", matching, subset, images, seed, where, out, context, store)
    say(out / "distilled.safetensors")


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
        preflight.check_choices({"settings": settings}, where)
        named = experts_model, getattr(settings, "model", None)
        store = None if experts is None else ExpertStore(experts, trusted=named)
        images, _ = pipeline.load_data(data, seed)
        start = pipeline.initial_set(settings.start, settings.ipc, images, seed, where, store)
        context = {"data": to_dict(data), "settings": to_dict(settings)}
        pipeline.distil(method.name, settings, start, images, seed, where, out, context, store)
        say(out / "distilled.safetensors")

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


def recipes_() -> None:
    """The rows of the papers' tables as named settings, with the published figures.

    `selmatch distill --recipe NAME --out FOLDER` runs one from data set to evaluated distilled set; with --reduced at a
    scale for a laptop. All its settings can be changed as in `selmatch run`, and --help lists them.
    """
    say(report.table(recipes.listing()))


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
    kind = make_dataclass("Given", options, kw_only=True)
    given = surroundings.parsed(lambda: tyro.cli(kind, prog=prog, args=rest, description=recipe.name), rest)
    settings, where = replace(settings, **{name: getattr(given, name) for name in parts}), device_of(given.device)
    if isinstance(settings, Run):
        pipeline.run(settings, given.out, where)
    else:
        pipeline.run_method_alone(recipe.method, settings, given.out, where)


DISTILL = {"selmatch": distill} | {n: distill_by(m) for n, m in METHODS.items() if n != "selmatch"}
VERBS = {
    "run": run,
    "demo": demo,
    "scores": scores,
    "select": select,
    "experts": experts,
    "distill": distill,
    "evaluate": cli_studies.evaluate,
    "coverage": cli_studies.coverage,
    "recipes": recipes_,
    "cross": cli_studies.cross,
    "continual": cli_studies.continual,
    "search": cli_studies.search,
    "methods": cli_studies.methods,
    "report": cli_studies.report_,
    "export": cli_studies.export,
}


def _check_start(given: list[str]) -> None:
    """FileNotFoundError where the word after `selmatch distill` is neither a method nor a file to start from."""
    if given and not given[0].startswith("-") and not Path(given[0]).exists():
        raise FileNotFoundError(
            f"{given[0]!r} is no file to start from, and no method; methods are {', '.join(DISTILL)}"
        )


def _later(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function with the verb's arguments that returns the call, so that parsing is over before work begins."""

    @functools.wraps(verb)
    def call(*arguments: Any, **options: Any) -> Callable[[], None]:
        check_number("seed", options.get("seed", 0), Seed)
        return functools.partial(verb, *arguments, **options)

    return call


def command(arguments: list[str]) -> None:
    """Runs one verb, given the words after `selmatch`."""
    verbs, prog, words = VERBS, "selmatch", arguments
    if words[:1] in (["distill"], ["run"]) and any(a.partition("=")[0] == "--recipe" for a in words):
        _with_recipe(words)
        return
    if words[:1] == ["distill"] and set(words[1:2]) & set(DISTILL):
        verbs, prog, words = DISTILL, "selmatch distill", words[1:]
    elif words[:1] == ["distill"]:
        _check_start(words[1:2])
    later = {name: _later(verb) for name, verb in verbs.items()}
    about = __doc__ + surroundings.OPTIONS
    call = surroundings.parsed(
        lambda: tyro.extras.subcommand_cli_from_dict(later, prog=prog, args=words, description=about), words
    )
    call()


def main(arguments: list[str] | None = None) -> int:
    """Runs one verb; an error that the user can mend is one line on standard error and exit status 1. Modules in the
    current folder can be named, as in experts.model my_networks:build."""
    if "" not in sys.path:
        sys.path.append("")
    return surroundings.guarded(command, sys.argv[1:] if arguments is None else arguments)
