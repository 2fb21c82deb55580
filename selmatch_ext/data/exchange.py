"""Small sets in the files of public code: tensors of torch.save, arrays of NumPy, folders of PNGs.

What those formats have no place for, the mean and the names of the classes for example, goes into an array file of ours
beside the tensors, so that a set comes back as it was.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from selmatch_ext import strict_json
from selmatch_ext.arrays import open_arrays
from selmatch_ext.data.decoding import extensions
from selmatch_ext.data.distilled import DESCRIBED, DistilledSet, check_new_folder
from selmatch_ext.data.folders import decode_split
from selmatch_ext.data.names import readable, shortened
from selmatch_ext.data.torch_files import describe_value, is_list, read_torch_file
from selmatch_ext.data.tree import FolderTree, list_split
from selmatch_ext.files import atomic_write

Format = Literal["folder", "pt", "res", "npz"]
NOTE = "set.npz"
TEXT = "described"  # the array with a set's description as JSON
PUBLIC = ("images", "labels", "lr")
UNNEEDED = (*PUBLIC, "distilled", "indices", "zca_mean", "zca_transform")  # to train on the images as they are
COMPRESSED = 200  # times its size in the file, the most that an array may have
OURS = re.compile(r"(\d+)_(distilled|selected)\.png")
SMALLEST = 1e-38  # in place of a probability of 0, of which there is no logarithm


@dataclass
class Given:
    """What a public file holds, as it is there. images: (n, C, H, W), uint8 pixels or float32. labels: (n,) int64, or
    (n, K) float. folders: the names that labels of a folder count through, else None."""

    images: Tensor
    labels: Tensor
    lr: float | None = None
    folders: list[str] | None = None
    distilled: Tensor | None = None
    weights: Tensor | None = None


def export(subset: DistilledSet, out: Path, form: Format, logits: bool = False) -> None:
    """Writes a set to `out`, all or nothing.

    form: folder, see `DistilledSet.export`; pt, a folder with images_best.pt, labels_best.pt and lr_best.pt (where a
    rate was learned), as MTT and DATM write them, and NOTE; res, one file as DC, DSA and DM write it; npz, one file of
    NumPy. logits: soft labels are written as the logarithms of the probabilities, as DATM's code expects.

    Raises ValueError where the format has no place for what training on the set needs, FileExistsError for a folder
    that is not empty, and OSError where `out` cannot be written."""
    if logits and (form not in ("pt", "res") or not subset.labels.is_floating_point()):
        raise ValueError("soft_labels is for the formats pt and res and for a set with soft labels")
    if form == "folder":
        return subset.export(out)
    tensors, described = subset.parts()
    labels = tensors["labels"].clamp(min=SMALLEST).log() if logits else tensors["labels"]
    public = {"images": tensors["images"].clone(), "labels": labels.clone()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in PUBLIC}
    if form == "res":
        lost = [name for name in rest if name not in UNNEEDED]
        if lost:
            raise ValueError(f"the set has {', '.join(lost)}, for which the format res has no place; use pt or npz")
        with atomic_write(out) as temporary:
            torch.save({"data": [[public["images"], public["labels"]]], "accs_all_exps": {}}, temporary)
    elif form == "npz":
        with atomic_write(out) as temporary:
            _write_arrays(temporary, tensors, described)
    else:
        check_new_folder(out)
        with atomic_write(out) as temporary:
            temporary.mkdir()
            for name, value in (public | {"lr": subset.lr}).items():
                if value is not None:
                    torch.save(value, temporary / f"{name}_best.pt")
            _write_arrays(temporary / NOTE, rest, described | {"logits": logits})


def _write_arrays(path: Path, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays, **{TEXT: np.array(json.dumps(described))})


def read(path: Path, labels: Path | None = None, number: int | None = None) -> DistilledSet | Given:
    """What `export` or public code wrote: a folder with images_best.pt or with images in folders of classes, or a file
    of NumPy (.npz) or of torch.save. A set of ours comes back whole.

    labels: the file of the labels, where it is not called labels_X.pt beside images_X.pt. number: which set, where a
    file of DC, DSA or DM holds several.

    Nothing is unpickled. Raises FileNotFoundError, OSError, and ValueError naming the file that is truncated, damaged,
    or not of these kinds."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir() and not (path / "images_best.pt").exists():
        _refuse_unused(path, labels=labels, number=number)
        return _read_folder(path)
    path = path / "images_best.pt" if path.is_dir() else path
    if path.suffix == ".npz":
        _refuse_unused(path, labels=labels, number=number)
        return _read_npz(path)
    value = read_torch_file(path, "distilled set")[0]
    if isinstance(value, dict) and "data" in value:
        _refuse_unused(path, labels=labels)
        return _of_res(value["data"], number, path)
    _refuse_unused(path, number=number)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{path} holds {describe_value(value)}; it must hold a tensor of images, or a dict with the key data"
        )
    return _with_labels(_dense(value, "images", path), path, labels)


def _refuse_unused(path: Path, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name} is {value}, for which {path} has no use")


