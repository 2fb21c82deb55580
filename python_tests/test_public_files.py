"""Files of sets that are damaged, of other kinds, or hold what is not read: one line each, and nothing is written."""

import os
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from exchanged import DATASET, DIGITS, exported, imported, refused, run, soft

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
        ({"images": images, "labels": np.array(["a"] * 20)}, "labels is <U1; it must hold numbers of at most 64 bits"),
        ({"images": images, "labels": np.array([None] * 20)}, "labels holds Python objects, which would have to be"),
        (
            {"images": images.astype(complex), "labels": labels},
            "images is complex128; it must hold numbers of at most 64 bits",
        ),
        ({"images": images.astype(np.longdouble), "labels": labels}, "images is "),
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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(20), r"soft labels have shape \(20,\)"),
        (torch.full((20, 10), -1), "labels has shape"),
        (torch.tensor(1.0), "soft labels have shape"),
    ],
)
def test_labels_that_are_no_logits(learned, tmp_path, labels, message):
    folder = exported(soft(learned), tmp_path, "pt", "--soft-labels", "logits")
    torch.save(labels, folder / "labels_best.pt")
    assert re.search(message, refused(folder, tmp_path))


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
