"""Which images a distillation starts from, and which of them it learns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from selmatch_ext.clock import measured
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, real_subset, seen_as
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import Accuracy
from selmatch_ext.experts import expert_logits
from selmatch_ext.selection import coreset
from selmatch_ext.selection.d2 import d2
from selmatch_ext.selection.difficulty import COMPUTED, training_difficulty
from selmatch_ext.selection.features import split_features, trained_networks
from selmatch_ext.selection.gradients import LastLayer, craig, gradmatch
from selmatch_ext.selection.moderate import moderate
from selmatch_ext.selection.partial_update import marked
from selmatch_ext.selection.strata import ccs
from selmatch_ext.selection.window import beta_grid, check_classes, window, without_hardest
from selmatch_ext.selection.window_search import search_window, window_set
from selmatch_ext.settings import DRAWN, SELECTIONS, Evaluation, Start
from selmatch_ext.training import predict

CHOICES = (*SELECTIONS, *DRAWN)


@dataclass(frozen=True)
class Kept:
    """Where a choice keeps what it computes, and from where a killed call continues. Several choices may share the
    scores and the networks of the features; the records of a window search are of one choice."""

    scores: Path
    features: Path
    window: Path

    @classmethod
    def under(cls, folder: Path | None) -> Kept:
        """In one folder; None for a choice that computes nothing."""
        folder = folder or Path()
        return cls(folder / "scores.npz", folder / "features", folder / "window")


@dataclass(frozen=True)
class Chosen:
    """The images that were chosen.

    beta: where the window lies, for choices by difficulty. tried: the test accuracies of windows that were compared.
    """

    images: DistilledSet
    beta: float | None = None
    tried: dict[float, Accuracy] = field(default_factory=dict)


def is_file(select: str) -> bool:
    """Whether `start.select` is the path of a set. ValueError where it is neither that nor one of the choices."""
    if select in CHOICES:
        return False
    if not Path(select).exists():
        raise ValueError(f"start.select is {select!r}; it must be one of {', '.join(CHOICES)}, or the path of a set")
    return True


@measured("start")
def choose(
    settings: Start,
    context: Context,
    evaluation: Evaluation,
    place: Path | Kept | None,
    experts: ExpertStore | None = None,
) -> Chosen:
    """The set that a distillation starts from, with the images marked that it learns.

    evaluation: how networks are trained that compare windows. place: a folder that keeps scores.npz, window/ and
    features/, from which a killed call continues, or where each of them is. Every class has settings.ipc images, unless
    gradmatch finds fewer and is told not to fill. Raises ValueError for a set of other data, and for correct without
    experts."""
    kept = place if isinstance(place, Kept) else Kept.under(place)
    if is_file(settings.select):
        return Chosen(_from_file(settings.select, context))
    if settings.select == "window" or settings.select in coreset.BY_SCORE:
        return _by_difficulty(settings, context, evaluation, kept)
    weights = None
    if settings.select in coreset.BY_NETWORK:
        indices, weights = _by_network(settings, context, kept)
    elif settings.select == "ccs":
        scores = training_difficulty(context, settings.scores, kept.scores)
        indices = _strata(settings, context, scores)
    elif settings.select == "correct":
        indices = _correct(context, settings.ipc, experts)
    else:
        indices = coreset.random(context.data.train.labels, settings.ipc, context.generator("random"))
    chosen = marked(real_subset(context.data, indices, settings.select, weights), settings.ipc, settings.alpha)
    if settings.select == "noise":
        noise = torch.randn(chosen.images.shape, generator=context.generator("noise"))
        learned = chosen.distilled
        images = torch.where(learned.view(-1, 1, 1, 1), noise, chosen.images)
        chosen = replace(chosen, images=images, indices=chosen.indices.where(~learned, -1))
    return Chosen(chosen)


def _from_file(path: str, context: Context) -> DistilledSet:
    """The set in a file, without its learned learning rate, its schedule and its scores."""
    chosen = DistilledSet.load(path)
    data = seen_as(chosen, context.data)
    if not chosen.distilled.any():
        raise ValueError(f"start.select {path} marks no image that is to be learned")
    mine, there = (torch.bincount(labels, minlength=data.classes) for labels in (chosen.hard_labels, data.train.labels))
    if (mine > there).any():
        label = int((mine - there).argmax())
        raise ValueError(
            f"start.select {path} has {int(mine[label])} images of class {data.class_names[label]}, the data "
            f"{int(there[label])}: there are too few to compare with"
        )
    return replace(chosen, lr=None, schedule=None, scores=None)


def prototype(settings: Start, context: Context) -> DistilledSet:
    """A set with the shapes, labels and mask of the one that `choose` will return, but without training any network:
    preflight.py checks the later stages with it.

    Raises ValueError where the choice is certain to fail: an ipc that a class does not have, windows or scores that do
    not fit, a cut-off that leaves too few images, a file that is not there or is of other data."""
    if is_file(settings.select):
        return _from_file(settings.select, context)
    counts, place = check_classes(context.data.train.labels, settings.ipc), settings.window
    if settings.select in coreset.BY_SCORE:
        score_source(settings.select, settings.scores.source)
        place = replace(place, beta=place.beta or 0.0)
    if settings.select in coreset.BY_DIFFICULTY:
        difficulty = torch.zeros(len(context.data.train))
        if settings.scores.source not in COMPUTED:  # a wrong file is refused now
            difficulty = training_difficulty(context, settings.scores, Path())
        if settings.select in ("ccs", "d2"):
            part = settings.ccs if settings.select == "ccs" else settings.d2
            without_hardest(difficulty, context.data.train.labels, settings.ipc, part.cutoff)
        elif place.beta is None:
            beta_grid(min(counts), settings.ipc, place.step, place.beta_unit)
        else:
            window(difficulty, context.data.train.labels, settings.ipc, place.beta, place.beta_unit)
    indices = torch.cat([members[: settings.ipc] for members in context.data.members])
    return marked(real_subset(context.data, indices, settings.select), settings.ipc, settings.alpha)


def random_like(start: DistilledSet, context: Context) -> DistilledSet:
    """As many random training images of each class as `start` has, in the places of its classes, and normalized as it
    is."""
    data, labels = seen_as(start, context.data), start.hard_labels
    most = int(torch.bincount(labels).max())
    rows = coreset.random(data.train.labels, most, context.generator("random")).view(data.classes, most)
    indices = torch.empty(len(start), dtype=torch.int64)
    for label, row in enumerate(rows):
        places = (labels == label).nonzero().squeeze(1)
        indices[places] = row[: len(places)]
    return real_subset(data, indices, "random")


def _by_difficulty(settings: Start, context: Context, evaluation: Evaluation, kept: Kept) -> Chosen:
    tried: dict[float, Accuracy] = {}
    if settings.select != "window":
        source = score_source(settings.select, settings.scores.source)
        scores, place = replace(settings.scores, source=source), settings.window
        settings = replace(settings, scores=scores, window=replace(place, beta=place.beta or 0.0))
    difficulty = training_difficulty(context, settings.scores, kept.scores)
    beta = settings.window.beta
    if beta is None:
        beta, tried = search_window(context, difficulty, settings, evaluation, kept.window)
    return Chosen(window_set(context, difficulty, settings, beta), beta, tried)


def _strata(settings: Start, context: Context, scores: Tensor) -> Tensor:
    labels, how, order = context.data.train.labels, settings.ccs, context.generator("ccs")
    return ccs(scores, labels, settings.ipc, how.cutoff, how.strata, order)


def _by_network(settings: Start, context: Context, kept: Kept) -> tuple[Tensor, Tensor | None]:
    """Indices and, for choices by gradients, weights, as a network sees the images that is trained on all of them."""
    model = trained_networks(context, settings.features, kept.features)[0]
    features, labels, ipc = split_features(model, context), context.data.train.labels, settings.ipc
    if settings.select in ("craig", "gradmatch"):
        logits = predict(model, context.real_images(), len(labels), context.device)
        gradients = LastLayer.of(logits, features, labels)
        if settings.select == "craig":
            return craig(gradients, ipc)
        how = settings.gradmatch
        return gradmatch(gradients, ipc, how.ridge, how.rows, context.generator("fill") if how.fill else None)
    if settings.select == "d2":
        scores = training_difficulty(context, settings.scores, kept.scores)
        return d2(scores, features, labels, ipc, settings.d2), None
    choice = {"herding": coreset.herding, "k-center": coreset.k_center, "moderate": moderate}[settings.select]
    return choice(features, labels, ipc), None


def score_source(select: str, source: str) -> str:
    """Where the scores for a choice of the hardest images, such as forgetting, come from, given `scores.source`.

    Raises ValueError when that is a file of other scores, and for c-score, which only files have, when it is none."""
    kind, _, _ = source.rpartition(":")
    if source in COMPUTED:
        if select == "c-score":
            raise ValueError(f"C-scores come from a file: start.scores.source must be its path, got {source!r}")
        return select
    if (kind or "cscore") != coreset.BY_SCORE[select]:
        held = f"{kind} scores" if kind else "C-scores"
        raise ValueError(f"start.select {select} does not go with start.scores.source {source!r}, a file of {held}")
    return source


def _correct(context: Context, ipc: int, experts: ExpertStore | None) -> Tensor:
    """Indices of ipc random training images of each class that expert 0 classifies correctly, as far as a class has
    them (DATM, arXiv 2310.05773)."""
    if experts is None:
        raise ValueError("start.select correct needs expert trajectories, whose first expert classifies the images")
    data, order = context.data, context.generator("correct")
    logits = expert_logits(experts, context, data.normalize(data.train.images))
    right, picked = logits.argmax(1).cpu() == data.train.labels, []
    for members in data.members:
        members = members[torch.randperm(len(members), generator=order)]
        picked.append(members[(~right[members]).sort(stable=True).indices[:ipc]])
    return torch.cat(picked)
