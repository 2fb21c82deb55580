"""Image data sets as uint8 tensors in memory: digits, torchvision's, Tiny ImageNet, any folder or archive of images."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selmatch_ext.data.whitening import Whitening, fit_whitening

TORCHVISION = ("MNIST", "FashionMNIST", "SVHN", "CIFAR10", "CIFAR100")


def check_labels(labels: Tensor, name: str, classes: int | None = None) -> None:
    """Raises TypeError or ValueError unless `labels` is a non-empty (n,) int64 tensor with values 0 to classes-1."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} is {given}; it must be a torch.int64 tensor")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}; it must be (n,) with at least one label")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        allowed = "0 and above" if classes is None else f"0 to {classes - 1}"
        raise ValueError(f"{name} holds values from {low} to {high}; allowed are {allowed}")


@dataclass
class ImageSplit:
    """Images of one split. images: (n, C, H, W) uint8; labels: (n,) int64; paths: the file of each, if known."""

    images: Tensor
    labels: Tensor
    paths: list[str] | None = None

    def __post_init__(self) -> None:
        images = self.images
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            given = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images is {given}; it must be a torch.uint8 tensor")
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(f"images has shape {tuple(images.shape)}; it must be (n, C, H, W), none of them 0")
        check_labels(self.labels, "labels")
        if len(self.labels) != len(images):
            raise ValueError(f"labels has {len(self.labels)} entries for {len(images)} images")
        if self.paths is not None and len(self.paths) != len(images):
            raise ValueError(f"paths has {len(self.paths)} entries for {len(images)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """What identifies the split: a hash of its images, their shape and their labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()

    def take(self, indices: Tensor) -> ImageSplit:
        """The images at `indices` (m,) as a split of their own."""
        paths = None if self.paths is None else [self.paths[i] for i in indices.tolist()]
        return ImageSplit(self.images[indices], self.labels[indices], paths)


@dataclass
class ImageData:
    """A data set: a training and a test split of equally sized images of the same classes.

    mean, std: (C,) float32, of the training split's pixels in [0, 1]; computed when not given.
    whitening: ZCA of normalised images, which `normalise` then applies and `denormalise` undoes.
    Raises ValueError for labels outside the class names, for classes without images in either split, and for splits
    whose images have different channels or sizes.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: list[str]
    mean: Tensor | None = None
    std: Tensor | None = None
    whitening: Whitening | None = None

    def __post_init__(self) -> None:
        for name, part in (("train", self.train), ("test", self.test)):
            check_labels(part.labels, f"{name} labels", self.classes)
            counts = torch.bincount(part.labels, minlength=self.classes).tolist()
            empty = [self.class_names[i] for i, count in enumerate(counts) if count == 0]
            if empty:
                raise ValueError(f"{self.name}: the {name} split has no images of class {', '.join(empty)}")
        shape, test_shape = tuple(self.train.images.shape[1:]), tuple(self.test.images.shape[1:])
        if shape != test_shape:
            raise ValueError(f"{self.name}: training images are {shape} (C, H, W), test images {test_shape}")
        if self.mean is None or self.std is None:
            self.mean, self.std = pixel_statistics(self.train.images)
        for name, values in (("mean", self.mean), ("std", self.std)):
            right = tuple(values.shape) == (self.channels,) and values.is_floating_point()
            if not right or not values.isfinite().all():
                raise ValueError(
                    f"{self.name}: {name} is {values.dtype} of shape {tuple(values.shape)}; it must be "
                    f"({self.channels},) finite floating-point numbers"
                )
        if not (self.std > 0).all():
            raise ValueError(f"{self.name}: std is {self.std.tolist()}; it must be above 0")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every image."""
        return tuple(self.train.images.shape[2:])

    def normalise(
        self, images: Tensor, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """uint8 (…, C, H, W) -> (x / 255 - mean) / std of `dtype`, whitened where the data set is, on `device`
        (default: where the images are)."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images is {images.dtype}; normalise takes torch.uint8")
        images = images.to(device=device or images.device)
        pixels = (
            images.to(dtype)
            .div_(255)
            .sub_(_per_channel(self.mean, images, dtype))
            .div_(_per_channel(self.std, images, dtype))
        )
        return pixels if self.whitening is None else self.whitening(pixels)

    def whitened(self) -> ImageData:
        """The same data set with ZCA whitening, fitted on its training split."""
        return replace(self, whitening=fit_whitening(replace(self, whitening=None).normalise(self.train.images)))

    def subset(self, per_class: int, generator: torch.Generator) -> tuple[ImageData, Tensor]:
        """Keeps `per_class` random training images of every class, and the whole test split.

        Returns the smaller data set, with the mean and std of its own training split, and the kept training indices
        (classes * per_class,) int64 in ascending order, which index whatever belongs to the full set (scores).
        generator: a CPU generator.
        """
        counts = torch.bincount(self.train.labels)
        if not 0 < per_class <= int(counts.min()):
            smallest = self.class_names[int(counts.argmin())]
            raise ValueError(f"per_class is {per_class}; allowed is 1 to {int(counts.min())}, the size of {smallest}")
        kept = []
        for label in range(self.classes):
            members = (self.train.labels == label).nonzero().squeeze(1)
            kept.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
        indices = torch.cat(kept).sort().values
        name = f"{self.name} ({per_class} a class)"
        return ImageData(name, self.train.take(indices), self.test, self.class_names), indices


def denormalise(images: Tensor, mean: Tensor, std: Tensor, whitening: Whitening | None = None) -> Tensor:
    """Normalised float (…, C, H, W) -> float in [0, 1], clamped. mean, std: (C,)."""
    if whitening is not None:
        images = whitening.undo(images)
    return (images * _per_channel(std, images) + _per_channel(mean, images)).clamp(0, 1)


def _per_channel(values: Tensor, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return values.to(device=images.device, dtype=dtype or images.dtype).view(-1, 1, 1)


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of uint8 images (n, C, H, W), in [0, 1], exact up to rounding.

    A channel that never varies gets a standard deviation of 1/255, so that dividing by it stays finite.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (shares * levels).sum()
        means.append(mean)
        stds.append((shares * (levels - mean) ** 2).sum().sqrt().clamp(min=1 / 255))
    return torch.stack(means).float(), torch.stack(stds).float()


def load(
    spec: str,
    root: str | os.PathLike | None = None,
    *,
    download: bool = False,
    resize: int | None = None,
    cache: str | os.PathLike | None = None,
    background: str = "white",
    test_share: float | None = None,
    seed: int = 0,
) -> ImageData:
    """Loads a data set into memory.

    spec:
      - `digits`: scikit-learn's 8x8 digits, one channel; of each class every third image is a test image.
      - `MNIST`, `FashionMNIST`, `SVHN`, `CIFAR10`, `CIFAR100`: torchvision's, under `root` (default: the folder
        `data`); fetched there only when `download` is true.
      - `imagefolder:PATH`: PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE (or `val` when there is no `test`). PATH is
        a folder, or an archive (.zip, .tar, .tar.gz, …), which is read without unpacking it. Images are ordered by
        class name, then file name. They are RGB, or have one channel when every one of them is greyscale. Every still
        image that Pillow decodes by itself is read: its first frame, turned as EXIF says. Files of 16 bits a channel
        are scaled by the bits that the training images use. Links are followed, inside an archive, and each folder is
        visited once. The log says what was skipped, and how 16-bit files were scaled. Class names are the folders'
        names as `selmatch_ext.data.names.readable` writes them.
      - `tinyimagenet:PATH`: the same, and also Tiny ImageNet's own layout with val/val_annotations.txt; tests on `val`.
    resize: makes every image of a folder or archive this many pixels wide and high (scaled to fill, centre kept).
    cache: a folder that keeps the decoded images of folders and archives, one file per listing (names, sizes, times)
    and arguments.
    background: the color behind transparent pixels, a name (white, black, gray, …) or #rrggbb.
    test_share: where there is neither `test` nor `val`, this share of each class, drawn from `seed`, becomes the test
    split, and PATH/CLASS/IMAGE will do. None: such a folder is refused.

    Raises ValueError, FileNotFoundError or OSError naming the data set, class or file that is wrong.
    """
    kind, _, path = spec.partition(":")
    if kind in ("imagefolder", "tinyimagenet") and path:
        from selmatch_ext.data.folders import Options, load_folder

        options = Options(kind == "tinyimagenet", resize, background, test_share, seed)
        return load_folder(Path(path).expanduser(), options, cache)
    if spec != "digits" and spec not in TORCHVISION:
        raise ValueError(
            f"data set is {spec!r}; allowed are digits, {', '.join(TORCHVISION)}, imagefolder:PATH, tinyimagenet:PATH"
        )
    _refuse_unused(spec, resize, background, test_share)
    return _digits() if spec == "digits" else _torchvision(spec, Path(root or "data"), download)


def _refuse_unused(spec: str, resize: int | None, background: str, test_share: float | None) -> None:
    if resize is not None:
        raise ValueError(
            f"resize is {resize}, but {spec} has images of one size; resize is for imagefolder: and tinyimagenet:"
        )
    for name, given, unused in (("test_share", test_share, None), ("background", background, "white")):
        if given != unused:
            raise ValueError(
                f"{name} is {given!r}, but {spec} does not use it; it is for imagefolder: and tinyimagenet:"
            )


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
        raise FileNotFoundError(f"{name} is not under {root} (download=True fetches it): {error}") from error
    class_names = [str(c) for c in getattr(parts[0], "classes", range(10))]
    return ImageData(name, *(_torchvision_split(part) for part in parts), class_names)


def _torchvision_split(part) -> ImageSplit:
    images = torch.as_tensor(part.data)
    if images.ndim == 3:  # MNIST's: (n, H, W)
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:  # CIFAR's: (n, H, W, C)
        images = images.permute(0, 3, 1, 2)
    labels = part.labels if hasattr(part, "labels") else part.targets
    return ImageSplit(images.contiguous(), torch.as_tensor(labels, dtype=torch.int64))
