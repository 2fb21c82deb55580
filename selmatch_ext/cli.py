"""The command line: `selmatch VERB`. Each verb is a function here or in cli_studies.py, with the same arguments from
Python; it reads its options, calls one function, and prints."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from selmatch_ext import (
    cli_completion,
    cli_doctor,
    cli_files,
    cli_help,
    cli_process,
    cli_studies,
    models,
    preflight,
    recipes,
    report,
    runner,
)
from selmatch_ext.allocator import keep_memory_unless_chosen
from selmatch_ext.cli_process import device_of
from selmatch_ext.cli_settings import Here, Place, WithExperts, check_named_networks, given_run, settings_by_name
from selmatch_ext.context import Context
from selmatch_ext.data.load import load_data
from selmatch_ext.data.trajectories import import_replay_buffer
from selmatch_ext.experts import train_experts
from selmatch_ext.methods import METHODS, LoopSettings, find_method
from selmatch_ext.output import say
from selmatch_ext.provenance import set_aside, to_dict
from selmatch_ext.ranges import Seed, check_number
from selmatch_ext.runner import Run
from selmatch_ext.selection.difficulty import COMPUTED, training_difficulty
from selmatch_ext.settings import Data, Evaluation, Experts, Scores, Start

SELECTED = Run().start
DEMO = recipes.RECIPES[recipes.DEMO].settings


def run_by(method: str) -> Callable[..., None]:
    """`selmatch run METHOD`: all stages, from data set to evaluated distilled set."""
    run, kind = Run.of(method), find_method(method).settings_type

    def verb(
        settings: LoopSettings = run.settings,
        data: Data = run.data,
        start: Start = run.start,
        experts: Experts = run.experts,
        evaluation: Evaluation = run.evaluation,
        *,
        place: Here,
        seed: int = 0,
    ) -> None:
        runner.run(Run(method, settings, data, start, experts, evaluation, seed), place.out, device_of(place.device))

    return _described(verb, kind, "All stages, from data set to evaluated distilled set. A killed run continues.")


def distill_by(method: str) -> Callable[..., None]:
    """`selmatch distill METHOD`: from a start to a distilled set, with existing experts."""
    run, kind = Run.of(method), find_method(method).settings_type

    def verb(
        settings: LoopSettings = run.settings,
        data: Data = run.data,
        start: Start = run.start,
        evaluation: Evaluation = run.evaluation,
        *,
        place: Annotated[WithExperts, tyro.conf.arg(name="")],
        seed: int = 0,
    ) -> None:
        asked, where = Run(method, settings, data, start, run.experts, evaluation, seed), device_of(place.device)
        say(runner.distill_alone(asked, place.out, where, place.experts, place.experts_model))

    return _described(verb, kind, "From a start to a distilled set, with existing experts. A killed run continues.")


def _described(verb: Callable[..., None], kind: type, what: str) -> Callable[..., None]:
    _with_settings(verb, kind)
    verb.__doc__ = f"""{kind.__doc__}

    {what}

    Args:
        seed: Seed of every random choice.
    """
    return verb


def _with_settings(verb: Callable[..., None], kind: type) -> None:
    """The options of the argument `settings` are the fields of `kind`, which only the run knows."""
    verb.__annotations__["settings"] = Annotated[kind, tyro.conf.arg(name="")]


def demo(
    settings: LoopSettings = DEMO.settings,
    data: Data = DEMO.data,
    start: Start = DEMO.start,
    experts: Experts = DEMO.experts,
    evaluation: Evaluation = DEMO.evaluation,
    *,
    place: Here = Place(Path("runs/demo"), "cpu"),
    seed: int = 0,
) -> None:
    """SelMatch on scikit-learn's digits, with settings for a few minutes on two cores.

    A run with other settings that is in the folder is renamed first, to demo.1, demo.2 and so on.

    Args:
        seed: Seed of every random choice.
    """
    asked, where = Run(DEMO.method, settings, data, start, experts, evaluation, seed), device_of(place.device)
    set_aside(place.out, to_dict(asked))
    runner.run(asked, place.out, where)


_with_settings(demo, type(DEMO.settings))


def scores(
    data: Data = Data(),
    scores: Annotated[Scores, tyro.conf.arg(name="start.scores")] = Scores(),
    *,
    out: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Difficulty of each training image, from networks trained here; writes an .npz with scores and labels.

    Args:
        out: The file to write.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    if scores.source not in COMPUTED:
        raise ValueError(
            f"selmatch scores computes scores: scores.source must be one of {', '.join(COMPUTED)}, got "
            f"{scores.source!r}; give files of scores to select or run"
        )
    parts, where = {"start": {"scores": scores}}, device_of(device)
    preflight.check_choices(parts, where)
    context = Context(load_data(data, seed), seed, where)
    preflight.check_networks(parts, context.data)
    training_difficulty(context, scores, out)
    say(out)


def select(
    data: Data = Data(),
    start: Start = SELECTED,
    evaluation: Evaluation = Evaluation(),
    *,
    out: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Real images to train on, or to start a distillation from (--start.select FILE); writes SELECT.safetensors.

    window searches β unless start.window.beta is given, and plots beta.png. forgetting, el2n, grand, aum, c-score,
    least-confidence, entropy and margin take the hardest images; with start.window.beta they first skip that share of
    the hardest. ccs and d2 use the difficulty of start.scores. craig and gradmatch give the images weights, which the
    file keeps and training uses.

    Args:
        evaluation: How networks are trained that compare windows.
        out: Folder for the results.
        seed: Seed of every random choice.
        device: auto, cpu, cuda, cuda:1 …
    """
    asked = Run(data=data, start=start, evaluation=evaluation, seed=seed)
    path, beta = runner.select(asked, out, device_of(device))
    if beta is not None:
        say(f"β = {beta:.4g}")
    say(path)


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
    images = load_data(data, seed)
    if replay_buffer is None:
        preflight.check_experts(experts, images, out)
        store = train_experts(Context(images, seed, where), experts, out)
    else:
        model = models.build(experts.model, images.channels, images.classes, images.image_size)
        store = import_replay_buffer(replay_buffer, out, model, {"model": experts.model, "dataset": images.name})
    say(f"{store.count} experts of {store.epochs} epochs in {out}")


