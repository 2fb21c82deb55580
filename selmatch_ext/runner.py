"""One path for every method: data, experts, start, distillation, evaluation, report. Every stage continues what an
earlier, killed call left in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selmatch_ext import preflight, ranks, report
from selmatch_ext.clock import expect, measured, recorded
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, seen_as, to_train_on
from selmatch_ext.data.load import load_data
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import Accuracy, evaluate, training_work
from selmatch_ext.experts import train_experts
from selmatch_ext.files import check_writable, read_json, write_json, write_text
from selmatch_ext.methods import LoopSettings, Method, SelMatch, Task, find_method
from selmatch_ext.methods.loop import run_method
from selmatch_ext.output import attempt, say
from selmatch_ext.page import write_page
from selmatch_ext.provenance import claim, from_dict, of_images, record_images, to_dict
from selmatch_ext.ranges import Checked, Seed
from selmatch_ext.selection.start import Chosen, Kept, choose, random_like
from selmatch_ext.settings import SELECTIONS, Data, Evaluation, Experts, Start
from selmatch_ext.stages import stage


@dataclass(frozen=True)
class Run(Checked):
    """One run from data set to evaluated distilled set; the defaults are SelMatch's. `Run.of` has those of a method."""

    method: str = SelMatch.name
    """A name of methods.METHODS, or package.module:Class."""
    settings: LoopSettings = SelMatch.settings_type()
    """The method's own settings."""
    data: Data = Data()
    start: Start = SelMatch.defaults.start
    experts: Experts = SelMatch.defaults.experts
    """Expert trajectories, for methods and starts that need them."""
    evaluation: Evaluation = SelMatch.defaults.evaluation
    seed: Seed = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = find_method(self.method).settings_type
        if type(self.settings) is not kind:
            raise ValueError(
                f"settings is of the class {type(self.settings).__name__}; those of the method {self.method} are "
                f"{kind.__name__}"
            )

    @classmethod
    def of(cls, method: str, **changes: Any) -> Run:
        """The defaults of a method, with some fields changed. Raises ValueError as `find_method` does."""
        kind = find_method(method)
        parts = {name: getattr(kind.defaults, name) for name in ("start", "experts", "evaluation")}
        return cls(**{"method": method, "settings": kind.settings_type(), **parts, **changes})

    @classmethod
    def load(cls, path: str | Path, method: str | None = None, whole: bool = True) -> Run:
        """The run whose settings.json is at `path`, a file or the folder that it is in.

        whole: with the method and its settings; else with those of `Run()`.
        A data file does not choose which code is run: a method that is a class of a module of yours has to be named by
        `method` too. Raises ValueError for an unknown setting or a value that is not allowed, and where the file is
        for another method than `method`."""
        path = Path(path) / "settings.json" if Path(path).is_dir() else Path(path)
        given = read_json(path)
        if not whole:
            names = ("data", "start", "experts", "evaluation", "seed")
            return from_dict(cls, {name: given[name] for name in names if name in given}, str(path), cls())
        if not {"method", "settings"} <= given.keys():
            raise ValueError(f"{path} has no method: it is not of selmatch run or selmatch distill")
        name = given["method"]
        if method is not None and name != method:
            raise ValueError(f"{path} is of the method {name!r}, not {method}")
        if method is None and (not isinstance(name, str) or ":" in name):
            raise ValueError(
                f"{path}: method is {name!r}, a class in a module of Python: a data file does not choose which code "
                "runs; name the method on the command line too"
            )
        return from_dict(cls, given, str(path), cls.of(name))

    def needs_experts(self) -> bool:
        """Whether the method or the start uses expert trajectories."""
        return find_method(self.method).needs_experts(self.settings) or self.start.select == "correct"


@recorded("run", ranks.first, "distillation", "evaluation")
def run(
    settings: Run, folder: str | Path, device: torch.device, experts: str | Path | None = None
) -> dict[str, dict[str, Any]]:
    """Every stage of a run, whatever its method.

    Returns and writes folder/results.json: {"random": {"mean": %, "std": %}, "start": …, the method's name: …}: test
    accuracies of networks trained on random images, on those that the distillation started from, and on the distilled
    set. experts: where the expert trajectories are; None: in `folder`. The same call after a kill continues. Raises
    ValueError when `folder` holds a run with other settings."""
    folder = Path(folder)
    experts = folder / "experts" if experts is None else Path(experts)
    context = _begin(settings, folder, device, lambda c: preflight.check_run(settings, c, folder, experts))
    chosen, method = make(settings, context, folder, experts, Kept.under(folder))
    distilled = method.distilled()
    # All three are trained on in the same way: in the learned steps where the method learns them.
    sets = {"random": random_like(chosen.images, context), "start": to_train_on(chosen.images)}
    sets = {name: replace(images, schedule=distilled.schedule) for name, images in sets.items()}
    sets[method.name] = distilled
    results = _compare(sets, context, settings.evaluation, folder)
    if ranks.first():
        _write_report(settings, context, folder, chosen, distilled, results, method.further_results(sets))
    ranks.barrier()
    return read_json(folder / "results.json")


