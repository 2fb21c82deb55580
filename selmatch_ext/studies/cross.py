"""Cross-architecture table: other networks trained on the same small sets."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from selmatch_ext import models, ranks, report
from selmatch_ext.context import Context
from selmatch_ext.evaluation import Accuracy, evaluate
from selmatch_ext.output import attempt
from selmatch_ext.provenance import to_dict
from selmatch_ext.settings import Evaluation
from selmatch_ext.studies.sets import as_means, load_sets, set_alone, write


def cross(
    paths: list[Path],
    networks: list[str],
    context: Context,
    settings: Evaluation,
    folder: Path,
) -> dict[str, dict[str, Accuracy]]:
    """The cross-architecture table: test accuracy of every network trained on every set, {set: {network: accuracy}}.

    networks: whatever `models.build` takes; settings.model is not used. A set's schedule (DD), which is for one network
    alone, is left aside: all are trained as `settings` say. Raises ValueError for a network that is not known or does
    not take such images, before anything is trained."""
    data = context.data
    for name in networks:
        models.build(name, data.channels, data.classes, data.image_size, generator=context.generator())
    sets = load_sets(paths, data, set_alone)
    results = {
        label: {
            name: evaluate(
                subset,
                context,
                replace(settings, model=name),
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
        write(
            folder, "cross", rows, {"accuracy": as_means(results), "settings": to_dict(settings), "seed": context.seed}
        )
        attempt(report.plot_bars, bars, folder / "cross.png", "test accuracy (%)")
    return results


def _file_name(network: str) -> str:
    return re.sub(r"[^\w.+-]", "_", network)
