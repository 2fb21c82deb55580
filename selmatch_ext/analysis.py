"""What a small training set is good for: other networks, learning class by class, choosing a network.

Each function trains many networks by `evaluate`, keeps the record of every finished one in its folder, so that a killed
call goes on, and writes a JSON file, a table in Markdown and a PNG beside them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from selmatch_ext import models, ranks, report
from selmatch_ext.coverage import named
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.images import ImageData, ImageSplit
from selmatch_ext.evaluation import Accuracy, evaluate, real_subset, seen_as, training_set
from selmatch_ext.files import write_json, write_text
from selmatch_ext.output import attempt, say
from selmatch_ext.seeds import generator
from selmatch_ext.settings import Continual, Evaluation, Search, to_dict


def cross(
    paths: list[Path],
    networks: list[str],
    data: ImageData,
    settings: Evaluation,
    seed: int,
    device: torch.device,
    folder: Path,
) -> dict[str, dict[str, Accuracy]]:
    """The cross-architecture table: test accuracy of every network trained on every set, {set: {network: accuracy}}.

    networks: whatever `models.build` takes; settings.model is not used. A set's schedule (DD), which is for one network
    alone, is left aside: all are trained as `settings` say. Raises ValueError for a network that is not known or does
    not take such images, before anything is trained."""
    for name in networks:
        models.build(name, data.channels, data.classes, data.image_size, generator=generator(seed))
    sets = _sets(paths, data, _without_schedule)
    results = {
        label: {
            name: evaluate(
                subset,
                data,
                replace(settings, model=name),
                seed,
                device,
                folder / f"{label}_{_file_name(name)}.json",
                f"{label}: {name}",
            )["test"]
            for name in networks
        }
        for label, subset in sets.items()
    }
    if ranks.first():
        rows = [["training set", *networks], *([label, *map(str, r.values())] for label, r in results.items())]
        bars = {label: {name: (a.mean, a.std) for name, a in r.items()} for label, r in results.items()}
        _write(folder, "cross", rows, {"accuracy": _plain(results), "settings": to_dict(settings), "seed": seed})
        attempt(report.plot_bars, bars, folder / "cross.png", "test accuracy (%)")
    return results


def continual(
    paths: list[Path],
    data: ImageData,
    settings: Continual,
    evaluation: Evaluation,
    seed: int,
    device: torch.device,
    folder: Path,
) -> dict[str, dict[int, Accuracy]]:
    """Class-incremental learning with a set as the memory: classes arrive in `settings.steps` steps, in an order drawn
    from `seed`; at each, networks are trained from scratch on the memory of the classes seen so far, and tested on
    those (as in DSA, arXiv 2102.08259, section 4.3, and DM). {set: {number of classes seen: accuracy}}.

    Raises ValueError for more steps than classes."""
    if not 1 <= settings.steps <= data.classes:
        raise ValueError(f"steps is {settings.steps}; allowed is 1 to {data.classes}, the number of classes")
    order = torch.randperm(data.classes, generator=generator(seed, "classes"))
    seen = [
        order[: int(part[-1]) + 1].sort().values for part in torch.arange(data.classes).tensor_split(settings.steps)
    ]
    sets = _sets(paths, data, training_set)
    results = {
        label: {
            len(classes): evaluate(
                restrict_set(subset, classes, settings.memory),
                restrict(data, classes),
                evaluation,
                seed,
                device,
                folder / f"{label}_{len(classes)}_classes.json",
                f"{label}: {len(classes)} classes",
            )["test"]
            for classes in seen
        }
        for label, subset in sets.items()
    }
    if ranks.first():
        rows = [["memory", *(f"{len(c)} classes" for c in seen)]]
        rows += [[label, *map(str, r.values())] for label, r in results.items()]
        curves = {label: {k: (a.mean, a.std) for k, a in r.items()} for label, r in results.items()}
        how = {"continual": to_dict(settings), "evaluation": to_dict(evaluation), "seed": seed}
        made = {"accuracy": _plain(results), "order": [data.class_names[c] for c in order.tolist()], "settings": how}
        _write(folder, "continual", rows, made)
        axes = "classes seen so far", "test accuracy on them (%)"
        attempt(report.plot_curves, curves, folder / "continual.png", *axes)
    return results


def search(
    path: Path,
    data: ImageData,
    settings: Search,
    evaluation: Evaluation,
    seed: int,
    device: torch.device,
    folder: Path,
) -> tuple[float | None, dict[str, tuple[float, float]]]:
    """Architecture search with a set as the proxy: ranks a grid of ConvNets by their accuracy after training on it, and
    compares with training on all images (DC, arXiv 2006.05929, section 4.2).

    Returns Spearman's rank correlation (None where one of the rankings is all ties) and {network: (% on the set, % on
    all images)}, best on the set first. As in `cross` a set's schedule (DD) is left aside. ConvNets of the grid that do
    not take such images are left out; ValueError when fewer than two are left."""
    from scipy.stats import spearmanr

    names, left_out = candidates(settings, data)
    subset = _without_schedule(path)
    everything = real_subset(data, torch.arange(len(data.train)), "all training images")
    full = replace(evaluation, training=settings.full, networks=settings.full_networks)
    points = {}
    for name in names:
        found = [
            evaluate(s, data, replace(how, model=name), seed, device, folder / f"{kind}_{name}.json", f"{kind}: {name}")
            for kind, s, how in (("set", subset, evaluation), ("all", everything, full))
        ]
        points[name] = tuple(f["test"].mean for f in found)
    points = dict(sorted(points.items(), key=lambda item: -item[1][0]))
    varied = all(len(set(values)) > 1 for values in zip(*points.values(), strict=True))
    correlation = float(spearmanr(list(points.values())).statistic) if varied else None
    if ranks.first():
        shown = "none" if correlation is None else f"{correlation:.3f}"
        rows = [["network", "on the set", "on all images"]]
        rows += [[name, *(f"{a:.1f} %" for a in pair)] for name, pair in points.items()]
        how = {"search": to_dict(settings), "evaluation": to_dict(evaluation), "seed": seed}
        made = {"correlation": correlation, "accuracy": points, "left_out": left_out, "settings": how}
        _write(folder, "search", rows, made)
        say(f"Spearman's rank correlation: {shown}")
        attempt(report.plot_ranking, points, folder / "search.png", f"rank correlation {shown}")
    return correlation, points


def candidates(settings: Search, data: ImageData) -> tuple[list[str], list[str]]:
    """Names of the grid's ConvNets that take `data`'s images, and of those that do not."""
    parts = settings.depths, settings.widths, settings.norms, settings.activations, settings.poolings
    fit, left_out = [], []
    for depth, width, norm, activation, pooling in itertools.product(*parts):
        name = f"ConvNetD{depth}W{width}{norm}{activation}{pooling}"
        try:
            models.build(name, data.channels, data.classes, data.image_size, generator=generator(0))
            fit.append(name)
        except ValueError:
            left_out.append(name)
    if len(fit) < 2:
        raise ValueError(f"{len(fit)} of the grid's {len(fit) + len(left_out)} networks take {data.name}'s images")
    return fit, left_out


def restrict(data: ImageData, classes: torch.Tensor) -> ImageData:
    """The images of some classes (k,) int64, ascending; they become classes 0 to k−1."""

    def only(part: ImageSplit) -> ImageSplit:
        kept = part.take(torch.isin(part.labels, classes).nonzero().squeeze(1))
        return replace(kept, labels=torch.searchsorted(classes, kept.labels))

    return replace(
        data,
        name=f"{data.name} ({len(classes)} classes)",
        train=only(data.train),
        test=only(data.test),
        class_names=[data.class_names[c] for c in classes.tolist()],
    )


def restrict_set(subset: DistilledSet, classes: torch.Tensor, per_class: int | None = None) -> DistilledSet:
    """The images of some classes (k,) int64, ascending, at most the first `per_class` of each; they become classes
    0 to k−1. Soft labels keep those classes' probabilities, scaled to sum to 1. A schedule (DD) is left out."""
    labels = subset.hard_labels
    kept = torch.cat([(labels == c).nonzero().squeeze(1)[:per_class] for c in classes.tolist()])
    if subset.labels.is_floating_point():
        chosen = subset.labels[kept][:, classes]
        chosen = chosen / chosen.sum(1, keepdim=True)
    else:
        chosen = torch.searchsorted(classes, labels[kept])
    return replace(
        subset,
        images=subset.images[kept],
        labels=chosen,
        distilled=subset.distilled[kept],
        indices=subset.indices[kept],
        class_names=[subset.class_names[c] for c in classes.tolist()],
        schedule=None,
    )


def _sets(paths: list[Path], data: ImageData, load: Callable[[Path], DistilledSet]) -> dict[str, DistilledSet]:
    """The sets in files by their labels. ValueError for one that does not fit `data`, before anything is trained."""
    sets = {label: load(path) for label, path in named(paths).items()}
    for subset in sets.values():
        seen_as(subset, data)
    return sets


def _without_schedule(path: Path) -> DistilledSet:
    """The set in a file, for networks other than that of its schedule."""
    return replace(training_set(path), schedule=None)


def _plain(results: dict) -> dict:
    return {label: {str(k): {"mean": a.mean, "std": a.std} for k, a in r.items()} for label, r in results.items()}


def _file_name(network: str) -> str:
    return re.sub(r"[^\w.+-]", "_", network)


def _write(folder: Path, name: str, rows: list[list[str]], made: dict) -> None:
    write_json(folder / f"{name}.json", made)
    write_text(folder / f"{name}.md", report.markdown(rows) + "\n")
    say(report.table(rows))
