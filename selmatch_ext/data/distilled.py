"""The distilled set: a small training set, partly or wholly learned, and its file."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from selmatch_ext import strict_json
from selmatch_ext.data.images import ImageData, check_labels, denormalize
from selmatch_ext.data.schedule import REQUIRED, Schedule, schedule_of
from selmatch_ext.data.soft_labels import Regression, centered
from selmatch_ext.data.whitening import Whitening
from selmatch_ext.files import atomic_write, json_field, load_tensors, save_tensors
from selmatch_ext.settings import DRAWN, SELECTIONS

KIND = "distilled"
PROBABILITY = 1e-3  # by which the sum of an image's probabilities may differ from 1: they may have been bfloat16
DESCRIBED = "mean", "std", "class_names", "method", "settings", "schedule_model"  # the metadata, as JSON
WHITENING = "zca_mean", "zca_transform"


@dataclass
class DistilledSet:
    """A small training set.

    images: (n, C, H, W) float32, normalized with `mean` and `std`. labels: (n,) int64, or (n, K) float probabilities
    that sum to 1; with a schedule, any finite numbers. distilled: (n,) bool, True where the image was learned, False
    where it is a real one. lr: the learned step size η, above 0, if one was learned.
    mean, std: (C,) float32. class_names: K names. method: how it was made. settings: every setting, JSON-able.
    indices: (n,) int64, the training image that each started from, -1 where there is none (default: all).
    whitening: the ZCA that was applied after mean and std. schedule: the training that the set is made for, if any.
    weights: (n,) float32, 0 or above and not all 0: training minimizes the mean of weight times loss over the images of
    a batch; None = all 1.
    scores: (n, K) float32, what outputs of networks are regressed on where they are trained by the squared error
    (evaluation.loss mse; KIP, FRePo); for all else `labels` stand for them. None = the labels minus 1/K.

    Raises TypeError or ValueError naming the field that is wrong.
    """

    images: Tensor
    labels: Tensor
    distilled: Tensor
    lr: float | None
    mean: Tensor
    std: Tensor
    class_names: list[str]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    indices: Tensor = None  # type: ignore[assignment]  # __post_init__ makes it where it is not given
    whitening: Whitening | None = None
    schedule: Schedule | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.indices is None:
            self.indices = torch.full((n,), -1)
        if self.images.dtype != torch.float32:
            raise TypeError(f"images is {self.images.dtype}; it must be torch.float32, normalized")
        if self.images.ndim != 4 or 0 in self.images.shape:
            raise ValueError(f"images has shape {tuple(self.images.shape)}; it must be (n, C, H, W), none of them 0")
        if not self.images.isfinite().all():
            bad = (~self.images.isfinite()).flatten(1).any(1).nonzero().squeeze(1)
            raise ValueError(f"{len(bad)} of {n} images hold NaN or infinite values, the first is number {int(bad[0])}")
        self._check_labels()
        for name, dtype in (("distilled", torch.bool), ("indices", torch.int64)):
            value = getattr(self, name)
            if value.dtype != dtype or tuple(value.shape) != (n,):
                raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}; it must be {dtype} ({n},)")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if tuple(value.shape) != (self.images.shape[1],) or not value.isfinite().all():
                raise ValueError(f"{name} is {value.tolist()}; it must hold a finite number for each channel")
        if not (self.std > 0).all():
            raise ValueError(f"std is {self.std.tolist()}; it must be above 0")
        if int(self.indices.min()) < -1:
            raise ValueError(
                f"indices holds {int(self.indices.min())}; allowed are training images from 0, or -1 for none"
            )
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr}; it must be a finite number above 0")
        pixels = self.images[0].numel()
        if self.whitening is not None and len(self.whitening.mean) != pixels:
            raise ValueError(f"whitening is of {len(self.whitening.mean)} values; an image has {pixels}")
        if self.schedule is not None:
            self.schedule.check(n)
        if self.weights is not None:
            _check_weights(self.weights, n)
        if self.scores is not None:
            _check_scores(self.scores, n, len(self.class_names))

    def _check_labels(self) -> None:
        labels, n, classes = self.labels, len(self.images), len(self.class_names)
        if labels.is_floating_point():
            if tuple(labels.shape) != (n, classes):
                raise ValueError(f"soft labels have shape {tuple(labels.shape)}; they must be ({n}, {classes})")
            if not labels.isfinite().all():
                raise ValueError("soft labels hold NaN or infinite values")
            if self.schedule is not None:
                return
            wrong = (labels < -PROBABILITY).any(1) | ((labels.double().sum(1) - 1).abs() > PROBABILITY)
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"soft labels are not probabilities: those of image {row} sum to {labels[row].sum():.6g}, "
                    f"the smallest is {labels[row].min():.6g}"
                )
            return
        check_labels(labels, "labels", classes)
        if len(labels) != n:
            raise ValueError(f"labels has {len(labels)} entries for {n} images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def hard_labels(self) -> Tensor:
        """(n,) int64: the labels, or for soft ones the most probable class."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    def targets(self) -> Tensor:
        """What networks are trained on the set with, by the mean cross-entropy: the labels, or, where images have
        weights, `weighted(labels, weights)`."""
        return self.labels if self.weights is None else weighted(self.labels, self.weights, len(self.class_names))

    def regression(self) -> Regression:
        """What networks are trained on the set with, by the squared error."""
        scores = centered(self.labels, len(self.class_names)) if self.scores is None else self.scores
        return Regression(scores, self.weights)

    def digest(self) -> str:
        """What identifies the set: a hash of its images, labels, mask, normalization, schedule, weights and scores."""
        tensors = [self.images, self.labels, self.distilled, self.mean, self.std]
        tensors += [t for name, t in sorted(self._optional().items()) if name != "lr"]
        digest = hashlib.sha256()
        for t in tensors:
            digest.update(t.contiguous().numpy().data)
        return digest.hexdigest()

    def denormalized(self) -> Tensor:
        """Images as float in [0, 1], clamped: for looking at."""
        return denormalize(self.images, self.mean, self.std, self.whitening)

    def _optional(self) -> dict[str, Tensor]:
        """The tensors that not every set has, by their names in the file."""
        found = {}
        if self.lr is not None:
            found["lr"] = torch.tensor(self.lr, dtype=torch.float64)
        if self.whitening is not None:
            found |= {"zca_mean": self.whitening.mean.cpu(), "zca_transform": self.whitening.transform.cpu()}
        if self.schedule is not None:
            found |= self.schedule.tensors()
        if self.weights is not None:
            found["weights"] = self.weights
        if self.scores is not None:
            found["scores"] = self.scores
        return found

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, what describes them, JSON-able) by their names in a file; `of_parts` makes the set of them."""
        tensors = {name: getattr(self, name) for name in ("images", "labels", "distilled", "indices")}
        return tensors | self._optional(), {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "class_names": self.class_names,
            "method": self.method,
            "settings": self.settings,
            "schedule_model": None if self.schedule is None else self.schedule.model,
        }

    @classmethod
    def of_parts(cls, tensors: dict[str, Tensor], described: dict[str, Any], source: str) -> DistilledSet:
        """The set of the `parts` that the file `source` holds. Raises TypeError or ValueError naming what is wrong."""
        return cls(**_fields(tensors, described, source))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the set to one safetensors file, atomically."""
        tensors, described = self.parts()
        save_tensors(path, KIND, tensors, {name: json.dumps(value) for name, value in described.items()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> DistilledSet:
        """Reads what `save` wrote. Raises FileNotFoundError, and ValueError naming the file when it is damaged, of
        another kind, or holds what does not fit together."""
        inside = os.path.join(path, "distilled.safetensors")
        if os.path.isfile(inside):
            raise FileNotFoundError(f"{path} is a folder; the set in it is {inside}")
        tensors, metadata = load_tensors(path, KIND, "images", "labels", "distilled", "indices")
        described = {name: json_field(metadata, name, path) for name in DESCRIBED}
        try:
            return cls.of_parts(tensors, described, str(path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def export(self, folder: str | os.PathLike) -> None:
        """Writes one PNG per image to folder/CLASS/NUMBER_distilled.png or NUMBER_selected.png, all or nothing.

        torchvision's ImageFolder reads it with the same labels: class folders get a number in front where the names'
        alphabetical order is another one. Soft labels become the most probable class, values are rounded to 8 bits. A
        class without images has an empty folder, and the others keep their numbers: ImageFolder(…, allow_empty=True).
        Where the images have weights, folder/weights.csv says the weight of each file, one a line; ImageFolder does not
        read it.
        Raises FileExistsError when `folder` exists and is not empty, ValueError for images of neither 1 nor 3 channels.
        """
        folder = Path(folder)
        check_new_folder(folder)
        if self.images.shape[1] not in (1, 3):
            raise ValueError(f"images have {self.images.shape[1]} channels; PNGs are made of 1 or 3")
        pixels = (self.denormalized() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        names, files = folder_names(self.class_names), list[str]()
        with atomic_write(folder) as temporary:
            for name in names:
                (temporary / name).mkdir(parents=True)
            for i, label in enumerate(self.hard_labels.tolist()):
                kind = "distilled" if self.distilled[i] else "selected"
                image = pixels[i, :, :, 0] if pixels.shape[3] == 1 else pixels[i]
                files.append(f"{names[label]}/{i:05d}_{kind}.png")
                Image.fromarray(image).save(temporary / files[-1])
            if self.weights is not None:
                with open(temporary / "weights.csv", "w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([("file", "weight"), *zip(files, self.weights.tolist(), strict=True)])


def _fields(tensors: dict[str, Tensor], described: dict[str, Any], source: str) -> dict[str, Any]:
    """Arguments of `DistilledSet` from the tensors and the JSON values of its file `source`. Raises ValueError naming
    the field that is wrong."""
    fields: dict[str, Any] = {name: tensors[name] for name in ("images", "labels", "distilled", "indices")}
    for name in ("mean", "std"):
        fields[name] = torch.tensor(strict_json.numbers(described[name], name), dtype=torch.float32)
    fields["class_names"] = strict_json.strings(described["class_names"], "class_names")
    fields["method"] = strict_json.string(described["method"], "method")
    fields["settings"] = strict_json.mapping(described["settings"], "settings")
    fields["weights"], fields["scores"] = tensors.get("weights"), tensors.get("scores")
    fields["lr"] = None
    if "lr" in tensors:
        lr = tensors["lr"]
        if lr.ndim != 0 or not lr.is_floating_point():
            raise ValueError(f"lr is {lr.dtype} of shape {tuple(lr.shape)}; it must be one floating-point number")
        fields["lr"] = lr.item()
    for names in (WHITENING, REQUIRED):
        if sum(name in tensors for name in names) == 1:
            raise ValueError(f"of {' and '.join(names)} one is missing")
    if WHITENING[0] in tensors:
        fields["whitening"] = Whitening(*(tensors[name] for name in WHITENING))
    if REQUIRED[0] in tensors:
        fields["schedule"] = schedule_of(tensors, described["schedule_model"], source)
    return fields


def check_new_folder(folder: Path) -> None:
    """FileExistsError unless there is no `folder`, or an empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; export makes a new one")


def _check_weights(weights: Tensor, count: int) -> None:
    """ValueError unless `weights` are those of `count` images."""
    if weights.dtype != torch.float32 or tuple(weights.shape) != (count,):
        raise ValueError(f"weights is {weights.dtype} {tuple(weights.shape)}; it must be torch.float32 ({count},)")
    if not weights.isfinite().all() or (weights < 0).any():
        row = int((~(weights >= 0) | weights.isinf()).nonzero()[0])
        raise ValueError(f"weights holds {weights[row].item()}, that of image {row}; allowed are finite numbers from 0")
    if not weights.any():
        raise ValueError("weights are all 0; at least one must be above 0")


def _check_scores(scores: Tensor, count: int, classes: int) -> None:
    """ValueError unless `scores` are those of `count` images."""
    if scores.dtype != torch.float32 or tuple(scores.shape) != (count, classes):
        raise ValueError(
            f"scores is {scores.dtype} {tuple(scores.shape)}; it must be torch.float32 ({count}, {classes})"
        )
    if not scores.isfinite().all():
        raise ValueError("scores hold NaN or infinite values")


def normalized_labels(labels: Tensor) -> Tensor:
    """(n, K) probabilities: `labels` (n, K) clamped to [0, 1] and divided by the sum of the row (LD, arXiv 2006.08572);
    1/K in a row of which nothing is left."""
    clamped = labels.clamp(0, 1)
    total = clamped.sum(1, keepdim=True)
    return torch.where(total > 0, clamped / total, 1 / labels.shape[1])


def weighted(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """(n, K) targets with which the mean cross-entropy of a batch is the mean of weight times loss: the labels as
    probabilities, each row times the image's weight.

    labels: (n,) int64, or (n, K) float. weights: (n,) float, on the same device. Differentiable in float labels."""
    if not labels.is_floating_point():
        labels = torch.nn.functional.one_hot(labels, classes).to(weights.dtype)
    return labels * weights.to(labels.dtype).unsqueeze(1)


def folder_names(class_names: list[str]) -> list[str]:
    """Class names as folder names that differ, sort in the order of the classes and have at most 100 bytes, but for a
    number in front."""
    names = [re.sub(r"[^\w .+-]", "_", name).encode()[:100].decode(errors="ignore").strip(" .") for name in class_names]
    if "" in names or any(a >= b for a, b in zip(names, names[1:], strict=False)):
        width = len(str(len(names) - 1))
        names = [f"{i:0{width}d}_{name}" for i, name in enumerate(names)]
    return names


def real_subset(data: ImageData, indices: Tensor, method: str, weights: Tensor | None = None) -> DistilledSet:
    """The training images at `indices` (n,) as a set with nothing distilled in it."""
    return DistilledSet(
        images=data.normalize(data.train.images[indices]),
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
        weights=weights,
    )


def without_schedule(subset: DistilledSet) -> DistilledSet:
    """The set for networks other than that of its schedule, with probabilities as its labels."""
    if subset.schedule is None:
        return subset
    soft = subset.labels.is_floating_point()
    return replace(subset, labels=normalized_labels(subset.labels) if soft else subset.labels, schedule=None)


def as_selected(subset: DistilledSet) -> DistilledSet:
    """The same set with none of its images marked as learned."""
    return replace(subset, distilled=torch.zeros_like(subset.distilled))


def to_train_on(subset: DistilledSet) -> DistilledSet:
    """The set with the marks that networks are trained by: of one that was only chosen, none of the images is marked as
    distilled, even if its file marks those to be learned later."""
    return as_selected(subset) if subset.method in (*SELECTIONS, *DRAWN) else subset


def training_set(path: str | Path) -> DistilledSet:
    """The set in a file, to train networks on (`to_train_on`)."""
    return to_train_on(DistilledSet.load(path))


def seen_as(subset: DistilledSet, data: ImageData) -> ImageData:
    """`data` with the normalization of `subset`. ValueError when image shapes or class names differ."""
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
