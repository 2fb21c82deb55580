"""Sets in the files of public code, and back."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MODEL, random_set
from exchanged import DATASET, DIGITS, exported, imported, refused, soft
from PIL import Image

from selmatch_ext import cli
from selmatch_ext.data import exchange
from selmatch_ext.data.distilled import Schedule
from selmatch_ext.data.whitening import fit_whitening

# --- ours and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npz", "pt"])
@pytest.mark.parametrize("kind", ["hard", "soft", "no rate", "weights", "whitened", "schedule"])
def test_a_set_comes_back_whole(learned, tmp_path, form, kind):
    schedule = Schedule(torch.tensor([0.1, 0.2]), torch.arange(20).view(2, 10), MODEL, torch.ones(1, 7))
    made = {
        "hard": lambda: learned,
        "soft": lambda: soft(learned),
        "no rate": lambda: replace(learned, lr=None),
        "weights": lambda: replace(learned, weights=torch.arange(20.0)),
        "whitened": lambda: replace(learned, whitening=fit_whitening(learned.images)),
        "schedule": lambda: replace(learned, schedule=schedule),
    }[kind]()
    back = imported(exported(made, tmp_path, form), tmp_path)
    assert back.digest() == made.digest() and back.lr == made.lr and torch.equal(back.indices, made.indices)
    assert (back.method, back.settings, back.class_names) == (made.method, made.settings, made.class_names)
    assert kind != "schedule" or back.schedule.model == MODEL


def test_files_are_those_of_the_public_code(learned, tmp_path):
    """Read as MTT's, DATM's and DC's code reads them."""
    folder = exported(soft(learned), tmp_path, "pt")
    assert {p.name for p in folder.iterdir()} == {"images_best.pt", "labels_best.pt", "lr_best.pt", "set.npz"}
    read = {name: torch.load(folder / f"{name}_best.pt", weights_only=True) for name in ("images", "labels", "lr")}
    assert torch.equal(read["images"], learned.images) and torch.equal(read["labels"], soft(learned).labels)
    assert isinstance(read["lr"], float) and read["lr"] == 0.0123
    content = torch.load(exported(learned, tmp_path, "res"), weights_only=True)
    ((images, labels),) = content["data"]
    assert torch.equal(images, learned.images) and torch.equal(labels, learned.labels) and labels.dtype == torch.int64
    assert content["accs_all_exps"] == {}
    with np.load(exported(learned, tmp_path, "npz")) as arrays:
        assert np.array_equal(arrays["images"], learned.images.numpy()) and arrays["lr"] == 0.0123


def test_views_are_written_alone(learned, tmp_path):
    """torch.save writes the whole storage of a view."""
    large = torch.cat([learned.images] * 50)
    folder = exported(replace(learned, images=large[:20]), tmp_path, "pt")
    assert (folder / "images_best.pt").stat().st_size < learned.images.numel() * 4 + 5000


