"""The distilled set, its file and its export."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torchvision.datasets import ImageFolder

from selmatch_ext import files
from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.load import load
from selmatch_ext.data.trajectories import ExpertStore

MEAN, STD = torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.25, 0.2, 0.3])


def pixels(n=6, channels=3):
    values = torch.randint(256, (n, channels, 4, 5), generator=torch.Generator().manual_seed(0))
    return values.to(torch.uint8)


def example(**changes):
    images = (pixels() / 255 - MEAN.view(-1, 1, 1)) / STD.view(-1, 1, 1)
    fields = {
        "images": images,
        "labels": torch.tensor([0, 0, 1, 1, 2, 2]),
        "distilled": torch.tensor([False, True] * 3),
        "lr": 0.0123,
        "mean": MEAN,
        "std": STD,
        "class_names": ["cat", "dog", "owl"],
        "method": "selmatch",
        "settings": {"beta": 0.7, "window": {"ipc": 2}},
        "indices": torch.tensor([5, 3, 9, 8, -1, 0]),
    }
    return DistilledSet(**{**fields, **changes})


def assert_same(a, b):
    for name in ("images", "labels", "distilled", "mean", "std", "indices"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and torch.equal(x, y), name
    assert (a.lr, a.class_names, a.method, a.settings) == (b.lr, b.class_names, b.method, b.settings)


@pytest.mark.parametrize("changes", [{}, {"lr": None}, {"labels": torch.full((6, 3), 1 / 3)}, {"indices": None}])
def test_round_trip(tmp_path, changes):
    made = example(**changes)
    made.save(tmp_path / "d.safetensors")
    assert_same(DistilledSet.load(tmp_path / "d.safetensors"), made)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_file_is_plain_safetensors(tmp_path):
    example().save(tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", framework="np") as handle:
        assert set(handle.keys()) == {"images", "labels", "distilled", "indices", "lr"}
        metadata = handle.metadata()
        assert metadata["format"] == "selmatch_ext.distilled" and handle.get_tensor("lr") == 0.0123
    assert json.loads(metadata["class_names"]) == ["cat", "dog", "owl"]
    assert json.loads(metadata["settings"])["window"] == {"ipc": 2}


def test_denormalized_and_hard_labels():
    made = example()
    assert torch.equal((made.denormalized() * 255).round().to(torch.uint8), pixels())
    assert replace(made, images=made.images * 100).denormalized().max() == 1
    soft = torch.eye(3)[made.labels] * 0.7 + 0.1
    assert torch.equal(replace(made, labels=soft).hard_labels, made.hard_labels) and len(made) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(6, 3, 4, 5, dtype=torch.float64)}, "images is torch.float64; it must be torch.float32"),
        ({"images": pixels()}, "images is torch.uint8"),
        ({"images": torch.zeros(6, 3, 4)}, r"images has shape \(6, 3, 4\); it must be \(n, C, H, W\)"),
        (
            {"images": torch.full((6, 3, 4, 5), torch.nan)},
            "6 of 6 images hold NaN or infinite values, the first is number 0",
        ),
        ({"labels": torch.tensor([0, 0, 1, 1, 2, 3])}, "labels holds values from 0 to 3; allowed are 0 to 2"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels has 3 entries for 6 images"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "labels is torch.int32"),
        ({"labels": torch.zeros(6, 4)}, r"soft labels have shape \(6, 4\); they must be \(6, 3\)"),
        ({"labels": torch.full((6, 3), torch.inf)}, "soft labels hold NaN"),
        ({"distilled": torch.zeros(6)}, r"distilled is torch.float32 \(6,\); it must be torch.bool \(6,\)"),
        ({"distilled": torch.zeros(5, dtype=torch.bool)}, r"distilled is torch.bool \(5,\)"),
        ({"indices": torch.zeros(6)}, r"indices is torch.float32 \(6,\); it must be torch.int64"),
        ({"mean": torch.zeros(1)}, r"mean is \[0.0\]; it must hold a finite number for each channel"),
        ({"std": torch.zeros(3)}, r"std is \[0.0, 0.0, 0.0\]; it must be above 0"),
    ],
)
def test_wrong_fields(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        example(**changes)


def test_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "d.safetensors"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "distilled.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="run is a folder; the set in it is .*run/distilled.safetensors"):
        DistilledSet.load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="expected a selmatch_ext file of kind distilled"):
        DistilledSet.load(path)
    example().save(path)
    content = path.read_bytes()
    for kept in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"d.safetensors is truncated or is no safetensors file"):
            DistilledSet.load(path)
    store = ExpertStore(tmp_path)
    store.save(0, torch.zeros(2, 3), {})
    with pytest.raises(ValueError, match="is a selmatch_ext expert file; expected kind distilled"):
        DistilledSet.load(store.path(0))


def test_damaged_contents_name_the_file(tmp_path):
    path = tmp_path / "d.safetensors"
    example().save(path)
    tensors, metadata = files.load_tensors(path, "distilled")
    files.save_tensors(path, "distilled", {**tensors, "labels": tensors["labels"] + 1}, metadata)
    with pytest.raises(ValueError, match="d.safetensors is damaged: labels holds values from 1 to 3"):
        DistilledSet.load(path)
    files.save_tensors(path, "distilled", tensors, {**metadata, "mean": "[0.1"})
    with pytest.raises(ValueError, match="d.safetensors: metadata field 'mean' is missing or damaged"):
        DistilledSet.load(path)
    del tensors["distilled"]
    files.save_tensors(path, "distilled", tensors, metadata)
    with pytest.raises(ValueError, match="d.safetensors lacks distilled"):
        DistilledSet.load(path)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for write in (example().save, example().export):
        with pytest.raises(NotADirectoryError, match="cannot write .*file is a file, not a folder"):
            write(tmp_path / "file" / "x")


# export


def exported(folder):
    found = ImageFolder(folder, loader=lambda path: torch.from_numpy(np.array(Image.open(path))))
    return found, {int(os.path.basename(path)[:5]): (found.loader(path), label) for path, label in found.samples}


def test_export_is_an_image_folder(tmp_path):
    made = example()
    (tmp_path / "out").mkdir()  # an empty folder is welcome
    made.export(tmp_path / "out")
    found, images = exported(tmp_path / "out")
    assert found.classes == made.class_names and len(images) == 6
    for i, (image, label) in images.items():
        assert torch.equal(image.permute(2, 0, 1), pixels()[i]) and label == made.labels[i]
    names = sorted(p.name for p in (tmp_path / "out" / "cat").iterdir())
    assert names == ["00000_selected.png", "00001_distilled.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_export_of_one_channel_and_soft_labels(tmp_path):
    soft = torch.eye(3)[torch.tensor([2, 2, 1, 1, 0, 0])] * 0.7 + 0.1
    gray = pixels(channels=1)
    made = example(images=gray / 127.5 - 1, labels=soft, mean=torch.tensor([0.5]), std=torch.tensor([0.5]))
    made.export(tmp_path / "out")
    _, images = exported(tmp_path / "out")
    for i, (image, label) in images.items():
        assert torch.equal(image, gray[i, 0]) and label == soft[i].argmax()


@pytest.mark.parametrize("names", [["owl", "cat", "dog"], ["a/b", "a:b", "c"], ["", "x", ".."], ["a", "a", "a"]])
def test_class_names_that_are_no_folder_names(tmp_path, names):
    made = example(class_names=names)
    made.export(tmp_path / "out")
    _, images = exported(tmp_path / "out")
    assert [images[i][1] for i in range(6)] == made.labels.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and len(list((tmp_path / "out").iterdir())) == 3


def test_classes_without_images_keep_their_number(tmp_path):
    made = example(labels=torch.tensor([0, 0, 2, 2, 2, 2]))
    made.export(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cat", "dog", "owl"]
    assert ImageFolder(tmp_path / "out", allow_empty=True).targets == [0, 0, 2, 2, 2, 2]


def test_export_refuses_what_is_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for target in ("out", "out/mine.txt"):
        with pytest.raises(FileExistsError, match=f"{target} exists and is not an empty folder"):
            example().export(tmp_path / target)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="images have 2 channels"):
        made = example(images=torch.zeros(6, 2, 4, 5), mean=torch.zeros(2), std=torch.ones(2))
        made.export(tmp_path / "new")


def test_export_is_all_or_nothing(tmp_path, monkeypatch):
    saved, save = [], Image.Image.save

    def full(self, path, *rest, **options):
        saved.append(path)
        if len(saved) == 4:
            raise OSError(28, "No space left on device")
        save(self, path, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="cannot write .*out: No space left on device"):
        example().export(tmp_path / "out")
    assert len(saved) == 4 and not list(tmp_path.iterdir())


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.load import load
path, i = sys.argv[1], 0
while True:
    i += 1
    images = torch.full((40, 3, 64, 64), float(i))
    DistilledSet(images, torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.bool), float(i),
                 torch.zeros(3), torch.ones(3), ["a"], "selmatch").save(path)
"""


