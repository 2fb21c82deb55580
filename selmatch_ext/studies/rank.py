"""DD-Ranking's scores of a set (arXiv 2505.13300): how good it is beside its labels and its augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selmatch_ext import ranks, report
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, real_subset, training_set
from selmatch_ext.data.images import ImageData
from selmatch_ext.evaluation import Accuracy, evaluate
from selmatch_ext.output import attempt, say
from selmatch_ext.provenance import to_dict
from selmatch_ext.seeds import derive
from selmatch_ext.selection.start import random_like
from selmatch_ext.settings import Evaluation, Ranking
from selmatch_ext.studies.sets import as_means, write


def rank(path: Path, context: Context, settings: Ranking, evaluation: Evaluation, folder: Path) -> dict[str, float]:
    """The scores of the set in a file, and what they are made of:

    - hard_label_recovery: accuracy of all training images minus that of the set, both with hard labels.
    - improvement_over_random: accuracy of the set minus that of random images, both trained on as `evaluation` says,
      the set with its own labels.
    - label_robust: `score` of w·improvement − (1 − w)·recovery, w = settings.label_weight.
    - augmentation_robust: `score` of γ·difference with augmentation + (1 − γ)·difference without, each between the set
      and random images, γ = settings.augmentation_weight.

    The first two are in points of accuracy, the scores from 0 to 100. Each learning rate is the best of some on
    held-out training images; test accuracies are those after the last epoch. Raises ValueError where no rate works,
    where a class has too few images to hold some out, and as `evaluate` does."""
    subset, work = training_set(path), _Work(context, settings, folder)
    ordinary = replace(subset, schedule=None)
    hard = replace(
        evaluation,
        training=settings.hard,
        loss="cross-entropy",
        distilled_strategy=settings.strategy,
        selected_strategy=None,
    )
    with_hard_labels = replace(ordinary, labels=subset.hard_labels, scores=None)
    kinds = {"own": (subset, evaluation)}
    for name, strategy in (("augmented", settings.strategy), ("plain", "none")):
        kinds[name] = ordinary, replace(evaluation, distilled_strategy=strategy, selected_strategy=None)
    found = {
        "all training images": {"hard labels": work.on_all(hard)},
        "set": {"hard labels": work.on_set(with_hard_labels, hard, "hard")},
        "random": {},
    }
    for name, (mine, how) in kinds.items():
        found["set"][name] = work.on_set(mine, how, name)
        found["random"][name] = work.on_random(mine, how, name)
    scores = _scores({label: {kind: a.mean for kind, a in row.items()} for label, row in found.items()}, settings)
    if ranks.first():
        asked = {"ranking": to_dict(settings), "evaluation": to_dict(evaluation), "seed": context.seed}
        _write(folder, found, scores, work.rates, asked)
    return scores


def score(difference: float) -> float:
    """A difference of shares, from −1 to 1, on the scale from 0 to 100: 100·(e^d − e⁻¹) / (e − e⁻¹)."""
    return 100 * (math.exp(difference) - math.exp(-1)) / (math.e - math.exp(-1))


def _scores(means: dict[str, dict[str, float]], settings: Ranking) -> dict[str, float]:
    mine, random, label, part = means["set"], means["random"], settings.label_weight, settings.augmentation_weight
    recovery = means["all training images"]["hard labels"] - mine["hard labels"]
    better = {kind: mine[kind] - random[kind] for kind in random}
    return {
        "label_robust": score((label * better["own"] - (1 - label) * recovery) / 100),
        "augmentation_robust": score((part * better["augmented"] + (1 - part) * better["plain"]) / 100),
        "hard_label_recovery": recovery,
        "improvement_over_random": better["own"],
    }


def _write(
    folder: Path,
    found: dict[str, dict[str, Accuracy]],
    scores: dict[str, float],
    rates: dict[str, float],
    settings: dict[str, Any],
) -> None:
    kinds = list(found["set"])
    rows = [["trained on", *kinds]]
    rows += [[label, *(str(row[kind]) if kind in row else "" for kind in kinds)] for label, row in found.items()]
    write(folder, "rank", rows, {**scores, "rates": rates, "accuracy": as_means(found), "settings": settings})
    for name, value in scores.items():
        say(f"{name.replace('_', ' ')}: {value:.1f}")
    bars = {label: {kind: (a.mean, a.std) for kind, a in row.items()} for label, row in found.items() if len(row) > 1}
    bars["random"] = {kind: bars["random"].get(kind, (0.0, 0.0)) for kind in kinds}
    attempt(report.plot_bars, bars, folder / "rank.png", "test accuracy (%)")


def held_out(context: Context, settings: Ranking) -> ImageData:
    """The data set without its test images: settings.held_out of the training images of each class, drawn by the seed,
    take their place."""
    return context.data.held_out(settings.held_out, context.generator("rank", "held out"))


@dataclass
class _Work:
    """Trains networks for the scores. rates: the learning rates that were chosen, by what they are for."""

    context: Context
    settings: Ranking
    folder: Path

    def __post_init__(self) -> None:
        self.rates: dict[str, float] = {}
        self.held = replace(self.context, data=held_out(self.context, self.settings))

    def on_all(self, how: Evaluation) -> Accuracy:
        everything = real_subset(self.context.data, torch.arange(len(self.context.data.train)), "all training images")
        how = replace(how, training=self.settings.full)
        return evaluate(everything, self.context, how, self.folder / "all.json", "all training images")["test"]

    def on_set(self, subset: DistilledSet, how: Evaluation, label: str) -> Accuracy:
        how = self._at_best_rate(subset, how, f"set_{label}")
        return evaluate(subset, self.context, how, self.folder / f"set_{label}.json", f"set: {label}")["test"]

    def on_random(self, subset: DistilledSet, how: Evaluation, label: str) -> Accuracy:
        """Accuracies from as many random images as `subset` has, of those that are not held out, trained on in the same
        way; every network gets other images."""
        how, values = self._at_best_rate(self._random(subset, 0), how, f"random_{label}"), []
        for k in range(how.networks):
            record = self.folder / f"random_{label}_{k}.json"
            found = evaluate(self._random(subset, k), self._at(k), replace(how, networks=1), record, f"random: {label}")
            values.append(found["test"].mean)
        return Accuracy(values)

    def _at(self, k: int) -> Context:
        return replace(self.context, seed=derive(self.context.seed, "rank", k))

    def _random(self, subset: DistilledSet, k: int) -> DistilledSet:
        images = random_like(subset, replace(self._at(k), data=self.held.data))
        return replace(images, schedule=subset.schedule)

    def _at_best_rate(self, subset: DistilledSet, how: Evaluation, label: str) -> Evaluation:
        """`how` with the learning rate by which one network is best on the held-out images. A set with a schedule has
        its own rates."""
        if subset.schedule is not None:
            return how
        tried: dict[float, float] = {}
        for rate in sorted({*self.settings.rates, how.training.lr}):
            asked = replace(how, networks=1, training=replace(how.training, lr=rate))
            record = self.folder / f"rate_{label}_{rate:g}.json"
            try:
                tried[rate] = evaluate(subset, self.held, asked, record, f"{label}: lr {rate:g}")["test"].mean
            except FloatingPointError:  # training diverges at this rate
                if ranks.world() > 1:  # the other processes wait for this one
                    raise
        if not tried:
            raise ValueError(f"training diverges at all of ranking.rates {self.settings.rates}; try smaller ones")
        self.rates[label] = max(tried, key=lambda rate: tried[rate])
        return replace(how, training=replace(how.training, lr=self.rates[label]))