def _with_labels(images: Tensor, path: Path, labels: Path | None) -> DistilledSet | Given:
    """A set of MTT or DATM: each tensor in a file of its own."""
    end = path.name.removeprefix("images")
    if labels is None and end == path.name:
        raise ValueError(
            f"{path} is not called images_….pt, so that it is not known where its labels are; add --labels"
        )
    targets = path.with_name(f"labels{end}") if labels is None else labels
    found = _dense(read_torch_file(targets, "file of labels")[0], "labels", targets)
    rate = path.with_name(f"lr{end}")
    lr = _rate(read_torch_file(rate, "file of a learning rate")[0], rate) if rate.exists() else None
    note = path.with_name(NOTE)
    if path.name != "images_best.pt" or not note.exists():
        return Given(images, found, lr)
    tensors, described = _read_arrays(note)
    if described is None:
        raise ValueError(f"{note} is damaged: it has no array called {TEXT}")
    if described.get("logits") and found.is_floating_point() and found.ndim == 2:
        found = found.softmax(1)
    given = {"images": images, "labels": found}
    return _whole(tensors | given, described, note, None if lr is None else torch.tensor(lr, dtype=torch.float64))


def _read_npz(path: Path) -> DistilledSet | Given:
    tensors, described = _read_arrays(path)
    missing = [name for name in ("images", "labels") if name not in tensors]
    if missing:
        raise ValueError(f"{path} has no array called {' or '.join(missing)}")
    if described is not None:
        return _whole(tensors, described, path, tensors.get("lr"))
    return Given(tensors["images"], tensors["labels"], _rate(tensors["lr"], path) if "lr" in tensors else None)


def _read_arrays(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(the arrays of a set, their description where the file is ours)."""
    most = COMPRESSED * path.stat().st_size
    with open_arrays(path, "set of images") as arrays:
        ours = TEXT in arrays.names
        wanted = [name for name in arrays.names if name != TEXT and (ours or name in PUBLIC)]
        found = {name: arrays.read(name, most) for name in wanted}
        for name, array in found.items():
            if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
                raise ValueError(f"{name} is {array.dtype}; it must hold numbers of at most 64 bits")
        described = None
        if ours:
            described = strict_json.mapping(strict_json.parse(arrays.text(TEXT), TEXT), TEXT)
    return {n: torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for n, a in found.items()}, described


def _whole(tensors: dict[str, Tensor], described: dict[str, Any], path: Path, lr: Tensor | None) -> DistilledSet:
    missing = [name for name in ("distilled", "indices") if name not in tensors]
    missing += [name for name in DESCRIBED if name not in described]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    try:
        return DistilledSet.of_parts(tensors if lr is None else tensors | {"lr": lr}, described, str(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _of_res(sets: Any, number: int | None, path: Path) -> Given:
    """A set of DC, DSA or DM, whose files hold one of each experiment."""
    if not is_list(sets):
        raise ValueError(f"{path}: data is {describe_value(sets)}; it must be a list of sets")
    if number is None and len(sets) > 1:
        raise ValueError(f"{path} holds {len(sets)} sets; choose one by --number, from 0 to {len(sets) - 1}")
    if number is not None and number >= len(sets):
        raise ValueError(f"--number is {number}; {path} holds {len(sets)} sets, counted from 0")
    chosen = sets[number or 0]
    if not is_list(chosen) or len(chosen) != 2:
        raise ValueError(f"{path}: data[{number or 0}] is {describe_value(chosen)}; it must be images and labels")
    return Given(_dense(chosen[0], "images", path), _dense(chosen[1], "labels", path))


def _dense(value: Any, name: str, path: Path) -> Tensor:
    """A copy of a tensor from a file: what was read may be mapped to it. ValueError for anything else."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: {name} is {describe_value(value)}; it must be a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        raise ValueError(f"{path}: {name} is {value.dtype}, {value.layout}, on {value.device}; it must be dense")
    if value.numel() * value.element_size() > path.stat().st_size:
        raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, more than the file holds")
    return value.detach().clone(memory_format=torch.contiguous_format)


def _rate(value: Any, path: Path) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        value = value.item()
    if not isinstance(value, float):
        raise ValueError(f"{path}: the learning rate is {describe_value(value)}; it must be one floating-point number")
    return value


def _read_folder(path: Path) -> Given:
    """Images in folders of classes, in the order of our numbers, or else of class and file name."""
    listing = list_split(FolderTree(path), "", None, extensions())
    if not listing.files:
        raise ValueError(f"{path} holds neither images_best.pt nor images in folders of classes")
    paths, folders = sorted(listing.files, key=lambda name: name.split("/")), sorted(listing.classes)
    ours = [OURS.fullmatch(name.rpartition("/")[2]) for name in paths]
    numbers = {int(match[1]): i for i, match in enumerate(ours) if match}
    learned = torch.ones(len(paths), dtype=torch.bool)
    if len(numbers) == len(paths):
        order = [numbers[number] for number in sorted(numbers)]
        paths = [paths[i] for i in order]
        learned = torch.tensor([match is not None and match[2] == "distilled" for match in (ours[i] for i in order)])
    classes = [name.partition("/")[0] for name in paths]
    images = decode_split(readable(path.name), paths, classes, listing)
    labels = torch.tensor([folders.index(name) for name in classes])
    return Given(images, labels, None, folders, learned, _read_weights(path / "weights.csv", paths))


def _read_weights(path: Path, names: list[str]) -> Tensor | None:
    """The weights that `DistilledSet.export` writes beside the folders, in the order of the files `names`."""
    if not path.exists():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            found = {name: float(weight) for name, weight in list(csv.reader(file))[1:]}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: a line is not a file and its weight") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} has no weight of {shortened(missing)}")
    return torch.tensor([found[name] for name in names], dtype=torch.float32)
