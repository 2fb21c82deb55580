"""Architecture search with a small set as the proxy of all training images."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import torch

from selmatch_ext import models, ranks, report
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import real_subset
from selmatch_ext.data.images import ImageData
from selmatch_ext.evaluation import evaluate
from selmatch_ext.output import attempt, say
from selmatch_ext.provenance import to_dict
from selmatch_ext.seeds import generator
from selmatch_ext.settings import Evaluation, Search
from selmatch_ext.studies.sets import set_alone, write


def search(
    path: Path,
    context: Context,
    settings: Search,
    evaluation: Evaluation,
    folder: Path,
) -> tuple[float | None, dict[str, tuple[float, float]]]:
    """Architecture search with a set as the proxy: ranks a grid of ConvNets by their accuracy after training on it, and
    compares with training on all images (DC, arXiv 2006.05929, section 4.2).

    Returns Spearman's rank correlation (None where one of the rankings is all ties) and {network: (% on the set, % on
    all images)}, best on the set first. As in `cross` a set's schedule (DD) is left aside. ConvNets of the grid that do
    not take such images are left out; ValueError when fewer than two are left."""
    from scipy.stats import spearmanr

    data = context.data
    names, left_out = candidates(settings, data)
    subset = set_alone(path)
    everything = real_subset(data, torch.arange(len(data.train)), "all training images")
    full = replace(evaluation, training=settings.full, networks=settings.full_networks)
    points: dict[str, tuple[float, float]] = {}
    for name in names:
        proxy, real = (
            evaluate(s, context, replace(how, model=name), folder / f"{kind}_{name}.json", f"{kind}: {name}")
            for kind, s, how in (("set", subset, evaluation), ("all", everything, full))
        )
        points[name] = proxy["test"].mean, real["test"].mean
    points = dict(sorted(points.items(), key=lambda item: -item[1][0]))
    varied = all(len(set(values)) > 1 for values in zip(*points.values(), strict=True))
    correlation = float(spearmanr(list(points.values())).statistic) if varied else None
    if ranks.first():
        shown = "none" if correlation is None else f"{correlation:.3f}"
        rows = [["network", "on the set", "on all images"]]
        rows += [[name, *(f"{a:.1f} %" for a in pair)] for name, pair in points.items()]
        how = {"search": to_dict(settings), "evaluation": to_dict(evaluation), "seed": context.seed}
        made = {"correlation": correlation, "accuracy": points, "left_out": left_out, "settings": how}
        write(folder, "search", rows, made)
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
