"""Sets in the files of public code, and back."""

import io
import os
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MODEL, random_set
from PIL import Image

from selmatch_ext import cli
from selmatch_ext.data import exchange
from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.whitening import fit_whitening

DIGITS = ("--data.dataset", "digits")
DATASET = (*DIGITS, "--normalization", "dataset")


@pytest.fixture
def learned(digits):
    """Images that are no pixels any more, of which some leave the range of pixels."""
    real = random_set(digits, 2)
    noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) % 3 > 0
    return replace(real, images=real.images + noise, distilled=mask, lr=0.0123, method="mtt", settings={"a": [1]})


def soft(subset):
    logits = torch.randn(len(subset), 10, generator=torch.Generator().manual_seed(2))
    return replace(subset, labels=logits.softmax(1))


def run(*words):
    """The last line of standard error of a command that failed; None of one that did not."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", said := io.StringIO())
        status = cli.main([str(word) for word in words])
    assert (status == 0) == (said.getvalue() == "")
    return None if status == 0 else said.getvalue().splitlines()[-1]


def exported(subset, tmp_path, form, *options):
    subset.save(tmp_path / "ours.safetensors")
    out = tmp_path / {"npz": "set.npz", "res": "res_DM_digits_ConvNet_2ipc.pt"}.get(form, form)
    assert run("export", tmp_path / "ours.safetensors", "--format", form, "--out", out, *options) is None
    return out


def imported(path, tmp_path, *options):
    out = tmp_path / "back.safetensors"
    assert run("import", path, "--out", out, *options) is None
    return DistilledSet.load(out)


def refused(path, tmp_path, *options):
    before = sorted(tmp_path.rglob("*"))
    said = run("import", path, "--out", tmp_path / "new.safetensors", *options)
    assert said is not None and sorted(tmp_path.rglob("*")) == before, said
    return said


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


@pytest.fixture
def public(learned, tmp_path):
    """MTT's two files."""
    (tmp_path / "mtt").mkdir()
    torch.save(learned.images, tmp_path / "mtt" / "images_100.pt")
    torch.save(learned.labels, tmp_path / "mtt" / "labels_100.pt")
    return tmp_path / "mtt" / "images_100.pt"


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
    other = (
        public.with_name("images_zca_100.pt").rename(public.with_name("x.pt")) if False else public.with_name("x.pt")
    )
    public.rename(other)
    assert "add --labels" in refused(other, tmp_path, *DATASET)
    back = imported(other, tmp_path, *DATASET, "--labels", public.with_name("labels_100.pt"))
    assert torch.equal(back.images, learned.images) and torch.equal(back.labels, learned.labels)


# --- what cannot be read ----------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def broken(images, labels):
    return [
        (images.double(), labels, "images is torch.float64; it must be torch.float32"),
        (images.half(), labels, "images is torch.float16"),
        (images[0], labels, r"images has shape \(1, 8, 8\); those of digits are \(n, 1, 8, 8\)"),
        (images[:, :, :7], labels, r"images has shape \(20, 1, 7, 8\)"),
        (images[:0], labels, r"images has shape \(0, 1, 8, 8\)"),
        (images.masked_fill(images > 1, float("nan")), labels, "images hold NaN or infinite values"),
        (images, labels[:19], "labels has 19 entries for 20 images"),
        (images, labels.int(), "labels is torch.int32; it must be a torch.int64 tensor"),
        (images, labels.float(), "does not say what they are; add --soft-labels"),
        (images, labels + 1, "labels holds values from 1 to 10; allowed are 0 to 9"),
        (images, labels - 1, "labels holds values from -1 to 8"),
        (images, [0] * 20, "labels is a list of 20; it must be a tensor"),
        ({"images": images}, labels, "holds a dict of 1; it must hold a tensor of images, or a dict with the key data"),
        ([images, labels], labels, "holds a list of 2; it must hold a tensor of images"),
        (images.to_sparse(), labels, "sparse"),
        (torch.zeros(1).expand(20, 1, 8, 8), labels, "images has shape .*, more than the file holds"),
        (torch.nn.Conv2d(1, 1, 1), labels, "it names 'torch.nn.modules.conv.Conv2d', which unpickling would call"),
        (Code(), labels, "it names '.*mkdir', which unpickling would call and which may run any code"),
        (images, Code(), "labels_100.pt .*it names '.*mkdir'"),
    ]