def test_logits(learned, tmp_path):
    """As DATM's code takes them: softmax of what is in the file."""
    made = soft(learned)
    made.labels[0] = torch.eye(10)[3]
    folder = exported(made, tmp_path, "pt", "--soft-labels", "logits")
    found = torch.load(folder / "labels_best.pt", weights_only=True)
    torch.testing.assert_close(found.double().softmax(1).float(), made.labels, rtol=1e-5, atol=1e-6)
    assert found.isfinite().all() and found.max() <= 0 and found.min() < -50
    torch.testing.assert_close(imported(folder, tmp_path).labels, made.labels, rtol=1e-5, atol=1e-6)
    (folder / "set.npz").unlink()
    back = imported(folder, tmp_path, *DATASET, "--soft-labels", "logits")
    torch.testing.assert_close(back.labels, made.labels, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["pt", "res"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_from_public_files(learned, digits, tmp_path, form, labels):
    """What public code's files hold comes back exactly, and the rest is asked for."""
    made = soft(learned) if labels == "soft" else learned
    path = exported(made, tmp_path, form)
    if form == "pt":
        (path / "set.npz").unlink()
    options = (*DATASET, "--seed", "3", *(("--soft-labels", "probabilities") if labels == "soft" else ()))
    back = imported(path, tmp_path, *options)
    assert torch.equal(back.images, made.images) and torch.equal(back.labels, made.labels) and back.distilled.all()
    assert back.lr == (0.0123 if form == "pt" else None) and back.method == "imported"
    assert torch.equal(back.mean, digits.mean) and torch.equal(back.std, digits.std)
    assert back.class_names == digits.class_names and back.whitening is None
    saved = back.settings
    assert (saved["data"]["dataset"], saved["seed"], saved["imported"]) == ("digits", 3, path.name)
    assert imported(path, tmp_path, *options, "--lr", "0.5").lr == 0.5


def test_a_folder_of_images_to_eight_bits(learned, digits, tmp_path):
    made = replace(learned, weights=torch.arange(20) / 8)
    pixels = (made.denormalized() * 255).round().to(torch.uint8)
    back = imported(exported(made, tmp_path, "folder"), tmp_path, *DIGITS)
    assert torch.equal(back.images, digits.normalize(pixels)) and torch.equal(back.labels, made.labels)
    assert torch.equal(back.distilled, made.distilled) and torch.equal(back.weights, made.weights)


def folder_of(root, names, mode="L"):
    """Three images a class; the value of each pixel is 10 times the number in its name plus that in the class's."""
    for name in names:
        (root / name).mkdir(parents=True)
        for k in (2, 0, 1):
            value = 10 * k + int(re.sub(r"\D", "", name) or 0)
            Image.new(mode, (8, 8), value if mode == "L" else (value,) * 3).save(root / name / f"{k:03d}.png")
    return root


@pytest.mark.parametrize(
    ("names", "labels"), [(["0", "3", "9"], [0, 3, 9]), (["03", "001"], [1, 3]), (["9", "10"], None), (["cat"], None)]
)
def test_folders_of_others(digits, tmp_path, names, labels):
    """Classes by name or number, in the order of class, then file."""
    folder = folder_of(tmp_path / "set", names)
    if labels is None:
        shown = ", ".join(sorted(names))
        said = refused(folder, tmp_path, *DIGITS)
        assert said.endswith(f"its folders are {shown}, which are not the classes of digits: 0, 1, 2 and 7 more")
        return
    back = imported(folder, tmp_path, *DIGITS)
    assert back.labels.tolist() == [label for label in labels for _ in range(3)]
    assert back.distilled.all() and back.weights is None
    values = (back.denormalized() * 255).round()[:, 0, 0, 0].tolist()
    assert values == [10 * k + label for label in labels for k in range(3)]


def test_gray_pictures_of_a_set_in_color(tmp_path):
    for part in ("train", "test"):
        folder_of(tmp_path / "data" / part, ["1", "2"], "RGB")
        Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "data" / part / "1" / "color.png")
    data = ("--data.dataset", f"imagefolder:{tmp_path / 'data'}")
    back = imported(folder_of(tmp_path / "set", ["1", "2"]), tmp_path, *data)
    pixels = (back.denormalized() * 255).round()
    assert pixels.shape == (6, 3, 8, 8) and pixels[:, :, 0, 0].tolist() == [[v] * 3 for v in (1, 11, 21, 2, 12, 22)]
    said = refused(tmp_path / "data" / "train", tmp_path, *DIGITS)
    assert "images has shape (7, 3, 8, 8); those of digits are (n, 1, 8, 8)" in said


# --- normalization ----------------------------------------------------------------------------------------------------


def test_normalization_is_not_guessed(public, tmp_path):
    said = refused(public, tmp_path, *DIGITS)
    assert "does not say how its images are normalized" in said and "--mean and --std" in said
    assert refused(public, tmp_path, "--normalization", "dataset").endswith(
        "does not say of which data set it is; name it by --data.dataset"
    )


def test_numbers_that_were_used(public, learned, tmp_path):
    back = imported(public, tmp_path, *DIGITS, "--mean", "0.25", "--std", "0.5")
    assert torch.equal(back.images, learned.images) and back.mean.tolist() == [0.25] and back.std.tolist() == [0.5]


def test_pixels(learned, digits, tmp_path, public):
    pixels = random_set(digits, 2).denormalized()
    torch.save(pixels, public)
    back = imported(public, tmp_path, *DIGITS, "--normalization", "pixels")
    torch.testing.assert_close(back.denormalized(), pixels, rtol=0, atol=1e-6)
    torch.testing.assert_close(back.images, random_set(digits, 2).images, rtol=0, atol=1e-5)
    whitened = imported(public, tmp_path, *DIGITS, "--data.zca", "--normalization", "pixels")
    torch.testing.assert_close(whitened.denormalized(), pixels, rtol=0, atol=1e-4)
    assert whitened.whitening is not None
    torch.save((pixels * 255).round().to(torch.uint8), public)
    assert torch.equal(imported(public, tmp_path, *DIGITS).images, random_set(digits, 2).images)


def test_zca_as_mtt_whitens(digits, tmp_path, public):
    """Independently, by singular values: x -> (x - m) U diag((s + 0.1)^-1/2) U^T of pixels from 0 to 1."""
    pixels = digits.train.images.double().flatten(1) / 255
    mean = pixels.mean(0)
    _, singular, turned = torch.linalg.svd(pixels - mean, full_matrices=False)
    scale = (singular.square() / (len(pixels) - 1) + 0.1).rsqrt()
    chosen = random_set(digits, 2)
    real = digits.train.images[chosen.indices].double() / 255
    whitened = (real.flatten(1) - mean) @ (turned.T * scale) @ turned
    torch.save(whitened.float().view(20, 1, 8, 8), public)
    back = imported(public, tmp_path, *DIGITS, "--normalization", "zca")
    assert torch.equal(back.images.flatten(1), whitened.float())
    torch.testing.assert_close(back.denormalized(), real.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--normalization", "pixels"], "pixels, which are from 0 to 1; images holds -"),
        (["--mean", "0.1"], "mean and std must have 1 numbers each"),
        (["--mean", "0.1", "0.1", "--std", "1", "1"], "mean and std must have 1 numbers each"),
        (["--mean", "0.1", "--std", "1", "--normalization", "dataset"], "without normalization"),
        (["--normalization", "dataset", "--soft-labels", "logits"], "the file holds numbers of classes"),
        (["--normalization", "dataset", "--number", "0"], "--number is 0, for which"),
        (["--normalization", "dataset", "--labels", "none.pt"], "none.pt does not exist"),
    ],
)
def test_options_that_do_not_fit(public, tmp_path, options, message):
    assert message in refused(public, tmp_path, *DIGITS, *options)


