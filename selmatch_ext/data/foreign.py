"""A set of public code becomes one of ours: how its images are normalized is what its files do not say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet, folder_names
from selmatch_ext.data.exchange import Given
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.names import shortened
from selmatch_ext.data.whitening import Whitening, fit_whitening
from selmatch_ext.ranges import Checked, Number, Positive, Share

NEAR = 1e-3  # by which pixels may leave 0 to 1: a file may have been made in lower precision


@dataclass(frozen=True)
class Reading(Checked):
    """What the files of public code do not say."""

    normalization: Literal["pixels", "dataset", "zca"] | None = None
    """How the images in the file are normalized. pixels: not at all, they are from 0 to 1. dataset: by the mean and the
    standard deviation of the data set, and by its ZCA with --data.zca, as this package does it. zca: not normalized and
    then whitened by ZCA, as MTT's code does it."""
    mean: tuple[Share, ...] = ()
    """In place of normalization: the mean that was subtracted, a number for each channel."""
    std: tuple[Positive, ...] = ()
    """With mean: the standard deviation by which the images were divided then."""
    soft_labels: Literal["probabilities", "logits"] | None = None
    """What soft labels are; DATM's are logits."""
    lr: Positive | None = None
    """The learned learning rate, which MTT logs and does not write to a file."""
    labels: Path | None = None
    """The file of the labels, where it is not called labels_X.pt beside images_X.pt."""
    number: Number | None = None
    """Which set, counted from 0, where a file of DC, DSA or DM holds several."""


def as_set(given: Given, data: ImageData, reading: Reading, path: Path, settings: dict[str, Any]) -> DistilledSet:
    """A set of ours from what the file `path` holds, made from the data set `data`. settings: what it is saved with.

    Raises ValueError that names the file and what is wrong, or what has to be said because it is not guessed."""
    try:
        images, mean, std, whitening = _normalized(given.images, data, reading)
        return DistilledSet(
            images=images,
            labels=_labels(given, data, reading),
            distilled=torch.ones(len(images), dtype=torch.bool) if given.distilled is None else given.distilled,
            lr=given.lr if reading.lr is None else reading.lr,
            mean=mean,
            std=std,
            class_names=data.class_names,
            method="imported",
            settings=settings,
            whitening=whitening,
            weights=given.weights,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _normalized(images: Tensor, data: ImageData, r: Reading) -> tuple[Tensor, Tensor, Tensor, Whitening | None]:
    """(images as the set has them, its mean, its std, its whitening)."""
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images is {images.dtype}; it must be torch.float32, or torch.uint8 pixels")
    shape = (data.channels, *data.image_size)
    if images.ndim == 4 and images.shape[1] == 1 and data.channels == 3 and images.dtype == torch.uint8:
        images = images.expand(-1, 3, -1, -1)  # gray pictures in a folder
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; those of {data.name} are (n, {', '.join(map(str, shape))})"
        )
    if r.mean or r.std:
        if r.normalization is not None or images.dtype == torch.uint8 or not len(r.mean) == len(r.std) == data.channels:
            raise ValueError(
                f"mean and std must have {data.channels} numbers each, the channels of {data.name}, and go with float "
                "images and without normalization"
            )
        return images, torch.tensor(r.mean), torch.tensor(r.std), None
    if images.dtype == torch.uint8:
        if r.normalization not in (None, "pixels"):
            raise ValueError(f"normalization is {r.normalization}, but the file holds pixels of 8 bits")
        return data.normalize(images), data.mean, data.std, data.whitening
    if r.normalization == "pixels":
        low, high = images.min().item(), images.max().item()
        if low < -NEAR or high > 1 + NEAR:
            raise ValueError(f"normalization is pixels, which are from 0 to 1; images holds {low:.4g} to {high:.4g}")
        pixels = (images - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)
        return pixels if data.whitening is None else data.whitening(pixels), data.mean, data.std, data.whitening
    if r.normalization == "dataset":
        return images, data.mean, data.std, data.whitening
    if r.normalization == "zca":
        plain = replace(data, mean=torch.zeros(data.channels), std=torch.ones(data.channels), whitening=None)
        return images, plain.mean, plain.std, fit_whitening(plain.normalize(data.train.images))
    raise ValueError(
        f"the file does not say how its images are normalized (their mean is {images.mean():.4g}, their standard "
        f"deviation {images.std():.4g}); add --mean and --std with the numbers of the code that made them, or "
        "--normalization pixels, dataset or zca (selmatch import --help)"
    )


def _labels(given: Given, data: ImageData, reading: Reading) -> Tensor:
    labels = given.labels
    if given.folders is not None:
        return torch.tensor(_classes(given.folders, data.class_names, data.name))[labels]
    if not labels.is_floating_point():
        if reading.soft_labels is not None:
            raise ValueError("soft_labels is given, but the file holds numbers of classes")
        return labels
    if reading.soft_labels is None:
        raise ValueError(
            "the file holds soft labels and does not say what they are; add --soft-labels probabilities or logits"
        )
    return labels.double().softmax(1).float() if reading.soft_labels == "logits" and labels.ndim == 2 else labels


def _classes(folders: list[str], class_names: list[str], name: str) -> list[int]:
    """The class of each folder, which may be called as the class, as `DistilledSet.export` calls it, or by the class's
    number."""
    for names in (folder_names(class_names), class_names):
        if set(folders) <= set(names):
            return [names.index(folder) for folder in folders]
    if all(folder.isdecimal() and int(folder) < len(class_names) for folder in folders):
        return [int(folder) for folder in folders]
    raise ValueError(
        f"its folders are {shortened(folders)}, which are not the classes of {name}: {shortened(class_names)}"
    )