def make(settings: Run, context: Context, folder: Path, experts: Path, kept: Kept) -> tuple[Chosen, Method]:
    """The stages from the start and the experts to the distilled set, in a folder that was claimed: the start, and the
    method as it is at the end. experts: where the expert trajectories are. kept: where the start's scores and networks
    are. Missing ones are computed."""
    store = None
    if settings.start.select != "correct":  # whose images an expert chooses
        chosen = choose(settings.start, context, settings.evaluation, kept)
    if settings.needs_experts():
        store = train_experts(context, settings.experts, experts)
    if settings.start.select == "correct":
        chosen = choose(settings.start, context, settings.evaluation, kept, store)
    return chosen, distill(settings, chosen, context, folder, store)


@recorded("distill", ranks.first, "distillation")
def distill_alone(
    settings: Run, folder: str | Path, device: torch.device, experts: Path | None, experts_model: str | None = None
) -> Path:
    """From a start to a distilled set, with existing experts; returns its file, folder/distilled.safetensors.

    experts: the folder of an expert store, for methods and starts that need one. experts_model: the experts' network,
    where it is a function of a module of yours. The same call after a kill continues."""
    folder, store = Path(folder), None
    if experts is not None:
        store = ExpertStore(experts, trusted=(experts_model, vars(settings.settings).get("model")))
    context = _begin(settings, folder, device, lambda c: preflight.check_distillation(settings, c, folder, store))
    chosen = choose(settings.start, context, settings.evaluation, folder, store)
    distill(settings, chosen, context, folder, store)
    if ranks.first():
        attempt(write_page, folder)
    return folder / "distilled.safetensors"


@recorded("select", ranks.first, "start")
def select(settings: Run, folder: str | Path, device: torch.device) -> tuple[Path, float | None]:
    """Real images chosen as settings.start says; writes folder/SELECT.safetensors and, after a search of windows,
    beta.png. Returns the file and where the window lies. Method, experts and their settings are not used."""
    how, folder = settings.start.select, Path(folder)
    if how not in SELECTIONS:
        raise ValueError(f"start.select is {how!r}; to select real images it must be one of {', '.join(SELECTIONS)}")
    plain = {name: to_dict(settings)[name] for name in ("data", "start", "evaluation", "seed")}
    preflight.check_choices({"start": settings.start, "evaluation": settings.evaluation}, device)
    claim(folder, plain)
    context = Context(load_data(settings.data, settings.seed), settings.seed, device)
    preflight.check_start(settings.start, settings.evaluation, context)
    context = replace(context, data=record_images(folder, plain, context.data))
    chosen = choose(settings.start, context, settings.evaluation, folder)
    path = folder / f"{how}.safetensors"
    if ranks.first():
        replace(chosen.images, settings={**plain, "beta": chosen.beta}).save(path)
        _plot_windows(chosen, folder)
        attempt(write_page, folder)
    return path, chosen.beta


