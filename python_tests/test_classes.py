"""Some classes of a data set, by name; and images of 128x128 pixels with the deep ConvNets that go with them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, MODEL, tiny_run
from image_files import encoded, pattern, plain, write_set

from selmatch_ext import cli, models, unrolled_sgd
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.load import load, load_data
from selmatch_ext.models import flat
from selmatch_ext.runner import run
from selmatch_ext.selection.difficulty import training_difficulty
from selmatch_ext.settings import Data, Scores, Training
from selmatch_ext.training import train_on_real
from selmatch_ext.unroll import explain_engine

PAGE = Path(__file__).parents[1] / "docs" / "your-images.md"


def test_the_images_are_those_of_the_classes(digits):
    """In the order of the data set, whatever the order of the names."""
    found = load("digits", classes=("7", "2"))
    assert found.class_names == ["2", "7"] and found.name == "digits (2 classes)"
    for part, whole in ((found.train, digits.train), (found.test, digits.test)):
        for label, digit in enumerate((2, 7)):
            assert torch.equal(part.images[part.labels == label], whole.images[whole.labels == digit])
        assert len(part) == sum(int((whole.labels == digit).sum()) for digit in (2, 7))
    pixels = found.train.images.double() / 255
    assert found.mean.item() == pytest.approx(pixels.mean().item()) and not torch.equal(found.mean, digits.mean)
    assert torch.equal(digits.train.images[found.full.kept], found.train.images)


def test_with_the_other_settings_of_the_data(digits):
    found = load_data(Data("digits", classes=("7", "2"), per_class=5, zca=True), seed=3)
    assert len(found.train) == 10 and found.whitening is not None and found.name == "digits (2 classes) (5 a class)"
    assert torch.equal(digits.train.images[found.full.kept], found.train.images)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("2", "seven"), "digits has no class seven; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (("2",), "classes names 1 class of digits; at least two are needed"),
        (("2", "2"), "classes names 1 class"),
        ((), "classes is (); allowed is a tuple of names"),
        ("27", "classes is '27'; allowed is a tuple of names"),
    ],
)
def test_wrong_classes(classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load("digits", classes=classes)


def test_an_unknown_class_names_its_neighbors(tmp_path):
    root = write_set(tmp_path / "s", plain, names=("Cat", "cattle", "dog", "emu"))
    with pytest.raises(ValueError, match=r"no class catt, dgo; nearly alike are Cat, cattle, dog$"):
        load(f"imagefolder:{root}", classes=("catt", "dgo", "emu"))


def test_other_classes_of_a_folder_are_not_decoded(tmp_path):
    root = write_set(tmp_path / "s", plain, names=("cat", "cow", "dog"))
    for path in root.glob("*/cow/*.png"):
        path.write_bytes(b"damaged")
    spec, two = f"imagefolder:{root}", ("dog", "cat")
    with pytest.raises(ValueError, match="cow"):
        load(spec)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):  # written, then read
        data = load_data(Data(spec, classes=two, cache=None if cache is None else str(cache)), 0)
        assert data.class_names == ["cat", "dog"] and data.name == "s (2 classes)"
        assert torch.equal(data.train.images[5], torch.from_numpy(pattern(202)).permute(2, 0, 1))
        assert data.full.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and data.full.kept.tolist() == [
            0,
            1,
            2,
            6,
            7,
            8,
        ]
    write_set(root, plain, names=("cat", "cow", "dog"))
    assert len(load(spec, cache=str(tmp_path / "cache")).train) == 9  # is not taken for the part
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_scores_of_all_classes_are_picked(tmp_path):
    root = write_set(tmp_path / "s", plain, names=("cat", "cow", "dog"))
    np.save(tmp_path / "scores.npy", np.arange(9, dtype=np.float32))
    for given, kept in ((f"imagefolder:{root}", [0, 1, 2, 6, 7, 8]), ("digits", None)):
        if kept is None:
            whole = load("digits")
            np.save(tmp_path / "scores.npy", np.arange(len(whole.train), dtype=np.float32))
            kept = ((whole.train.labels == 2) | (whole.train.labels == 7)).nonzero().squeeze(1).tolist()
        data = load(given, classes=("2", "7") if given == "digits" else ("cat", "dog"))
        scores = Scores(f"el2n:{tmp_path / 'scores.npy'}")
        assert training_difficulty(Context(data), scores, tmp_path / "none").tolist() == kept


def test_a_test_share_is_that_of_all_classes(tmp_path):
    """Which images are set aside does not depend on the other classes."""
    for label, name in enumerate(("cat", "cow", "dog")):
        for index in range(6):
            path = tmp_path / "s" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plain(label, index))
    spec = f"imagefolder:{tmp_path / 's'}"
    whole, part = load(spec, test_share=0.5), load(spec, test_share=0.5, classes=("cow", "dog"))
    assert torch.equal(part.test.images, whole.test.images[whole.test.labels > 0])


def test_a_run_keeps_its_classes(tmp_path, capsys):
    """In settings.json and in the set's file, from which evaluate takes them; the same call continues."""
    tiny = tiny_run()
    asked = replace(tiny, data=Data("digits", classes=("7", "2", "5")))
    found = run(asked, tmp_path / "run", CPU)
    assert run(asked, tmp_path / "run", CPU) == found
    subset = DistilledSet.load(tmp_path / "run" / "distilled.safetensors")
    assert subset.class_names == ["2", "5", "7"] and subset.settings["data"]["classes"] == ["7", "2", "5"]
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["data"]["classes"] == ["7", "2", "5"]
    short = ["--evaluation.model", MODEL, "--evaluation.networks", "1", "--evaluation.training.epochs", "1"]
    path = str(tmp_path / "run" / "distilled.safetensors")
    assert cli.main(["evaluate", path, "--device", "cpu", *short]) == 0
    other = ["run", "--settings", str(tmp_path / "run"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    capsys.readouterr()
    assert cli.main([*other, "--data.classes", "2", "7"]) == 1
    assert "other settings (data.classes: ['7', '2', '5'] → ['2', '7'])" in capsys.readouterr().err


def test_the_classes_of_the_imagenet_subsets():
    """The synsets in the documentation are those with the numbers of MTT's public code."""
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    numbers = {
        "ImageNette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
        "ImageWoof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],
        "ImageMeow": [281, 282, 283, 284, 285, 291, 292, 290, 289, 287],
        "ImageSquawk": [84, 130, 88, 144, 145, 22, 96, 9, 100, 89],
        "ImageFruit": [953, 954, 949, 950, 951, 957, 952, 945, 943, 948],
        "ImageYellow": [309, 986, 954, 951, 987, 779, 599, 291, 72, 11],
    }
    rows = re.findall(r"^\| (Image\w+) \|.*\| `([n\d ]+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: synsets.split() for name, synsets in rows} == {
        name: [info.index_to_label_name(number) for number in found] for name, found in numbers.items()
    }


# --- 128x128 pixels ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Six images of 150x140 pixels, and the data set of two of its three classes at 128x128."""

    def content(label, index):
        return encoded(pattern(10 * label + index, 140, 150))

    root = write_set(
        tmp_path_factory.mktemp("large") / "s", content, ("a", "b", "c"), counts=(("train", 3), ("val", 1))
    )
    data = load(f"imagefolder:{root}", resize=128, classes=("a", "c"))
    assert data.image_size == (128, 128) and len(data.train) == 6
    return data


@pytest.mark.parametrize(("name", "features"), [("ConvNetD5W4", 4 * 16), ("ConvNetD6W4", 4 * 4)])
def test_deep_convnets_take_large_images(large, name, features):
    """They train a step, by the fused rules; an unrolled step has autograd's gradient."""
    context = Context(large)
    network = context.network(name, "student")
    images = large.normalize(large.train.images[:4])
    assert models.embed(network, images).shape == (4, features) and network(images).shape == (4, 2)
    assert explain_engine(network, images).name == "fused"
    before = flat.flatten(network.parameters()).clone()
    train_on_real(network, context, Training(epochs=1, batch=6), "none", context.generator("order"), lambda epoch: None)
    assert not torch.equal(flat.flatten(network.parameters()), before)
    found = []
    for engine in ("fused", "autograd"):
        model, start = network.double(), before.double()
        x = images.double().requires_grad_()
        labels, batches = large.train.labels[:4], [torch.arange(4)]
        end = unrolled_sgd(model, start, x, labels, batches, torch.tensor(0.01).double(), engine=engine)
        (gradient,) = torch.autograd.grad(end.square().sum(), x)
        found.append((end.detach(), gradient))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
