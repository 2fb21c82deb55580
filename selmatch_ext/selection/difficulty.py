"""The difficulty of each training image, from a score file or from networks that are watched while they train."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext import ranks
from selmatch_ext.context import Context
from selmatch_ext.data.images import ImageData
from selmatch_ext.files import atomic_write, check_writable
from selmatch_ext.models import embed
from selmatch_ext.provenance import check_same, known_name, of_images, to_dict
from selmatch_ext.selection.aum import area, own_margin
from selmatch_ext.selection.grand import gradient_norm
from selmatch_ext.selection.scores import describe_scores, difficulty, el2n, forgetting_events, load_scores
from selmatch_ext.selection.uncertainty import entropy, least_confidence, margin
from selmatch_ext.settings import Scores
from selmatch_ext.training import predict, train_on_real


def training_difficulty(context: Context, settings: Scores, path: Path) -> Tensor:
    """(n,) difficulty of each training image, higher = harder: read from `settings.source`, or computed and kept at
    `path`. A score file is for the data, or for the full data set that the data are a subset of."""
    data = context.data
    if settings.source in COMPUTED:
        made_from = {"scores": to_dict(settings), "seed": context.seed, "data": data.name, **of_images(data)}
        if not path.exists():
            check_writable(path)
            scores = compute_scores(context, settings)
            if ranks.first():
                with atomic_write(path) as temporary, open(temporary, "wb") as file:
                    np.savez(file, scores=scores.numpy(), labels=data.train.labels.numpy(), how=json.dumps(made_from))
            ranks.barrier()
        known_name(check_same(path, describe_scores(path)[1], made_from), data.name, path)
        return difficulty(load_scores(path, data.train.labels, data.name), settings.source)
    kind, _, source = settings.source.rpartition(":")
    kind, full = kind or "cscore", data.full
    if full is None or _is_of_subset(source, data):
        return difficulty(load_scores(source, data.train.labels, data.name), kind)
    return difficulty(load_scores(source, full.labels, full.name), kind)[full.kept]


def _is_of_subset(source: str, data: ImageData) -> bool:
    """Whether a score file has as many scores as the subset `data`. ValueError when it says it is of another."""
    count, how = describe_scores(source)
    digest = data.train.digest()
    if count == len(data.train) and how.get("images", digest) != digest:
        raise ValueError(f"{source} holds scores of other images than those of {data.name}: another subset or seed")
    return count == len(data.train)


def compute_scores(context: Context, settings: Scores) -> Tensor:
    """Scores (n,) float32 of every training image of the kind `settings.source`, one of COMPUTED, over `settings.runs`
    networks; `difficulty` gives them a direction.

    Networks are watched after every epoch for forgetting events (arXiv 1812.05159), EL2N and GraNd (arXiv 2107.07075,
    averaged over the epochs) and AUM (arXiv 2001.10528), and after the last epoch for how unsure they are."""
    labels, epochs, measure = context.data.train.labels, settings.training.epochs, MEASURES[settings.source]
    watched = {}
    work = {"unit": "epoch", "kind": settings.model, "each": len(labels)}
    with ranks.progress(total=len(ranks.mine(settings.runs)) * epochs, desc="scores", **work) as progress:
        for run in ranks.mine(settings.runs):
            model = context.network(settings.model, "scores", run)
            take = context.real_images()
            seen: list[Tensor] = []

            def watch(
                epoch: int,
                model: torch.nn.Module = model,
                take: Callable[[Tensor], Tensor] = take,
                seen: list[Tensor] = seen,
            ) -> None:
                if epoch == epochs or not measure.last:
                    seen.append(measure.see(partial(predict, model, take, len(labels), context.device), labels))
                progress.update()

            order = context.generator("scores", run)
            train_on_real(model, context, settings.training, settings.strategy, order, watch)
            watched[run] = torch.stack(seen)
    blank = torch.zeros(1 if measure.last else epochs, len(labels), dtype=measure.dtype)
    return measure.reduce(torch.stack(ranks.collect(watched, settings.runs, blank)))


@dataclass(frozen=True)
class Measure:
    """How a kind of score is computed. see(predict, labels): (n,) of a network as it is, where predict() gives its
    logits (n, K) and predict(output=embed) its features. reduce: (runs, epochs, n) -> (n,) float32. last: see is asked
    after the last epoch only."""

    see: Callable[[Callable[..., Tensor], Tensor], Tensor]
    reduce: Callable[[Tensor], Tensor]
    last: bool = False
    dtype: torch.dtype = torch.float32


def _mean(history: Tensor) -> Tensor:
    return history.mean((0, 1))


def _is_right(predict: Callable[..., Tensor], labels: Tensor) -> Tensor:
    return predict().argmax(1) == labels


def _error_norm(predict: Callable[..., Tensor], labels: Tensor) -> Tensor:
    return el2n(F.softmax(predict(), 1).unsqueeze(0), labels)


def _gradient_norm(predict: Callable[..., Tensor], labels: Tensor) -> Tensor:
    return gradient_norm(predict(), predict(output=embed), labels)


def _own_margin(predict: Callable[..., Tensor], labels: Tensor) -> Tensor:
    return own_margin(F.softmax(predict(), 1), labels)


def _unsure(measure: Callable[[Tensor], Tensor]) -> Measure:
    """Of predictions after training, in float64: a trained network's largest probability is often 1 in float32."""
    return Measure(lambda predict, _: measure(F.softmax(predict().double(), 1)).float(), _mean, last=True)


MEASURES = {
    "forgetting": Measure(_is_right, forgetting_events, dtype=torch.bool),
    "el2n": Measure(_error_norm, _mean),
    "grand": Measure(_gradient_norm, _mean),
    "aum": Measure(_own_margin, area),
    "least-confidence": _unsure(least_confidence),
    "entropy": _unsure(entropy),
    "margin": _unsure(margin),
}
COMPUTED = tuple(MEASURES)
"""Kinds of scores that are computed here; `scores.source` is one of them, or says which file has the scores."""
