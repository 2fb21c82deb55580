"""What every data set of images does: digits, statistics, subsets, and tensors or names that are refused."""

import pytest
import torch

from selmatch_ext.data.images import ImageData, ImageSplit, denormalize, pixel_statistics
from selmatch_ext.data.load import load, load_data
from selmatch_ext.settings import Data


def test_digits():
    data = load("digits")
    assert (data.classes, data.channels, data.image_size) == (10, 1, (8, 8))
    assert len(data.train) + len(data.test) == 1797
    assert (torch.bincount(data.test.labels) * 2 - torch.bincount(data.train.labels)).abs().max() <= 2
    assert data.train.images.max() == 255 and data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.images, load("digits").train.images)


def test_statistics_and_normalizing():
    images = torch.randint(256, (7, 3, 4, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = pixel_statistics(images)
    exact = images.double() / 255
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(std.double(), exact.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    part = ImageSplit(images, torch.zeros(7, dtype=torch.int64))
    data = ImageData("x", part, part, ["a"])
    normal = data.normalize(images)
    assert normal.dtype == torch.float32 and data.normalize(images, dtype=torch.float64).dtype == torch.float64
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)
    assert torch.equal((denormalize(normal, data.mean, data.std) * 255).round().to(torch.uint8), images)
    assert denormalize(normal * 100, data.mean, data.std).max() == 1
    with pytest.raises(TypeError, match="normalize takes torch.uint8"):
        data.normalize(images.float())


def test_constant_images_stay_finite():
    part = ImageSplit(torch.full((2, 1, 3, 3), 9, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert ImageData("x", part, part, ["a"]).normalize(part.images).abs().max() < 1e-5


def test_subset_keeps_indices():
    data = load("digits")
    small = data.subset(7, torch.Generator().manual_seed(3))
    kept = small.full.kept
    assert torch.bincount(small.train.labels).tolist() == [7] * 10 and len(small.test) == len(data.test)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert torch.equal(data.train.images[kept], small.train.images)
    assert torch.equal(data.train.labels[kept], small.train.labels)
    again, other = (data.subset(7, torch.Generator().manual_seed(s)).full.kept for s in (3, 4))
    assert torch.equal(kept, again) and not torch.equal(kept, other)
    for per_class in (0, 200):
        with pytest.raises(ValueError, match=f"per_class is {per_class}; allowed is 1 to 116, the size of 8"):
            data.subset(per_class, torch.Generator())


def test_wrong_tensors():
    images, labels = torch.zeros((4, 1, 2, 2), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    good = ImageSplit(images, labels)
    for wrong in (images.float(), images.numpy()):
        with pytest.raises(TypeError, match="must be a torch.uint8 tensor"):
            ImageSplit(wrong, labels)
    for wrong in (images[0], images[:0]):
        with pytest.raises(ValueError, match=r"it must be \(n, C, H, W\)"):
            ImageSplit(wrong, labels)
    with pytest.raises(TypeError, match="labels is torch.float32"):
        ImageSplit(images, labels.float())
    with pytest.raises(ValueError, match="labels has 3 entries for 4 images"):
        ImageSplit(images, labels[:3])
    with pytest.raises(ValueError, match="paths has 1 entries for 4 images"):
        ImageSplit(images, labels, ["a"])
    with pytest.raises(ValueError, match="train labels holds values from 0 to 1; allowed are 0 to 0"):
        ImageData("x", good, good, ["a"])
    with pytest.raises(ValueError, match="x: the train split has no images of class c"):
        ImageData("x", good, good, ["a", "b", "c"])
    with pytest.raises(ValueError, match="x: the test split has no images of class b"):
        ImageData("x", good, good.take(torch.tensor([0, 2])), ["a", "b"])
    with pytest.raises(ValueError, match=r"training images are \(1, 2, 2\) \(C, H, W\), test images \(1, 2, 3\)"):
        ImageData("x", good, ImageSplit(torch.zeros((4, 1, 2, 3), dtype=torch.uint8), labels), ["a", "b"])


def test_unknown_names():
    for spec in ("CIFAR", "imagefolder", "imagefolder:", "folder:/x"):
        with pytest.raises(ValueError, match="allowed are digits, MNIST"):
            load(spec)
    with pytest.raises(ValueError, match="resize is 4, but digits"):
        load("digits", resize=4)


def test_held_out_images_take_the_place_of_the_test_images(digits):
    """Images to choose settings on: from the training split, with every image of it on one side only."""
    data = load_data(Data("digits", held_out=0.25, per_class=40), seed=3)
    position = {image.numpy().tobytes(): i for i, image in enumerate(digits.train.images)}
    train, test = ({position[image.numpy().tobytes()] for image in part.images} for part in (data.train, data.test))
    assert not train & test and torch.equal(digits.train.images[data.full.kept], data.train.images)
    assert torch.equal(torch.bincount(data.test.labels), (torch.bincount(digits.train.labels) * 0.25).round().long())
    again, other = (load_data(Data("digits", held_out=0.25), seed) for seed in (3, 4))
    assert torch.equal(again.test.images, data.test.images) and not torch.equal(other.test.images, data.test.images)
    assert len(again.train) + len(again.test) == len(digits.train)
    assert torch.equal(again.mean, pixel_statistics(again.train.images)[0]) and not torch.equal(again.mean, digits.mean)
    with pytest.raises(ValueError, match="held_out is 1.5; allowed is above 0 to below 1"):
        Data("digits", held_out=1.5)
