"""Verbs of the command line that ask what a set is good for, and one that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from selmatch_ext import page, report
from selmatch_ext.cli_process import device_of
from selmatch_ext.cli_settings import OF_THE_SET, Here, data_of
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, training_set
from selmatch_ext.data.load import load_data
from selmatch_ext.evaluation import evaluate as evaluate_set
from selmatch_ext.methods.base import CONVNET
from selmatch_ext.output import say
from selmatch_ext.preflight import check_choices
from selmatch_ext.runner import Run
from selmatch_ext.settings import (
    Continual,
    Coverage,
    Data,
    Evaluation,
    Experts,
    Features,
    Ranking,
    Search,
    Start,
    StartParts,
    Sweep,
)
from selmatch_ext.studies.architectures import search as search_networks
from selmatch_ext.studies.comparison import compare
from selmatch_ext.studies.continual import continual as learn_continually
from selmatch_ext.studies.coverage import coverage as measure_coverage
from selmatch_ext.studies.coverage import snapshots
from selmatch_ext.studies.cross import cross as cross_table
from selmatch_ext.studies.rank import rank as rank_set
from selmatch_ext.studies.sweep import sweep as run_sweep


def _context(data: Data, path: Path, seed: int, device: torch.device) -> Context:
    """The data set that `data` names, or else the one that the set in the file `path` was made from."""
    return Context(load_data(*data_of(data, path, seed)), seed, device)


def _first(paths: tuple[Path, ...]) -> Path:
    """The file of the first set; of a run's folder, of its last snapshot."""
    if not paths:
        raise ValueError("no set is given; it takes one or more .safetensors files")
    return list(snapshots(paths[0]).values())[-1]