@measured("distillation")
def distill(settings: Run, chosen: Chosen, context: Context, folder: Path, store: ExpertStore | None = None) -> Method:
    """Runs the method from the chosen images; writes folder/start.safetensors, distilled.safetensors, the method's
    further sets and loss.png.
    Returns the method as it is at the end, its set with what it was made from.

    Raises FloatingPointError when the loss explodes; the last good set is then in folder/stopped.safetensors. Raises
    ValueError when the start or the experts belong to other data (unless the method needs that) or another network."""
    check_writable(folder / "distilled.safetensors")
    start = chosen.images
    made_from = {**to_dict(settings), "beta": chosen.beta, "started_from": start.digest()}
    if store is not None:
        made_from["experts"] = {"count": store.count, **store.metadata}
    if ranks.first():
        start.save(folder / "start.safetensors")
    task = Task(replace(start, settings=made_from), replace(context, data=seen_as(start, context.data)), store)
    method = find_method(settings.method)(task, settings.settings)
    if (
        store is not None and "images" in store.metadata and not method.experts_from_other_data
    ):  # imported experts do not say
        store.check(0, of_images(task.data))
    # A checkpoint depends on the images' content, not on their path, and not on how the set is evaluated later
    identity = {key: value for key, value in made_from.items() if key != "evaluation"}
    identity["data"] = of_images(task.data)
    kind, each = training_work(method.distilled(), settings.evaluation)
    expect("evaluation", kind, 3 * settings.evaluation.networks * each)
    sizes, memory = _sizes(method)
    try:
        with stage(f"distillation by {method.name}", memory, **sizes):
            losses = run_method(method, folder, made_from, identity)
    except FloatingPointError:
        if ranks.first():
            method.distilled().save(folder / "stopped.safetensors")
            attempt(write_page, folder)
        raise
    if ranks.first():
        for name, made in {"distilled": method.distilled(), **method.further_sets()}.items():
            made.save(folder / f"{name}.safetensors")
        attempt(report.plot_loss, losses, folder / "loss.png")
    return method


@measured("data and checks", refuses=True)
def _begin(settings: Run, folder: Path, device: torch.device, check: Callable[[Context], None]) -> Context:
    """Runs all checks that need no training, claims the folder and loads the data. check: those that need the data."""
    preflight.check_choices(settings, device)
    claim(folder, to_dict(settings))
    context = Context(load_data(settings.data, settings.seed), settings.seed, device)
    check(context)
    return replace(context, data=record_images(folder, to_dict(settings), context.data))


def _sizes(method: Method) -> tuple[dict[str, Any], str]:
    """The sizes that an error message of the distillation reports, and the settings to lower when memory runs out."""
    start, given = method.task.start, vars(method.settings)
    names = [name for name in ("batch_syn", "inner_steps", "batch_real", "steps", "keep") if name in given]
    sizes = {"images": f"{len(start)} of {tuple(start.images.shape[1:])}", "device": method.task.device}
    less = " or ".join(f"a smaller {name}" for name in names if name.startswith("batch")) or "fewer steps"
    return sizes | {name: given[name] for name in names}, less


@measured("evaluation")
def _compare(
    sets: dict[str, DistilledSet], context: Context, settings: Evaluation, folder: Path
) -> dict[str, Accuracy]:
    """The test accuracy of each set. Equal ones are evaluated once."""
    results, known = {}, {}
    for name, images in sets.items():
        digest = images.digest()
        if digest not in known:
            known[digest] = evaluate(images, context, settings, folder / f"evaluation_{name}.json", name)["test"]
        results[name] = known[digest]
    return results


def _write_report(
    settings: Run,
    context: Context,
    folder: Path,
    chosen: Chosen,
    distilled: DistilledSet,
    results: dict[str, Accuracy],
    further: dict[str, Any],
) -> None:
    """results.json, the table, which is printed as well, pictures and the page."""
    window = "" if chosen.beta is None else f", β = {chosen.beta:.2f}"
    ipc = round(len(distilled) / context.data.classes)
    title = f"{context.data.name}, {ipc} images per class{window}, {settings.evaluation.model}"
    write_json(folder / "results.json", {name: {"mean": r.mean, "std": r.std} for name, r in results.items()} | further)
    rows = [["training set", "test accuracy", "networks"]]
    rows += [[name, str(r), str(len(r.values))] for name, r in results.items()]
    write_text(folder / "table.md", f"{title}\n\n{report.markdown(rows)}\n")
    say(f"\n{title}\n{report.table(rows)}")
    _plot_windows(chosen, folder)
    start, learned, names = chosen.images, distilled.distilled, distilled.class_names
    before, after, labels = start.denormalized(), distilled.denormalized(), start.hard_labels
    if not learned.all():
        kept = before[~learned], folder / "selected.png", labels[~learned], names
        attempt(report.image_grid, *kept, title="selected: kept as they are")
    attempt(report.before_after, before[learned], after[learned], labels[learned], folder / "distilled.png", names)
    attempt(write_page, folder)
    if (folder / "report.html").exists():
        say(f"\nA page with images and plots: {folder / 'report.html'}")


def _plot_windows(chosen: Chosen, folder: Path) -> None:
    if chosen.tried:
        points = {beta: (r.mean, r.std) for beta, r in chosen.tried.items()}
        attempt(report.plot_beta, points, folder / "beta.png", chosen.beta)
