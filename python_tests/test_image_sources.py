"""Where images come from: torchvision's data sets, folders and archives, their cache, and bad ones."""

import gzip
import io
import os
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from selmatch_ext.data import folders
from selmatch_ext.data.decoding import decode
from selmatch_ext.data.load import load


def noise(seed, height=6, width=5, channels=3):
    image = torch.randint(256, (height, width, channels), generator=torch.Generator().manual_seed(seed))
    return image.to(torch.uint8).squeeze(2).numpy()


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


@pytest.fixture
def tree(tmp_path):
    """train: 3 cats, 2 dogs; test: 1 each. PNG, so that pixels come back exactly."""
    root = tmp_path / "pets"
    for i, name in enumerate(["train/cat/b", "train/cat/a", "train/cat/c", "train/dog/x", "train/dog/y"]):
        write(root / f"{name}.png", noise(i))
    for i, name in enumerate(["test/cat/t", "test/dog/t"]):
        write(root / f"{name}.png", noise(10 + i))
    return root


def as_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


def assert_same(a, b):
    for x, y in ((a.train, b.train), (a.test, b.test)):
        assert torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) and x.paths == y.paths
    assert a.class_names == b.class_names and a.name == b.name
    assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)


# torchvision


def test_mnist_from_its_files(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = noise(0, 20, 28, 28).reshape(20, 28, 28)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    data = load("MNIST", root=tmp_path)
    assert data.train.images.shape == (20, 1, 28, 28) and data.classes == 10
    assert np.array_equal(data.test.images[:, 0].numpy(), images) and data.test.labels.tolist() == labels.tolist()


class FakeCifar:
    classes = ["a", "b"]

    def __init__(self, root, train, download):
        self.data, self.targets = noise(0, 4, 32, 32 * 3).reshape(4, 32, 32, 3), [0, 1, 1, 0]


class FakeSvhn:
    def __init__(self, root, split, download):
        self.data, self.labels = noise(0, 10, 3, 32 * 32).reshape(10, 3, 32, 32), np.arange(10)


def test_layouts_of_torchvision(monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR10", FakeCifar)
    monkeypatch.setattr(datasets, "SVHN", FakeSvhn)
    data = load("CIFAR10")
    assert torch.equal(data.train.images[1], as_tensor(FakeCifar(0, 0, 0).data[1]))
    assert data.train.images.is_contiguous() and data.class_names == ["a", "b"]
    data = load("SVHN")
    assert np.array_equal(data.train.images.numpy(), FakeSvhn(0, 0, 0).data)
    assert data.class_names == [str(i) for i in range(10)]


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "SVHN", "MNIST", "FashionMNIST"])
def test_missing_torchvision_data_is_not_fetched(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} is not under {tmp_path}"):
        load(name, root=tmp_path)


# folders and archives


def test_folder_order_and_pixels(tree):
    data = load(f"imagefolder:{tree}")
    assert data.name == "pets" and data.class_names == ["cat", "dog"]
    assert data.train.paths == [f"train/{n}.png" for n in ("cat/a", "cat/b", "cat/c", "dog/x", "dog/y")]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1] and data.test.labels.tolist() == [0, 1]
    assert data.image_size == (6, 5) and data.channels == 3
    for i, seed in enumerate([1, 0, 2, 3, 4]):
        assert torch.equal(data.train.images[i], as_tensor(noise(seed)))
    reference = datasets.ImageFolder(tree / "train")
    assert [os.path.relpath(p, tree) for p, _ in reference.samples] == data.train.paths


def test_val_stands_in_for_test(tree):
    expected = load(f"imagefolder:{tree}")
    (tree / "test").rename(tree / "val")
    data = load(f"imagefolder:{tree}")
    assert torch.equal(data.test.images, expected.test.images) and data.test.paths[0] == "val/cat/t.png"
    shutil.rmtree(tree / "val")
    with pytest.raises(ValueError, match="pets has neither a test nor a val folder"):
        load(f"imagefolder:{tree}")


def test_hidden_and_other_files_are_ignored(tree):
    expected = load(f"imagefolder:{tree}")
    for name in (
        "train/cat/.a.png",
        "train/cat/notes.txt",
        "train/.git/x.png",
        "train/loose.png",
        ".DS_Store",
        "x.png",
    ):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("not an image")
    assert_same(load(f"imagefolder:{tree}"), expected)


def test_upper_case_extensions_and_deeper_folders_count(tree):
    write(tree / "train" / "cat" / "more" / "z.JPEG", noise(7), format="png")
    data = load(f"imagefolder:{tree}")
    assert data.train.paths[3] == "train/cat/more/z.JPEG" and torch.equal(data.train.images[3], as_tensor(noise(7)))


def pack_zip(tree, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(tree.parent))
        archive.writestr("__MACOSX/pets/train/cat/._a.png", b"junk")