def test_killed_while_saving_the_file_is_whole(tmp_path):
    path = tmp_path / "d.safetensors"
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(path)])
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(20):  # whole at any moment, also while it is being replaced
        loaded = DistilledSet.load(path)
        assert (loaded.images == loaded.lr).all()
    process.send_signal(signal.SIGKILL)
    process.wait()
    loaded = DistilledSet.load(path)
    assert (loaded.images == loaded.lr).all()
    others = [p.name for p in tmp_path.iterdir() if p != path]
    assert all(name.startswith(".d.safetensors.") and name.endswith(".tmp") for name in others)
    loaded.save(path)
    assert list(tmp_path.iterdir()) == [path]


# whitening and schedules


def test_whitening_is_kept_and_undone_for_looking(tmp_path):
    data = load("digits").whitened()
    made = DistilledSet(
        data.normalize(data.train.images[:6]),
        data.train.labels[:6],
        torch.ones(6, dtype=torch.bool),
        None,
        data.mean,
        data.std,
        data.class_names,
        "mtt",
        whitening=data.whitening,
    )
    made.save(tmp_path / "d.safetensors")
    loaded = DistilledSet.load(tmp_path / "d.safetensors")
    assert_same(loaded, made)
    assert torch.equal(loaded.whitening.transform, data.whitening.transform)
    assert torch.equal((loaded.denormalized() * 255).round().to(torch.uint8), data.train.images[:6])
    assert loaded.digest() == made.digest() != replace(made, whitening=None).digest()


