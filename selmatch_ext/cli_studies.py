"""Verbs of the command line that ask what a set is good for, and those that show or export one."""

from __future__ import annotations

from pathlib import Path

import tyro

from selmatch_ext import analysis, comparison, pipeline, report
from selmatch_ext.coverage import coverage as measure_coverage
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.evaluation import evaluate as evaluate_set
from selmatch_ext.evaluation import training_set
from selmatch_ext.output import say
from selmatch_ext.preflight import check_choices
from selmatch_ext.settings import Continual, Coverage, Data, Evaluation, Features, Search
from selmatch_ext.surroundings import device_of

Positional = tyro.conf.Positional


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
    where = device_of(device)
    check_choices({"evaluation": evaluation}, where)
    images, _ = pipeline.load_data(data, seed)
    subset = training_set(path)
    result = evaluate_set(subset, images, evaluation, seed, where, record)["test"]
    model = evaluation.model if subset.schedule is None else subset.schedule.model
    say(f"{model}: {result} over {len(result.values)} networks")


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
    where = device_of(device)
    check_choices({"coverage": coverage, "features": features, "evaluation": evaluation}, where)
    images, _ = pipeline.load_data(data, seed)
    measure_coverage(list(paths), images, coverage, features, evaluation, seed, where, out)


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
    where = device_of(device)
    check_choices({"evaluation": evaluation}, where)
    images, _ = pipeline.load_data(data, seed)
    analysis.cross(list(paths), list(models), images, evaluation, seed, where, out)


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
    where = device_of(device)
    check_choices({"continual": continual, "evaluation": evaluation}, where)
    images, _ = pipeline.load_data(data, seed)
    analysis.continual(list(paths), images, continual, evaluation, seed, where, out)


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
    where = device_of(device)
    check_choices({"search": search, "evaluation": evaluation}, where)
    images, _ = pipeline.load_data(data, seed)
    analysis.search(path, images, search, evaluation, seed, where, out)


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
    say(out)


def export(path: Positional[Path], *, out: Path) -> None:
    """A set as a folder of PNGs that torchvision's ImageFolder reads; with allow_empty=True where learned labels left a
    class without images.

    Args:
        path: The set (a .safetensors file of selmatch).
        out: The folder to make; it must not exist or be empty.
    """
    DistilledSet.load(path).export(out)
    say(out)


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
