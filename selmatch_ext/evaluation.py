"""How good a small training set is: networks trained on it from scratch, tested on the real test images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selmatch_ext import ranks
from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.origin import changes, known_name
from selmatch_ext.experts import network, real_images
from selmatch_ext.files import check_writable, read_json, write_json
from selmatch_ext.models import flat, from_file
from selmatch_ext.models.initial import xavier
from selmatch_ext.models.statistics import freeze_statistics
from selmatch_ext.precision import precision_scope
from selmatch_ext.seeds import generator
from selmatch_ext.selection import coreset
from selmatch_ext.settings import Evaluation, to_dict
from selmatch_ext.stages import stage
from selmatch_ext.strict_json import numbers, shown
from selmatch_ext.training import combined_augmenter, predict, train
from selmatch_ext.unroll.sgd import unrolled_sgd


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies in % of independently initialised networks."""

    values: list[float]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        """Sample standard deviation over the networks (0 for one network)."""
        return torch.tensor(self.values, dtype=torch.float64).std().item() if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f} %"


def evaluate(
    subset: DistilledSet,
    data: ImageData,
    settings: Evaluation,
    seed: int,
    device: torch.device,
    record: str | Path | None = None,
    label: str = "evaluation",
    splits: tuple[str, ...] = ("test",),
    groups: Mapping[str, Tensor] | None = None,
) -> dict[str, Accuracy]:
    """Trains `settings.networks` networks on `subset`; their accuracy on each of `data`'s `splits` (train, test), and
    on each of `groups`, (m,) bool masks of test images. A set with a schedule (DD) is trained on as that says, by one
    network for each of its starts at most: more would be the same again.

    Network k depends on `seed` and k alone, so that different sets are compared on the same initialisations and
    orders. `data` is normalised the way the set is. record: a JSON file that keeps finished networks; a killed
    evaluation goes on after them. Raises ValueError when it belongs to another set or other settings, or the set is of
    another kind of images or of other classes than `data`."""
    data = seen_as(subset, data)
    if subset.schedule is not None:
        _check_schedule(subset.schedule, data, (settings.model,))
    groups = groups or {}
    names, networks = [*splits, *groups], settings.networks
    asked = {*splits, "test"} if groups else set(splits)
    header = _header(subset, data, settings, seed, splits, groups)
    if subset.schedule is not None and subset.schedule.starts is not None:
        networks = min(networks, len(subset.schedule.starts))
    finished = [] if record is None else _recorded(Path(record), header, networks, len(names))
    with ranks.progress(total=networks, initial=len(finished), desc=label, unit="network") as progress:
        while len(finished) < networks:  # of several processes each takes every world-th network
            k, left = len(finished) + ranks.rank(), networks - len(finished)
            seen = torch.zeros(len(names), dtype=torch.float64)
            if k < networks:
                less = f"an evaluation.training.batch below {settings.training.batch}"
                with stage(label, less, network=settings.model, images=len(subset), device=device):
                    model = trained_on(subset, data, settings, seed, device, k)
                    right = {split: correct(model, data, split, device) for split in asked}
                shown = [right[split] for split in splits] + [right["test"][mask] for mask in groups.values()]
                seen = torch.stack([100.0 * r.double().mean() for r in shown])
            finished += [row.tolist() for row in ranks.gather(seen)][:left]
            progress.update(min(left, ranks.world()))
            if record is not None and ranks.first():
                write_json(record, {**header, "accuracies": finished})
    return {name: Accuracy(list(values)) for name, values in zip(names, zip(*finished, strict=True), strict=True)}