def test_labels_under_another_name(public, learned, tmp_path):
    other = public.rename(public.with_name("x.pt"))
    assert "add --labels" in refused(other, tmp_path, *DATASET)
    back = imported(other, tmp_path, *DATASET, "--labels", public.with_name("labels_100.pt"))
    assert torch.equal(back.images, learned.images) and torch.equal(back.labels, learned.labels)


# --- use --------------------------------------------------------------------------------------------------------------


def test_an_imported_set_is_evaluated(learned, public, tmp_path, capsys):
    imported(public, tmp_path, *DATASET)
    short = ["--evaluation.networks", "1", "--evaluation.model", MODEL, "--evaluation.training.epochs", "1"]
    assert cli.main(["evaluate", str(tmp_path / "back.safetensors"), "--device", "cpu", *short]) == 0
    assert "% over 1 networks" in capsys.readouterr().out


def test_an_interrupted_export_leaves_nothing(learned, tmp_path, monkeypatch):
    def fail(*rest, **options):
        raise OSError(28, "No space left on device")

    for form, name in (("pt", "torch.save"), ("npz", "numpy.savez"), ("res", "torch.save")):
        with monkeypatch.context() as patched:
            patched.setattr(name, fail)
            with pytest.raises(OSError, match="No space left"):
                exchange.export(learned, tmp_path / "out", form)
        assert list(tmp_path.iterdir()) == []