def pack_tar(tree, path):
    compression = {".tar": "", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "gz")
    with tarfile.open(path, f"w:{compression}") as archive:
        archive.add(tree, "./deep/er/pets")


@pytest.mark.parametrize("name", ["pets.zip", "pets.tar", "pets.tar.gz", "pets.tgz", "pets.tar.bz2", "pets.tar.xz"])
def test_archives_equal_the_folder(tree, tmp_path, name):
    expected = load(f"imagefolder:{tree}")
    path = tmp_path / "archives" / name
    path.parent.mkdir()
    (pack_zip if name.endswith("zip") else pack_tar)(tree, path)
    assert_same(load(f"imagefolder:{path}"), expected)
    assert list(path.parent.iterdir()) == [path]  # nothing unpacked


def test_archives_that_are_damaged(tree, tmp_path):
    for name in ("pets.zip", "pets.tar", "pets.tar.gz"):
        path = tmp_path / name
        (pack_zip if name.endswith("zip") else pack_tar)(tree, path)
        content = path.read_bytes()
        for kept in (0, 100, len(content) // 2):
            path.write_bytes(content[:kept])
            with pytest.raises(ValueError, match=rf"{name} is truncated or is no archive"):
                load(f"imagefolder:{path}")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(ValueError, match="x.tar.gz is truncated or is no archive"):
        load(f"imagefolder:{tmp_path}/x.tar.gz")
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    with pytest.raises(ValueError, match=r"x.rar is neither a folder nor an archive; allowed endings are .tar"):
        load(f"imagefolder:{tmp_path}/x.rar")
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        load(f"imagefolder:{tmp_path}/none")


@pytest.mark.parametrize("name", ["pets.tar.gz", "pets.tar.bz2", "pets.tar.xz"])
def test_archives_with_a_byte_that_is_wrong(tree, tmp_path, name):
    path = tmp_path / name
    pack_tar(tree, path)
    content = bytearray(path.read_bytes())
    for place in (0, len(content) // 3, len(content) // 2, 2 * len(content) // 3, len(content) - 6):
        content[place] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is truncated or is no archive"):
            load(f"imagefolder:{path}")
        content[place] ^= 0xFF


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8\xff\xe0 no picture", "truncated png", "truncated jpg"])
def test_corrupt_image_is_named(tree, content):
    name = "train/dog/broken.jpg"
    if isinstance(content, str):
        write(tree / name, noise(0, 40, 40), format=content.split()[1].replace("jpg", "jpeg"))
        content = (tree / name).read_bytes()
        content = content[: len(content) // 2]
    (tree / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a readable image"):
        load(f"imagefolder:{tree}")


def test_sizes_must_agree_or_be_changed(tree):
    write(tree / "train" / "dog" / "z.png", noise(0, 9, 12))
    with pytest.raises(ValueError, match=r"train/dog/z.png is 12x9 pixels, but train/cat/a.png is 5x6: .*pass resize"):
        load(f"imagefolder:{tree}")
    data = load(f"imagefolder:{tree}", resize=4)
    assert data.image_size == (4, 4) and data.name == "pets (4x4)"
    with pytest.raises(ValueError, match="resize is 0"):
        load(f"imagefolder:{tree}", resize=0)


def test_resize_keeps_what_fits_and_the_centre():
    image = np.zeros((8, 32, 3), np.uint8)
    image[:, 4:28] = 200  # the center square is 12:20, and the filter looks a little further
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    assert (decode(file.getvalue(), "x", 4).pixels == 200).all()
    assert np.array_equal(decode(file.getvalue(), "x").pixels, image.transpose(2, 0, 1))


def test_modes_become_rgb_or_grey(tree):
    gray = noise(0, channels=1)
    write(tree / "train/cat/d.png", gray)  # mode L
    write(tree / "train/cat/e.png", noise(1, channels=4))  # RGBA
    write(tree / "train/cat/f.png", Image.fromarray(noise(2)).quantize(16))  # P
    write(tree / "train/cat/g.png", Image.fromarray(noise(3, channels=1)).convert("1"))
    write(tree / "train/cat/h.jpg", Image.fromarray(noise(4)).convert("CMYK"))
    write(tree / "train/cat/i.jpg", gray)
    data = load(f"imagefolder:{tree}")
    assert data.channels == 3
    assert torch.equal(data.train.images[3], torch.from_numpy(gray).expand(3, -1, -1))
    color, alpha = noise(1, channels=4)[..., :3] / 255, noise(1, channels=4)[..., 3:] / 255
    on_white = 255 * (color * alpha + 1 - alpha)
    assert np.abs(data.train.images[4].permute(1, 2, 0).numpy() - on_white).max() <= 1
    palette = Image.open(tree / "train/cat/f.png").convert("RGB")
    assert torch.equal(data.train.images[5], as_tensor(np.array(palette)))
    assert set(data.train.images[6].unique().tolist()) == {0, 255}


def test_all_grey_is_one_channel(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "b" / "1.png", noise(9, channels=1))
        write(tmp_path / split / "a" / "1.png", noise(1, channels=1))
        write(tmp_path / split / "a" / "2.png", Image.fromarray(noise(2, channels=1)).convert("LA"))
        deep = noise(3, channels=1).astype(np.uint16) * 256 + 77
        write(tmp_path / split / "a" / "3.png", Image.fromarray(deep))
        write(tmp_path / split / "a" / "4.jpg", Image.new("L", (5, 6), 128))
    data = load(f"imagefolder:{tmp_path}")
    assert data.channels == 1
    for i in range(3):
        assert torch.equal(data.train.images[i, 0], torch.from_numpy(noise(i + 1, channels=1)))
    assert (data.train.images[3] == 128).all()


def test_pixels_that_do_not_fit_8_bits(tree):
    write(tree / "train/cat/d.tif", Image.fromarray(np.ones((6, 5), np.float32)))
    with pytest.raises(ValueError, match="train/cat/d.tif is not a readable image: floating-point pixels"):
        load(f"imagefolder:{tree}")
    write(tree / "train/cat/d.tif", Image.fromarray(np.full((6, 5), 70000, np.int32)))
    with pytest.raises(ValueError, match="train/cat/d.tif is not a readable image: mode I with more than 16 bits"):
        load(f"imagefolder:{tree}")


def test_classes_must_agree(tree):
    write(tree / "train" / "owl" / "a.png", noise(0))
    with pytest.raises(ValueError, match="pets: test has no folder for class owl"):
        load(f"imagefolder:{tree}")
    (tree / "train" / "owl").rename(tree / "test" / "owl")
    with pytest.raises(ValueError, match="pets: train has no folder for class owl"):
        load(f"imagefolder:{tree}")


@pytest.mark.parametrize("archive", [False, True])
def test_empty_class_folder(tree, tmp_path, archive):
    (tree / "train" / "owl").mkdir()
    path = tmp_path / "pets.tar.gz" if archive else tree
    if archive:
        pack_tar(tree, path)
    with pytest.raises(ValueError, match="class folder train/owl has no images"):
        load(f"imagefolder:{path}")


def test_no_images_at_all(tmp_path):
    with pytest.raises(ValueError, match="has no images under train/CLASS/"):
        load(f"imagefolder:{tmp_path}")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "a.txt").touch()
    with pytest.raises(ValueError, match="has no images under train/CLASS/"):
        load(f"imagefolder:{tmp_path}")


def test_tiny_imagenet_in_its_own_layout(tmp_path):
    names = ["n01", "n02"]
    for label, name in enumerate(names):
        for i in range(3):
            write(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", noise(label * 3 + i), format="png")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("boxes")
    for i in range(4):
        write(tmp_path / "val" / "images" / f"val_{i}.JPEG", noise(20 + i), format="png")
        write(tmp_path / "test" / "images" / f"test_{i}.JPEG", noise(30 + i), format="png")
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text("".join(f"val_{i}.JPEG\t{names[1 - i % 2]}\t0\t0\t4\t4\n" for i in range(4)))
    data = load(f"tinyimagenet:{tmp_path}")
    assert data.class_names == names and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.paths == [f"val/images/val_{i}.JPEG" for i in (1, 3, 0, 2)]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.test.images[2], as_tensor(noise(20)))
    table.write_text(table.read_text() + "val_9.JPEG\tn01\n")
    with pytest.raises(ValueError, match="val/images/val_9.JPEG does not exist"):
        load(f"tinyimagenet:{tmp_path}")


# the cache


def test_cache_is_used_and_follows_the_files(tree, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = load(f"imagefolder:{tree}")
    assert_same(load(f"imagefolder:{tree}", cache=cache), expected)
    (stored,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "decode", None)  # nothing is decoded
        assert_same(load(f"imagefolder:{tree}", cache=cache), expected)
    size = stored.stat().st_size
    os.truncate(stored, size - 10)  # damaged: decoded again and repaired
    assert_same(load(f"imagefolder:{tree}", cache=cache), expected)
    assert stored.stat().st_size == size
    write(tree / "train" / "cat" / "a.png", noise(99))
    assert torch.equal(load(f"imagefolder:{tree}", cache=cache).train.images[0], as_tensor(noise(99)))
    assert load(f"imagefolder:{tree}", cache=cache, resize=3).image_size == (3, 3)
    assert len(list(cache.iterdir())) == 3


def test_cache_of_an_archive(tree, tmp_path, monkeypatch):
    path = tmp_path / "pets.zip"
    pack_zip(tree, path)
    expected = load(f"imagefolder:{path}", cache=tmp_path / "cache")
    monkeypatch.setattr(folders, "read_archive", None)
    assert_same(load(f"imagefolder:{path}", cache=tmp_path / "cache"), expected)


def test_cache_that_cannot_be_written(tree, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot write .*file is a file, not a folder"):
        load(f"imagefolder:{tree}", cache=tmp_path / "file" / "cache")