@pytest.mark.parametrize("case", range(19))
def test_tensors_that_are_no_set(public, learned, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels, message = broken(learned.images, learned.labels)[case]
    torch.save(images, public)
    torch.save(labels, public.with_name("labels_100.pt"))
    said = refused(public, tmp_path, *DATASET)
    assert re.search(message, said) and str(public.parent) in said


def test_every_case_is_tried(learned):
    assert len(broken(learned.images, learned.labels)) == 19


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.full((20, 10), 0.2), "probabilities", "soft labels are not probabilities"),
        (torch.full((20, 9), 1 / 9), "probabilities", r"soft labels have shape \(20, 9\); they must be \(20, 10\)"),
        (torch.full((20, 9), 1.0), "logits", r"soft labels have shape \(20, 9\)"),
        (torch.full((20,), 1.0), "logits", r"soft labels have shape \(20,\)"),
        (torch.full((20, 10), float("inf")), "logits", "soft labels hold NaN"),
    ],
)
def test_soft_labels_that_do_not_fit(public, tmp_path, labels, options, message):
    torch.save(labels, public.with_name("labels_100.pt"))
    assert re.search(message, refused(public, tmp_path, *DATASET, "--soft-labels", options))


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("0.1", "the learning rate is a str; it must be one floating-point number"),
        (torch.ones(2), "the learning rate is a Tensor"),
        (-0.5, "lr is -0.5; it must be a finite number above 0"),
        (float("nan"), "lr is nan"),
    ],
)
def test_rates(public, tmp_path, rate, message):
    torch.save(rate, public.with_name("lr_100.pt"))
    assert message in refused(public, tmp_path, *DATASET)


def test_a_rate_may_be_a_tensor(public, tmp_path):
    torch.save(torch.tensor([0.25]), public.with_name("lr_100.pt"))
    assert imported(public, tmp_path, *DATASET).lr == 0.25


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.97])
def test_truncated_files(learned, public, tmp_path, kept):
    npz = exported(learned, tmp_path, "npz")
    for path, options in ((public, DATASET), (npz, ())):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        said = refused(path, tmp_path, *options)
        assert re.search("is truncated or is no distilled set|is no set of images|has no array called", said), said


def test_damaged_bytes(learned, tmp_path):
    for form in ("npz", "pt"):
        path = exported(learned, tmp_path, form)
        changed = path if form == "npz" else path / "images_best.pt"
        content = bytearray(changed.read_bytes())
        content[content.index(learned.images.numpy().tobytes()[:64]) + 5] ^= 1
        changed.write_bytes(content)
        assert "checksum" in (said := refused(path, tmp_path)).lower() or "CRC" in said


# --- one file of DC, DSA and DM ---------------------------------------------------------------------------------------


def res(path, data, accuracies=None, **options):
    torch.save({"data": data, "accs_all_exps": accuracies or {}}, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("numpy_1", [True, False])
def test_accuracies_of_numpy_in_a_file_are_skipped(learned, tmp_path, zipped, numpy_1):
    """The public code's accuracies are numbers of NumPy, of version 1 or 2, and its files older or newer ones."""
    accuracies = {"ConvNet": [np.float64(0.1), np.float64(0.2)]}
    path = res(
        tmp_path / "res.pt", [[learned.images, learned.labels]], accuracies, _use_new_zipfile_serialization=zipped
    )
    if numpy_1:
        rewritten(path, zipped, b"numpy._core.multiarray", b"numpy.core.multiarray")
    back = imported(path, tmp_path, *DATASET)
    assert torch.equal(back.images, learned.images) and torch.equal(back.labels, learned.labels)


def rewritten(path, zipped, old, new):
    """Replaces what the pickle in a file of torch.save names."""
    if not zipped:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        members = [(m, archive.read(m)) for m in archive.infolist()]
    assert any(old in content for _, content in members)
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members:
            archive.writestr(member.filename, content.replace(old, new))


def test_one_of_several_sets(learned, tmp_path):
    other = learned.images + 1
    path = res(tmp_path / "res.pt", [[learned.images, learned.labels], [other, learned.labels]])
    assert "holds 2 sets; choose one by --number, from 0 to 1" in refused(path, tmp_path, *DATASET)
    assert torch.equal(imported(path, tmp_path, *DATASET, "--number", "1").images, other)
    assert "--number is 2; " in refused(path, tmp_path, *DATASET, "--number", "2")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is a list of 0; it must be a list of sets"),
        ({}, "data is a dict of 0; it must be a list of sets"),
        ([[1]], r"data\[0\] is a list of 1; it must be images and labels"),
        ([[1, 2]], "images is a int; it must be a tensor"),
        ([[np.float64(1), 2]], "images is a Skipped; it must be a tensor"),
    ],
)
def test_files_of_dc_that_are_no_sets(tmp_path, data, message):
    assert re.search(message, refused(res(tmp_path / "res.pt", data), tmp_path, *DATASET))


