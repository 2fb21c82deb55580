"""Loads image data sets: digits, torchvision's, Tiny ImageNet, any folder or archive of images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selmatch_ext.data.images import ImageData, ImageSplit
from selmatch_ext.data.names import positions
from selmatch_ext.seeds import generator
from selmatch_ext.settings import Data

TORCHVISION = ("MNIST", "FashionMNIST", "SVHN", "CIFAR10", "CIFAR100")
PATHS = ("imagefolder", "tinyimagenet", "huggingface")


def load(spec: str, root: str | os.PathLike | None = None, *, seed: int = 0, **options: Any) -> ImageData:
    """Loads a data set into memory.

    spec:
      - `digits`: scikit-learn's 8x8 digits, one channel; of each class every third image is a test image.
      - `MNIST`, `FashionMNIST`, `SVHN`, `CIFAR10`, `CIFAR100`: torchvision's, under `root` (default: the folder
        `data`); fetched there only when `download` is true.
      - `imagefolder:PATH`: PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE (or `val` when there is no `test`). PATH is
        a folder, or an archive (.zip, .tar, .tar.gz, …), which is read without unpacking it. Images are ordered by
        class name, then file name. They are RGB, or have one channel when every one of them is grayscale. Every still
        image that Pillow decodes by itself is read: its first frame, turned as EXIF says. Files of 16 bits a channel
        are scaled by the bits that the training images use. Links are followed, inside an archive, and each folder is
        visited once. The log says what was skipped, and how 16-bit files were scaled. Class names are the folders'
        names as `selmatch_ext.data.names.readable` writes them.
      - `tinyimagenet:PATH`: the same, and also Tiny ImageNet's own layout with val/val_annotations.txt; tests on `val`.
      - `huggingface:PATH`: a folder that `save_to_disk` of Hugging Face's datasets wrote, or .parquet or .arrow files
        of images. Names of files or folders say the split; for testing it is `test`, or else `validation`. Needs
        pyarrow.
    resize: makes every image of a folder or archive this many pixels wide and high (scaled to fill, center kept).
    cache: a folder that keeps the decoded images of folders and archives, one file per listing (names, sizes, times)
    and arguments.
    background: the color behind transparent pixels, a name (white, black, gray, …) or #rrggbb.
    test_share: where there is neither `test` nor `val`, this share of each class, drawn from `seed`, becomes the test
    split, and PATH/CLASS/IMAGE will do. None: such a folder is refused.

    options: other settings of `Data`, such as `classes`, `per_class` and `zca`. seed: of the random choices among
    images.

    Raises ValueError, FileNotFoundError or OSError naming the data set, class or file that is wrong.
    """
    return load_data(Data(spec, None if root is None else str(root), **options), seed)


def _load(settings: Data, seed: int) -> ImageData:
    spec, root = settings.dataset, settings.root
    kind, _, path = spec.partition(":")
    if kind in PATHS and path:
        from selmatch_ext.data.folders import FolderOptions, load_folder
        from selmatch_ext.data.tables import load_tables

        given = settings.resize, settings.background, settings.test_share, seed, settings.classes
        options = FolderOptions(kind == "tinyimagenet", *given)
        load_from = load_tables if kind == "huggingface" else load_folder
        return load_from(Path(path).expanduser(), options, settings.cache)
    if spec != "digits" and spec not in TORCHVISION:
        raise ValueError(
            f"data set is {spec!r}; allowed are digits, {', '.join(TORCHVISION)}, "
            + ", ".join(f"{kind}:PATH" for kind in PATHS)
            + _meant(spec)
        )
    _refuse_unused(settings)
    data = _digits() if spec == "digits" else _torchvision(spec, Path(root or "data"), settings.download)
    if settings.classes is None:
        return data
    return data.of_classes(torch.tensor(positions(settings.classes, data.class_names, spec)))


def _meant(spec: str) -> str:
    """What was probably meant by a data set that does not exist."""
    named = next((name for name in ("digits", *TORCHVISION) if name.lower() == spec.lower().replace("-", "")), None)
    if named is not None:
        return f"; write {named}"
    return f"; for the images in that path write imagefolder:{spec}" if os.path.exists(spec) else ""


def load_data(settings: Data, seed: int) -> ImageData:
    """The data set that the settings name, of the classes that they name, with held-out images to test on, reduced and
    whitened as they say."""
    data = _load(settings, seed)
    if settings.held_out is not None:
        part = data.held_out(settings.held_out, generator(seed, "held_out"))
        # Without the mean and std of all: they are those of the images that are left
        data = ImageData(part.name, part.train, part.test, part.class_names, full=part.full)
    if settings.per_class is not None:
        data = data.subset(settings.per_class, generator(seed, "subset"))
    return data.whitened() if settings.zca else data


def _refuse_unused(settings: Data) -> None:
    spec, resize = settings.dataset, settings.resize
    if resize is not None:
        raise ValueError(f"resize is {resize}, but {spec} has images of one size; resize is for {_for_paths()}")
    for name, given, unused in (
        ("test_share", settings.test_share, None),
        ("background", settings.background, "white"),
        ("cache", settings.cache, None),
    ):
        if given != unused:
            raise ValueError(f"{name} is {given!r}, but {spec} does not use it; it is for {_for_paths()}")


def _for_paths() -> str:
    return ", ".join(f"{kind}:" for kind in PATHS)


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * 255 / 16).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        in_test[(labels == label).nonzero().squeeze(1)[2::3]] = True
    train, test = (ImageSplit(images[mask], labels[mask]) for mask in (~in_test, in_test))
    return ImageData("digits", train, test, [str(i) for i in range(10)])


def _torchvision(name: str, root: Path, download: bool) -> ImageData:
    from torchvision import datasets

    arguments = [{"split": "train"}, {"split": "test"}] if name == "SVHN" else [{"train": True}, {"train": False}]
    try:
        parts = [getattr(datasets, name)(str(root), download=download, **a) for a in arguments]
    except RuntimeError as error:
        why = "" if "not found" in str(error) else f": {error}"
        raise FileNotFoundError(
            f"{name} is not under {root}, or is damaged there; download=True (--data.download) fetches it, and root "
            f"(--data.root) names another folder{why}"
        ) from error
    class_names = [str(c) for c in getattr(parts[0], "classes", range(10))]
    train, test = (_torchvision_split(part) for part in parts)
    return ImageData(name, train, test, class_names)


def _torchvision_split(part: Any) -> ImageSplit:
    images = torch.as_tensor(part.data)
    if images.ndim == 3:  # MNIST's: (n, H, W)
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:  # CIFAR's: (n, H, W, C)
        images = images.permute(0, 3, 1, 2)
    labels = part.labels if hasattr(part, "labels") else part.targets
    return ImageSplit(images.contiguous(), torch.as_tensor(labels, dtype=torch.int64))
