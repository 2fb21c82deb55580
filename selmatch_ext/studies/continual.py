"""Continual learning with a small set as the memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from selmatch_ext import ranks, report
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, training_set
from selmatch_ext.data.images import ImageData
from selmatch_ext.evaluation import Accuracy, evaluate
from selmatch_ext.output import attempt
from selmatch_ext.provenance import to_dict
from selmatch_ext.settings import Continual, Evaluation
from selmatch_ext.studies.sets import as_means, load_sets, write


def continual(
    paths: list[Path],
    context: Context,
    settings: Continual,
    evaluation: Evaluation,
    folder: Path,
) -> dict[str, dict[int, Accuracy]]:
    """Class-incremental learning with a set as the memory: classes arrive in `settings.steps` steps, in an order drawn
    from the seed; at each, networks are trained from scratch on the memory of the classes seen so far, and tested on
    those (as in DSA, arXiv 2102.08259, section 4.3, and DM). {set: {number of classes seen: accuracy}}.

    Raises ValueError for more steps than classes."""
    data = context.data
    if not 1 <= settings.steps <= data.classes:
        raise ValueError(f"steps is {settings.steps}; allowed is 1 to {data.classes}, the number of classes")
    order = torch.randperm(data.classes, generator=context.generator("classes"))
    seen = [
        order[: int(part[-1]) + 1].sort().values for part in torch.arange(data.classes).tensor_split(settings.steps)
    ]
    sets = load_sets(paths, data, training_set)
    results = {
        label: {
            len(classes): evaluate(
                restrict_set(subset, classes, settings.memory),
                replace(context, data=restrict(data, classes)),
                evaluation,
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
        how = {"continual": to_dict(settings), "evaluation": to_dict(evaluation), "seed": context.seed}
        made = {"accuracy": as_means(results), "order": [data.class_names[c] for c in order.tolist()], "settings": how}
        write(folder, "continual", rows, made)
        axes = "classes seen so far", "test accuracy on them (%)"
        attempt(report.plot_curves, curves, folder / "continual.png", *axes)
    return results


def restrict(data: ImageData, classes: torch.Tensor) -> ImageData:
    """The images of some classes (k,) int64, ascending, normalized as in `data`; they become classes 0 to k−1."""
    part = data.of_classes(classes)
    return replace(part, mean=data.mean, std=data.std, whitening=data.whitening, full=None)


def restrict_set(subset: DistilledSet, classes: torch.Tensor, per_class: int | None = None) -> DistilledSet:
    """The images of some classes (k,) int64, ascending, at most the first `per_class` of each; they become classes
    0 to k−1. Soft labels keep those classes' probabilities, scaled to sum to 1; weights stay as they are.
    A schedule (DD) and scores are left out."""
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
        weights=None if subset.weights is None else subset.weights[kept],
        class_names=[subset.class_names[c] for c in classes.tolist()],
        schedule=None,
        scores=None,
    )