def _header(
    subset: DistilledSet,
    data: ImageData,
    settings: Evaluation,
    seed: int,
    splits: tuple[str, ...],
    groups: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What a record says of the evaluation: everything that its accuracies depend on."""
    seen = {*splits, *(["test"] if groups else []), *(["train"] if subset.schedule is not None else [])}
    header = {
        "settings": to_dict(settings),
        "seed": seed,
        "splits": list(splits),
        "data": data.name,
        "images": {split: getattr(data, split).digest() for split in sorted(seen)},
        "set": subset.digest(),
    }
    if groups:
        header["groups"] = {name: mask.nonzero().squeeze(1).tolist() for name, mask in groups.items()}
    return header


def trained_on(
    subset: DistilledSet, data: ImageData, settings: Evaluation, seed: int, device: torch.device, k: int = 0
) -> torch.nn.Module:
    """Network number k, trained on `subset`; it depends on `seed` and k alone. A set with a schedule is trained on as
    that says; then `settings` say nothing about it."""
    if subset.schedule is not None:
        return follow_schedule(subset, data, seed, device, k, trusted=(settings.model,))
    model = network(data, settings.model, seed, device, "evaluation", k)
    images, labels = subset.images.to(device), subset.labels.to(device)
    augmenter = combined_augmenter(
        subset.distilled, settings.distilled_strategy, settings.selected_strategy, data.image_size
    )
    train(model, images.__getitem__, labels, settings.training, augmenter, generator(seed, "evaluation", k))
    return model


@torch.no_grad()
def follow_schedule(
    subset: DistilledSet,
    data: ImageData,
    seed: int,
    device: torch.device,
    k: int = 0,
    trusted: Collection[str] = (),
) -> torch.nn.Module:
    """Network number k of a set that comes with its training (DD, arXiv 1811.10959, section 4), trained that way, in
    evaluation mode. BatchNorm takes its statistics from 16 real training images per class.

    trusted: functions package.module:function that a set's file may name as its network. Raises ValueError for another
    one, and for a network that does not fit the starts of the schedule."""
    schedule = subset.schedule
    _check_schedule(schedule, data, trusted)
    model = network(data, schedule.model, seed, device, "evaluation", k)
    if schedule.starts is None:
        start = xavier(model, generator(seed, "evaluation", "xavier", k))
    else:
        start = schedule.starts[k % len(schedule.starts)]
    images, labels, rates = (t.to(device) for t in (subset.images, subset.labels, schedule.rates))
    flat.load(model, unrolled_sgd(model, start.to(device), images, labels, list(schedule.batches), rates))
    seen = [(data.train.labels == c).nonzero().squeeze(1)[:16] for c in range(data.classes)]
    with precision_scope("float32", device):
        freeze_statistics(model, data.normalise(data.train.images[torch.cat(seen)], device))
    return model.eval()


def _check_schedule(schedule: Schedule, data: ImageData, trusted: Collection[str]) -> None:
    where, option = f"{schedule.source}: schedule_model", "--evaluation.model"
    held = None if schedule.starts is None else schedule.starts.shape[1]
    if schedule.source is not None:
        from_file.checked_name(schedule.model, where, option, trusted)
        like = data.channels, data.classes, data.image_size
        from_file.check_size(schedule.model, like, where, option, held, trusted)


def seen_as(subset: DistilledSet, data: ImageData) -> ImageData:
    """`data` with the normalisation of `subset`. ValueError when image shapes or class names differ."""
    if subset.images.shape[1:] != data.train.images.shape[1:]:
        raise ValueError(
            f"the set has images of shape {tuple(subset.images.shape[1:])}, {data.name} of "
            f"{tuple(data.train.images.shape[1:])}"
        )
    if subset.class_names != data.class_names:
        raise ValueError(
            f"the set has the classes {_some(subset.class_names)}, {data.name} has {_some(data.class_names)}"
        )
    return replace(data, mean=subset.mean, std=subset.std, whitening=subset.whitening)


def _some(names: list[str]) -> str:
    return str(names) if len(names) <= 100 else f"{names[:5]} and {len(names) - 5} more"


def correct(model: torch.nn.Module, data: ImageData, split: str, device: torch.device) -> Tensor:
    """(m,) bool on the CPU: which of the split's images are classified correctly."""
    labels = getattr(data, split).labels
    return predict(model, real_images(data, device, split), len(labels), device).argmax(1) == labels


def training_set(path: str | Path) -> DistilledSet:
    """The set in a file, to be trained on. In one that was only selected nothing is learned yet, so none of its images
    counts as distilled, whatever is to become of them."""
    subset = DistilledSet.load(path)
    if subset.method in ("window", *coreset.METHODS):
        return replace(subset, distilled=torch.zeros_like(subset.distilled))
    return subset


def real_subset(data: ImageData, indices: Tensor, method: str) -> DistilledSet:
    """The training images at `indices` (n,) as a set with nothing distilled in it."""
    return DistilledSet(
        images=data.normalise(data.train.images[indices]),
        labels=data.train.labels[indices],
        distilled=torch.zeros(len(indices), dtype=torch.bool),
        lr=None,
        mean=data.mean,
        std=data.std,
        class_names=data.class_names,
        method=method,
        settings={},
        indices=indices,
        whitening=data.whitening,
    )


def _recorded(path: Path, header: dict, networks: int, columns: int) -> list[list[float]]:
    """The accuracies of the networks that are finished, `columns` in % for each; at most `networks` of them. The record
    keeps the name that it knows the data set by: it is put into `header`."""
    if not path.exists():
        check_writable(path)
        return []
    old = read_json(path, "accuracies")
    changed = changes(old, header)
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed)}); choose another --out or delete it"
        )
    header["data"] = known_name(old, header["data"], path.parent)
    rows = old["accuracies"]
    if not isinstance(rows, list) or len(rows) > networks:
        raise ValueError(
            f"{path}: accuracies is {shown(rows)}; it must be a list of at most {networks} networks; delete it"
        )
    rows = [numbers(row, f"{path}: accuracies[{k}]", columns) for k, row in enumerate(rows)]
    if any(not 0 <= value <= 100 for row in rows for value in row):
        raise ValueError(f"{path}: accuracies holds a value that is no percentage; delete it")
    return rows
