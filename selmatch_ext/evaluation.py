"""How good a small training set is: networks trained on it from scratch, tested on the real test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selmatch_ext import ranks
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, seen_as
from selmatch_ext.files import check_writable, read_json, write_json
from selmatch_ext.learned_steps import check_schedule, follow_schedule
from selmatch_ext.provenance import check_same, known_name, to_dict
from selmatch_ext.settings import Evaluation
from selmatch_ext.stages import stage
from selmatch_ext.strict_json import numbers, shown
from selmatch_ext.training import combined_augmenter, predict, train


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies in % of independently initialized networks."""

    values: list[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over the networks (0 for one network)."""
        return torch.tensor(self.values, dtype=torch.float64).std().item() if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f} %" if len(self.values) > 1 else f"{self.mean:.1f} %"


def evaluate(
    subset: DistilledSet,
    context: Context,
    settings: Evaluation,
    record: str | Path | None = None,
    label: str = "evaluation",
    splits: tuple[str, ...] = ("test",),
    groups: Mapping[str, Tensor] | None = None,
) -> dict[str, Accuracy]:
    """Trains `settings.networks` networks on `subset`; their accuracy on each of the data's `splits` (train, test), and
    on each of `groups`, (m,) bool masks of test images. A set with a schedule (DD) is trained on as that says, by one
    network for each of its starts at most: more would be the same again.

    Network k depends on `seed` and k alone, so that different sets are compared on the same initializations and
    orders. The data are normalized the way the set is. record: a JSON file that keeps finished networks; a killed
    evaluation goes on after them. Raises ValueError when it belongs to another set or other settings, or the set is of
    another kind of images or of other classes than the data."""
    context = replace(context, data=seen_as(subset, context.data))
    if subset.schedule is not None:
        check_schedule(subset.schedule, context.data, (settings.model,))
    groups = groups or {}
    names, networks = [*splits, *groups], settings.networks
    asked = {*splits, "test"} if groups else set(splits)
    header = _header(subset, context, settings, splits, groups)
    if subset.schedule is not None and subset.schedule.starts is not None:
        networks = min(networks, len(subset.schedule.starts))
    finished = [] if record is None else _recorded(Path(record), header, networks, len(names))
    kind, each = training_work(subset, settings)
    work = {"initial": len(finished), "unit": "network", "kind": kind, "each": each}
    with ranks.progress(total=networks, desc=label, **work) as progress:
        while len(finished) < networks:  # of several processes each takes every world-th network
            k, left = len(finished) + ranks.rank(), networks - len(finished)
            seen = torch.zeros(len(names), dtype=torch.float64)
            if k < networks:
                less = f"an evaluation.training.batch below {settings.training.batch}"
                with stage(label, less, network=settings.model, images=len(subset), device=context.device):
                    model = trained_on(subset, context, settings, k)
                    right = {split: correct(model, context, split) for split in asked}
                shown = [right[split] for split in splits] + [right["test"][mask] for mask in groups.values()]
                seen = torch.stack([100.0 * r.double().mean() for r in shown])
            finished += [row.tolist() for row in ranks.gather(seen)][:left]
            progress.update(min(left, ranks.world()))
            if record is not None and ranks.first():
                write_json(record, {**header, "accuracies": finished})
    return {name: Accuracy(list(values)) for name, values in zip(names, zip(*finished, strict=True), strict=True)}


def _header(
    subset: DistilledSet,
    context: Context,
    settings: Evaluation,
    splits: tuple[str, ...],
    groups: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What a record says of the evaluation: everything that its accuracies depend on."""
    seen = {*splits, *(["test"] if groups else []), *(["train"] if subset.schedule is not None else [])}
    header = {
        "settings": to_dict(settings),
        "seed": context.seed,
        "splits": list(splits),
        "data": context.data.name,
        "images": {split: getattr(context.data, split).digest() for split in sorted(seen)},
        "set": subset.digest(),
    }
    if groups:
        header["groups"] = {name: mask.nonzero().squeeze(1).tolist() for name, mask in groups.items()}
    return header


def training_work(subset: DistilledSet, settings: Evaluation) -> tuple[str, float]:
    """The kind of work that training a network on `subset` is, and how much of it this process does: passes of an image
    through the network, or of a set with a schedule its steps."""
    if subset.schedule is not None:
        return f"{subset.schedule.model} by its schedule", len(subset.schedule.rates) / ranks.world()
    return settings.model, settings.training.epochs * len(subset) / ranks.world()


def trained_on(subset: DistilledSet, context: Context, settings: Evaluation, k: int = 0) -> torch.nn.Module:
    """Network number k, trained on `subset`; it depends on the seed and k alone. If the set has a schedule, the
    schedule defines the training and `settings` is ignored. Weights of images count in both cases."""
    if subset.schedule is not None:
        return follow_schedule(subset, context, k, trusted=(settings.model,))
    model = context.network(settings.model, "evaluation", k)
    images = subset.images.to(context.device)
    targets = (subset.targets() if settings.loss == "cross-entropy" else subset.regression()).to(context.device)
    strategies, per_image = (settings.distilled_strategy, settings.selected_strategy), settings.draw_per == "image"
    augmenter = combined_augmenter(subset.distilled, *strategies, context.data.image_size, per_image)
    train(model, images.__getitem__, targets, settings.training, augmenter, context.generator("evaluation", k))
    return model


def correct(model: torch.nn.Module, context: Context, split: str) -> Tensor:
    """(m,) bool on the CPU: which of the split's images are classified correctly."""
    labels = getattr(context.data, split).labels
    return predict(model, context.real_images(split), len(labels), context.device).argmax(1) == labels


def _recorded(path: Path, header: dict, networks: int, columns: int) -> list[list[float]]:
    """The accuracies of the networks that are finished, `columns` in % for each; at most `networks` of them. The record
    keeps the name that it knows the data set by: it is put into `header`."""
    if not path.exists():
        check_writable(path)
        return []
    old = read_json(path, "accuracies")
    header["data"] = known_name(check_same(path, old, header), header["data"], path.parent)
    rows = old["accuracies"]
    if not isinstance(rows, list) or len(rows) > networks:
        raise ValueError(
            f"{path}: accuracies is {shown(rows)}; it must be a list of at most {networks} networks; delete it"
        )
    rows = [numbers(row, f"{path}: accuracies[{k}]", columns) for k, row in enumerate(rows)]
    if any(not 0 <= value <= 100 for row in rows for value in row):
        raise ValueError(f"{path}: accuracies holds a value that is no percentage; delete it")
    return rows