def evaluate(
    path: Positional[Path],
    data: Data = OF_THE_SET,
    evaluation: Evaluation = Evaluation(),
    *,
    record: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Trains networks on a distilled or selected set and tests them on real test images.

    A set of DD comes with its training: network, starting points and learning rates. It is trained on in that way, and
    the evaluation's settings other than evaluation.networks have no effect; selmatch cross trains other networks on it.

    Args:
        path: The set (a .safetensors file of selmatch).
        record: A JSON file for the accuracies; a killed evaluation continues from it.
        seed: Seed of initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    where = device_of(device)
    check_choices({"evaluation": evaluation}, where)
    subset = training_set(path)
    context = _context(data, path, seed, where)
    result = evaluate_set(subset, context, evaluation, record)["test"]
    model = evaluation.model if subset.schedule is None else subset.schedule.model
    say(f"{model}: {result} over {len(result.values)} networks, {context.data.name}")


def coverage(
    paths: Positional[tuple[Path, ...]],
    data: Data = OF_THE_SET,
    coverage: Coverage = Coverage(),
    features: Features = Features(),
    evaluation: Evaluation = Evaluation(),
    *,
    place: Here,
    seed: int = 0,
) -> None:
    """Share of the test images, of the easy and of the hard half, that lie near an image of a set, and the accuracy on
    each; over iterations for runs with snapshots. Writes coverage.json, coverage.png, accuracy.png and table.md.

    Args:
        paths: Sets (.safetensors files of selmatch), or folders of runs with snapshot-every above 0.
        seed: Seed of initial weights, order and augmentation.
    """
    where = device_of(place.device)
    check_choices({"coverage": coverage, "features": features, "evaluation": evaluation}, where)
    context = _context(data, _first(paths), seed, where)
    measure_coverage(list(paths), context, coverage, features, evaluation, place.out)


def cross(
    paths: Positional[tuple[Path, ...]],
    data: Data = OF_THE_SET,
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
    where = device_of(device)
    check_choices({"evaluation": evaluation}, where)
    cross_table(list(paths), list(models), _context(data, _first(paths), seed, where), evaluation, out)


def continual(
    paths: Positional[tuple[Path, ...]],
    data: Data = OF_THE_SET,
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
    where = device_of(device)
    check_choices({"continual": continual, "evaluation": evaluation}, where)
    context = _context(data, _first(paths), seed, where)
    learn_continually(list(paths), context, continual, evaluation, out)


def search(
    path: Positional[Path],
    data: Data = OF_THE_SET,
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
    where = device_of(device)
    check_choices({"search": search, "evaluation": evaluation}, where)
    search_networks(path, _context(data, path, seed, where), search, evaluation, out)


def sweep(
    sweep: Annotated[Sweep, arg(name="")],
    data: Data = Data(),
    parts: Annotated[StartParts, arg(name="start")] = StartParts(),
    experts: Experts = Experts(),
    evaluation: Evaluation = Evaluation(),
    *,
    place: Here,
    seed: int = 0,
) -> None:
    """Accuracy and coverage of methods, starts and selections over shares of one data set. Networks are trained on
    every set with the same number of updates: evaluation.training.epochs are those on the smallest set. Writes
    sweep.json, sweep.md, accuracy.png and coverage.png; a killed call continues, and finished cells are not run again.

    Args:
        parts: What the starts of all curves have in common.
        seed: Seed of every random choice.
    """
    base = Run(data=data, start=Start(**vars(parts)), experts=experts, evaluation=evaluation, seed=seed)
    run_sweep(sweep, base, place.out, device_of(place.device))


def rank(
    path: Positional[Path],
    data: Data = OF_THE_SET,
    ranking: Ranking = Ranking(),
    evaluation: Evaluation = CONVNET,
    *,
    out: Path,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """DD-Ranking's label-robust and augmentation-robust scores of a set: how good it is beside labels and augmentation.

    Args:
        path: The set (a .safetensors file of selmatch).
        evaluation: The method's own evaluation, in which the set is compared with random images.
        out: Folder for rank.json, rank.md, rank.png and the records that a killed call continues from.
        seed: Seed of random and held-out images, initial weights, order and augmentation.
        device: auto, cpu, cuda, cuda:1 …
    """
    where = device_of(device)
    check_choices({"ranking": ranking, "evaluation": evaluation}, where)
    rank_set(path, _context(data, path, seed, where), ranking, evaluation, out)


def report_(path: Positional[Path], *, out: Path | None = None, columns: int = 10) -> None:
    """Of a run's folder, a page with everything that it holds: results, images, plots, times, settings. Of a set, a PNG
    of its images, a row for each class (20 classes at most); or one of each class, with all its images.

    Args:
        path: The folder of a run, or a set (a .safetensors file of selmatch).
        out: Of a run, the page to write; by default report.html in its folder. Of a set, the PNG to write; or, where
            the name does not end in .png, a new folder for one PNG of each class.
        columns: Images a class at most, for one PNG.
    """
    if path.is_dir():
        out = path / page.NAME if out is None else out
        page.write_page(path, out)
        say(out)
        return
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the folder of a run, or a set")
    if out is None:
        raise ValueError(f"--out is missing: it names the PNG or the folder for the pictures of {path}")
    subset = DistilledSet.load(path)
    if out.suffix.lower() == ".png":
        report.image_grid(subset.denormalized(), out, subset.hard_labels, subset.class_names, columns, subset.method)
    else:
        report.class_grids(subset.denormalized(), subset.hard_labels, subset.class_names, out)
    say(out)


def methods(
    names: Positional[tuple[str, ...]] = (), *, out: Path = Path("runs/methods"), seed: int = 0, device: str = "cpu"
) -> None:
    """Every method, and every selection of real images, on scikit-learn's digits against random images; continues after
    a kill.

    Args:
        names: Of the methods, and selection for the selections of real images; by default all.
        out: Folder for results.json and one folder a run.
        seed: Seed of every random choice.
        device: auto, cpu, cuda, cuda:1 …
    """
    compare(names, out, seed, device_of(device))