def recipes_(*, method: str | None = None, data: str | None = None) -> None:
    """The cells of the papers' tables as named settings, with the published figures, and ours where there is one.

    `selmatch run --settings NAME --out FOLDER` runs one from data set to evaluated distilled set; with --reduced at a
    scale for a laptop. All its settings can be changed, and --help lists them. Recipes of the method select choose real
    images: `selmatch select --settings NAME --out FOLDER`, and `selmatch evaluate --settings NAME` with its file.

    Args:
        method: Only those of this method, or of this row of the tables, such as random or tesla.
        data: Only those of this data set, such as cifar100.
    """
    say(report.table(recipes.listing(method, data)))


METHOD_VERBS: dict[str, Callable[[str], Callable[..., None]]] = {"run": run_by, "distill": distill_by}
VERBS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "scores": scores,
    "select": select,
    "experts": experts,
    "evaluate": cli_studies.evaluate,
    "coverage": cli_studies.coverage,
    "recipes": recipes_,
    "cross": cli_studies.cross,
    "continual": cli_studies.continual,
    "search": cli_studies.search,
    "sweep": cli_studies.sweep,
    "rank": cli_studies.rank,
    "methods": cli_studies.methods,
    "report": cli_studies.report_,
    "export": cli_files.export,
    "import": cli_files.import_,
    "doctor": cli_doctor.doctor,
}


def _method_verb(name: str) -> Callable[..., None]:
    """What --help shows of a verb that is followed by a method."""

    def verb() -> None:
        """See selmatch VERB METHOD --help."""

    verb.__doc__ = cli_help.of_methods(name, METHOD_VERBS[name].__doc__ or "")
    return verb


def _later(verb: Callable[..., None], defaults: Run | None) -> Callable[..., Callable[[], None]]:
    """A function with the verb's arguments that returns the call, so that parsing is over before work begins. Where
    settings are given as a whole (--settings), the arguments have them as defaults."""

    @functools.wraps(verb)
    def call(*arguments: Any, **options: Any) -> Callable[[], None]:
        check_number("seed", options.get("seed", 0), Seed)
        return functools.partial(verb, *arguments, **options)

    if defaults is not None:
        parts = settings_by_name(defaults)
        signature = inspect.signature(verb)
        changed = [p.replace(default=parts.get(p.name, p.default)) for p in signature.parameters.values()]
        vars(call)["__signature__"] = signature.replace(parameters=changed)
    return call


def command(arguments: list[str]) -> None:
    """Runs the command whose words, such as ["run", "dm", "--out", "DIR"], follow `selmatch` on the command line."""
    if arguments[:1] == [cli_completion.FLAG]:
        return say(cli_completion.script(" ".join(arguments[1:]), VERBS, METHOD_VERBS, METHODS))
    defaults, words = given_run(arguments, METHOD_VERBS)
    verbs, prog = dict(VERBS), "selmatch"
    if words[:1] and words[0] in METHOD_VERBS:
        by, prog, words = METHOD_VERBS[words[0]], f"selmatch {words[0]}", words[1:]
        names = [words[0]] if words and not words[0].startswith("-") else list(METHODS)
        verbs = {name: by(name) for name in names}
    else:
        verbs = {name: _method_verb(name) for name in METHOD_VERBS} | verbs
    if defaults is not None and len(words) > 0 and words[0] in verbs:
        check_named_networks(defaults, inspect.signature(verbs[words[0]]).parameters, words)
    later = {name: _later(verb, defaults) for name, verb in verbs.items()}
    call = cli_process.parsed(lambda: cli_help.parsed(later, prog, words), words, prog)
    call()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that `arguments` (None: those of this process) give, and returns the exit status, which
    `cli_process.guarded` lists. An error that the user can correct is shown as one line on standard error. The current
    folder is added to the path of modules, so that options can name a module there (--experts.model my_networks:build).
    """
    if "" not in sys.path:
        sys.path.append("")
    words = sys.argv[1:] if arguments is None else arguments
    if cli_help.asked(words):
        return cli_help.answer(words)
    keep_memory_unless_chosen()
    return cli_process.guarded(command, words)