@pytest.mark.parametrize("starts", [None, torch.randn(2, 5)])
def test_a_schedule_is_kept(tmp_path, starts):
    schedule = Schedule(torch.tensor([0.1, 0.02]), torch.tensor([[0, 2, 4], [1, 3, 5]]), "LeNet", starts)
    made = example(schedule=schedule)
    made.save(tmp_path / "d.safetensors")
    loaded = DistilledSet.load(tmp_path / "d.safetensors")
    assert loaded.schedule.model == "LeNet" and loaded.digest() == made.digest() != example().digest()
    for name in ("rates", "batches", "starts"):
        a, b = getattr(loaded.schedule, name), getattr(schedule, name)
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("rates", "batches", "message"),
    [
        ([0.1, -0.1], [[0], [1]], r"schedule.rates must be \(N,\) positive numbers"),
        ([0.1], [[0], [1]], r"schedule.batches has shape \(2, 1\); it must be \(1, B\)"),
        ([0.1], [[6]], "schedule.batches must hold indices of the 6 images"),
        ([0.1], [[]], r"schedule.batches has shape \(1, 0\); it must be \(1, B\), not empty"),
        ([], [[]], r"schedule.batches has shape \(1, 0\)"),
    ],
)
def test_wrong_schedules(rates, batches, message):
    with pytest.raises(ValueError, match=message):
        example(schedule=Schedule(torch.tensor(rates), torch.tensor(batches, dtype=torch.int64), "LeNet"))


@pytest.mark.parametrize("starts", [torch.zeros(0, 5), torch.zeros(5), torch.full((1, 5), torch.nan)])
def test_wrong_starts_of_a_schedule(starts):
    with pytest.raises(ValueError, match=r"schedule.starts has shape .*; it must be \(k, P\) finite numbers"):
        example(schedule=Schedule(torch.tensor([0.1]), torch.tensor([[0, 1]]), "LeNet", starts))


def test_the_digest_of_a_set_stays_as_it_is():
    """It is in the records of evaluations."""
    made = example()
    tensors = made.images, made.labels, made.distilled, made.mean, made.std
    assert made.digest() == hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
