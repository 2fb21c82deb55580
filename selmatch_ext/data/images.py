"""Image data sets as uint8 tensors in memory, and their normalization. `load.py` reads them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from selmatch_ext.data.whitening import Whitening, fit_whitening


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
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def take(self, indices: Tensor) -> ImageSplit:
        """The images at `indices` (m,) as a split of their own."""
        paths = None if self.paths is None else [self.paths[i] for i in indices.tolist()]
        return ImageSplit(self.images[indices], self.labels[indices], paths)


@dataclass(frozen=True)
class Full:
    """The data set that a smaller one was taken from.

    labels: (N,) int64, of its training images. kept: (n,) int64, those of them that the smaller one has, in its order.
    """

    name: str
    labels: Tensor
    kept: Tensor


@dataclass
class ImageData:
    """A data set: a training and a test split of equally sized images of the same classes.

    mean, std: (C,) float32, of the training split's pixels in [0, 1]; computed when not given.
    whitening: ZCA of normalized images, which `normalize` then applies and `denormalize` undoes.
    full: the data set that this one is a subset of, if it is one.
    Raises ValueError for labels outside the class names, for classes without images in either split, and for splits
    whose images have different channels or sizes.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: list[str]
    mean: Tensor = None  # type: ignore[assignment]  # __post_init__ computes both where they are not given
    std: Tensor = None  # type: ignore[assignment]
    whitening: Whitening | None = None
    full: Full | None = None

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
        height, width = self.train.images.shape[2:]
        return height, width

    @cached_property
    def members(self) -> list[Tensor]:
        """Of each class, the indices of its training images, ascending."""
        return [(self.train.labels == c).nonzero().squeeze(1) for c in range(self.classes)]

    def sample(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """Indices of `count` random training images of a class, all of them where it has no more."""
        members = self.members[label]
        return members[torch.randperm(len(members), generator=generator)[:count]]

    def sample_each(self, count: int, generator: torch.Generator) -> Tensor:
        """`sample` of every class, one after the other."""
        return torch.cat([self.sample(c, count, generator) for c in range(self.classes)])

    def normalize(
        self, images: Tensor, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """uint8 (…, C, H, W) -> (x / 255 - mean) / std of `dtype`, whitened where the data set is, on `device`
        (default: where the images are)."""
        if images.dtype != torch.uint8:
            raise TypeError(f"images is {images.dtype}; normalize takes torch.uint8")
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
        return replace(self, whitening=fit_whitening(replace(self, whitening=None).normalize(self.train.images)))

    def subset(self, per_class: int, generator: torch.Generator) -> ImageData:
        """Keeps `per_class` random training images of every class, in their order, and the whole test split.

        The smaller data set has the mean and std of its own training split; its `full.kept` indexes whatever belongs to
        the full set (scores). generator: a CPU generator.
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
        return ImageData(name, self.train.take(indices), self.test, self.class_names, full=self._full(indices))

    def of_classes(self, classes: Tensor) -> ImageData:
        """Keeps some classes (k,) int64, ascending, of both splits; they become classes 0 to k−1. Mean, std and `full`
        are as in `subset`."""

        def only(part: ImageSplit) -> ImageSplit:
            kept = part.take(torch.isin(part.labels, classes).nonzero().squeeze(1))
            return replace(kept, labels=torch.searchsorted(classes, kept.labels))

        kept = torch.isin(self.train.labels, classes).nonzero().squeeze(1)
        names = [self.class_names[c] for c in classes.tolist()]
        name = f"{self.name} ({len(classes)} classes)"
        return ImageData(name, only(self.train), only(self.test), names, full=self._full(kept))

    def held_out(self, share: float, generator: torch.Generator) -> ImageData:
        """`share` of the training images of each class, at least one image, becomes the test split; the others stay to
        train on. Mean, std and whitening stay. ValueError where a class would have no image left to train on."""
        in_test = torch.zeros(len(self.train), dtype=torch.bool)
        for label, members in enumerate(self.members):
            count = max(1, round(share * len(members)))
            if count >= len(members):
                raise ValueError(
                    f"held_out is {share:g}, which is {count} of the {len(members)} training images of "
                    f"{self.class_names[label]}; at least one must be left to train on"
                )
            in_test[self.sample(label, count, generator)] = True
        kept, test = (mask.nonzero().squeeze(1) for mask in (~in_test, in_test))
        name, full = f"{self.name} (held-out images)", self._full(kept)
        return replace(self, name=name, train=self.train.take(kept), test=self.train.take(test), full=full)

    def _full(self, indices: Tensor) -> Full:
        """What `full` is of the data set that has the training images at `indices` only."""
        if self.full is None:
            return Full(self.name, self.train.labels, indices)
        return replace(self.full, kept=self.full.kept[indices])


def denormalize(images: Tensor, mean: Tensor, std: Tensor, whitening: Whitening | None = None) -> Tensor:
    """Normalized float (…, C, H, W) -> float in [0, 1], clamped. mean, std: (C,)."""
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