def test_what_a_format_cannot_hold_is_refused(learned, tmp_path):
    weighted = replace(learned, weights=torch.ones(20))
    weighted.save(tmp_path / "set.safetensors")
    command = ("export", tmp_path / "set.safetensors", "--out", tmp_path / "out")
    assert "the set has weights, for which the format res has no place" in run(*command, "--format", "res")
    for form in ("folder", "npz", "pt"):
        assert "soft_labels is for" in run(*command, "--format", form, "--soft-labels", "logits")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.safetensors"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "is not an empty folder" in run(*command, "--format", "pt")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


# --- arrays of NumPy --------------------------------------------------------------------------------------------------


def test_arrays_of_others(learned, tmp_path):
    path, images, labels = tmp_path / "set.npz", learned.images.numpy(), learned.labels.numpy()
    np.savez_compressed(path, images=images.astype(">f4"), labels=labels, lr=np.float64(0.5), more=np.ones(3))
    back = imported(path, tmp_path, *DATASET)
    assert torch.equal(back.images, learned.images) and torch.equal(back.labels, learned.labels) and back.lr == 0.5
    for arrays, message in (
        ({"images": images}, "has no array called labels"),
        ({"x": images}, "has no array called images or labels"),
        ({"images": images, "labels": np.array(["a"] * 20)}, "labels is <U1; it must hold numbers"),
        ({"images": images, "labels": np.array([None] * 20)}, "labels holds Python objects, which would have to be"),
        ({"images": images.astype(complex), "labels": labels}, "images is complex128; it must hold numbers"),
        ({"images": images, "labels": labels, "lr": np.ones(3)}, "the learning rate is a Tensor"),
    ):
        np.savez(path, **arrays)
        assert message in refused(path, tmp_path, *DATASET)
    np.savez_compressed(path, images=np.zeros((2000, 1, 64, 64), np.float32), labels=labels)
    assert "at most are needed" in refused(path, tmp_path, *DATASET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"described": np.array("[]")}, "described is .*; it must be an object"),
        ({"described": np.array("{")}, "described is no valid JSON"),
        ({"described": np.array("{}")}, "lacks mean, std, class_names"),
        ({"distilled": None}, "lacks distilled"),
        ({"distilled": np.ones(20)}, "distilled is torch.float64"),
        ({"lr": np.ones(1)}, "lr is torch.float64 of shape"),
    ],
)
def test_damaged_files_of_ours(learned, tmp_path, changes, message):
    path = exported(learned, tmp_path, "npz")
    with np.load(path) as found:
        arrays = {**found, **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    assert re.search(message, refused(path, tmp_path))


def test_a_set_of_ours_says_all_itself(learned, tmp_path):
    path = exported(learned, tmp_path, "npz")
    for options in (DIGITS, ("--normalization", "dataset"), ("--lr", "0.1")):
        assert "is a set of selmatch, which says all of itself" in refused(path, tmp_path, *options)
    (tmp_path / "empty").mkdir()
    assert "holds neither images_best.pt nor images" in refused(tmp_path / "empty", tmp_path, *DIGITS)
    assert "does not exist" in refused(tmp_path / "none", tmp_path, *DIGITS)


def test_damaged_weights(learned, digits, tmp_path):
    folder = exported(replace(learned, weights=torch.ones(20)), tmp_path, "folder")
    lines = (folder / "weights.csv").read_text().splitlines()
    (folder / "weights.csv").write_text("\n".join(lines[:-1]))
    assert f"has no weight of {lines[-1].partition(',')[0]}" in refused(folder, tmp_path, *DIGITS)
    (folder / "weights.csv").write_text("\n".join([*lines[:-1], "a,b,c"]))
    assert "weights.csv is damaged" in refused(folder, tmp_path, *DIGITS)


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
