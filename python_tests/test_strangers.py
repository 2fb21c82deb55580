"""Files from strangers take no memory that they do not justify, and errors name what is wrong with them."""

import builtins
import json
import os
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from strangers import Bomb, digits_set, toy

from selmatch_ext import files, strict_json
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.trajectories import ExpertStore, import_replay_buffer
from selmatch_ext.selection.scores import describe_scores, load_scores

# declared sizes


def header(shape, dtype="<f8"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("(5000000000000,)"), r"shape \(5000000000000,\)"),
        (header("(1201,)"), "scores declares 9608 bytes, 0 are there"),
        (header("(1201,)") + b"\0" * 9609, "scores declares 9608 bytes, 9609 are there"),
        (header("(-1,)"), "declares the shape"),
        (header("(" * 60 + "1" + ")" * 60), "no readable header|shape"),
        (header("(1201,)", "|O") + b"\0" * 9608, "dtype object"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{", "header of 2147483648 bytes"),
        (b"", "is no array of NumPy's format"),
    ],
)
def test_npy_headers(digits, tmp_path, content, message):
    (tmp_path / "s.npy").write_bytes(content)
    with pytest.raises(ValueError, match=f"s.npy is no score file .*({message})"):
        load_scores(tmp_path / "s.npy", digits.train.labels, digits.name)


def test_npz_members_are_not_unpacked_beyond_what_is_needed(digits, tmp_path):
    n, path = len(digits.train), tmp_path / "s.npz"
    for name, shape in (("scores", "(2000000000,)"), ("labels", "(2000000000,)")):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            if name == "labels":
                archive.writestr("scores.npy", header(f"({n},)") + b"\0" * 8 * n)
            archive.writestr(f"{name}.npy", header(shape, "<i8") + b"\0" * 10**7)
        with pytest.raises(
            ValueError, match=rf"s.npz is no score file .*{name} have dtype int64 and shape \(2000000000,\)"
        ):
            load_scores(path, digits.train.labels, digits.name)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scores.npy", header(f"({n},)") + b"\0" * 10**7)
    with pytest.raises(ValueError, match="scores declares 9608 bytes, 10000000 are there"):
        load_scores(path, digits.train.labels, digits.name)
    assert describe_scores(path) == (n, {})


def test_a_directory_that_hides_a_member(digits, tmp_path):
    """A comment's length in the directory of a .npz, one byte of it, takes the next entry for the comment."""
    n, path = len(digits.train), tmp_path / "s.npz"
    np.savez(path, scores=np.zeros(n), labels=np.zeros(n, dtype=np.int64))
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\x01\x02")
    content[first + 32] = content.index(b"PK\x05\x06") - content.index(b"PK\x01\x02", first + 4)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="s.npz is no score file .*its directory lists 1 members; its end says 2"):
        load_scores(path, digits.train.labels, digits.name)


@pytest.mark.parametrize(
    "std", [torch.ones(1, dtype=torch.cfloat), torch.zeros(1), torch.full((1,), torch.nan), torch.ones(2)]
)
def test_statistics_of_images_that_make_no_sense(digits, std):
    with pytest.raises(ValueError, match="digits: std is .*; it must be"):
        replace(digits, std=std)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<i2", ">u8", "<f2"])
def test_numbers_of_any_type_and_order_are_read(digits, tmp_path, dtype):
    scores = (np.arange(len(digits.train)) % 100).astype(dtype)
    np.save(tmp_path / "s.npy", scores)
    np.savez_compressed(tmp_path / "s.npz", scores=scores)
    for name in ("s.npy", "s.npz"):
        assert load_scores(tmp_path / name, digits.train.labels, digits.name).tolist() == [float(s) for s in scores]


def test_safetensors_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    for text in (
        '{"a":{"dtype":"F32","shape":[1000000000000,1000000],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}',
        '{"__metadata__":' + "[" * 100_000,
    ):
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0" * 4)
        with pytest.raises(ValueError, match="x.safetensors is truncated or is no safetensors file"):
            files.load_tensors(path, "thing")
    text = '{"__metadata__":{"format":"' + "x" * files.HEADER_BYTES + '"}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(ValueError, match=r"x.safetensors has a header of \d+ bytes; allowed are 16777216"):
        files.load_tensors(path, "thing")


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 32 levels"),
        ("[" * 900 + "]" * 900, "nested more than 32 levels"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested more than 32 levels"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("1e999", "too large"),
        ("9" * 5000, "no valid JSON"),
        ("[" + "0," * strict_json.VALUES + "0]", "more than 2097152 values"),
        ("", "no valid JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"it .*{message}"):
        strict_json.parse(text, "it")
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=f"r.json is damaged .*{message}"):
        files.read_json(tmp_path / "r.json")


def test_json_that_is_read():
    for value in ({"a": [1, 2.5, None, True, "[[[["]}, "[" * 100, [[1]] * 1000):
        assert strict_json.parse(json.dumps(value), "it") == value


def test_a_large_record_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JSON_BYTES", 1 << 20)
    (tmp_path / "r.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(ValueError, match="r.json is damaged: it has more than 1 MiB"):
        files.read_json(tmp_path / "r.json")


# checksums


def test_what_has_changed_is_named(digits, tmp_path):
    path = tmp_path / "set.safetensors"
    digits_set(digits, lr=0.01).save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    cases = [
        ({"lr": torch.ones(2)}, {}, "tensor 'lr' has changed"),
        ({"images": tensors["images"] + 1e-6}, {}, "tensor 'images' has changed"),
        ({"labels": tensors["indices"], "indices": tensors["labels"]}, {}, "tensor '(labels|indices)' has changed"),
        ({"images": tensors["images"].view(10, 1, 4, 16)}, {}, "tensor 'images' has changed"),
        ({"images": tensors["images"].view(torch.int32)}, {}, "tensor 'images' has changed"),
        ({"extra": torch.ones(1)}, {}, "has no checksum of tensor 'extra'"),
        ({}, {"mean": "[0.5]"}, "metadata field 'mean' has changed"),
        ({}, {"extra": "1"}, "has no checksum of metadata field 'extra'"),
        ({}, {"checksums": "{}"}, "metadata field 'checksums', tensors is None; it must be an object"),
        ({}, {"checksums": "null"}, "metadata field 'checksums' is None; it must be an object"),
    ]
    for changed, fields, message in cases:
        save_file(tensors | changed, path, metadata | fields)
        with pytest.raises(ValueError, match=f"set.safetensors.*{message}"):
            DistilledSet.load(path)
    save_file({name: t for name, t in tensors.items() if name != "lr"}, path, metadata)
    with pytest.raises(ValueError, match="set.safetensors lacks tensor 'lr'"):
        DistilledSet.load(path)
    save_file(tensors, path, metadata)
    assert torch.equal(DistilledSet.load(path).images, tensors["images"])


def test_a_changed_row_of_an_expert_is_refused_when_it_is_read(tmp_path):
    store = ExpertStore(tmp_path)
    rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    store.save(0, rows, {"model": "MLP"})
    content = bytearray(store.path(0).read_bytes())
    content[-4 * 5 * 4 + 2 * 5 * 4] ^= 1  # the first value of row 2
    store.path(0).write_bytes(content)
    for epoch in (0, 1, 3):
        assert torch.equal(store.row(0, epoch), rows[epoch])
    with pytest.raises(ValueError, match=r"expert_0000.safetensors: tensor 'trajectory\[2\]' has changed"):
        store.row(0, 2)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """safetensors opens the file a second time for the tensors."""
    files.save_tensors(tmp_path / "x", "thing", {"a": torch.zeros(3)}, {"n": "0"})
    read, replaced = files.TensorFile.tensor, []

    def late(self, name):
        if not replaced:
            replaced.append(files.save_tensors(tmp_path / "x", "thing", {"a": torch.ones(3)}, {"n": "1"}))
            with safe_open(tmp_path / "x", "pt") as self._handle:
                return read(self, name)
        return read(self, name)

    monkeypatch.setattr(files.TensorFile, "tensor", late)
    tensors, metadata = files.load_tensors(tmp_path / "x", "thing")
    assert replaced and metadata["n"] == "1" and tensors["a"].tolist() == [1, 1, 1]


# permission


def test_a_file_without_permission_says_so(digits, tmp_path, monkeypatch):
    subset = digits_set(digits)
    subset.save(tmp_path / "secret.safetensors")
    ExpertStore(tmp_path).save(0, torch.randn(3, 5), {"model": "MLP"})
    for name in ("secret.npy", "secret.json", "secret.pt"):
        (tmp_path / name).write_bytes(b"x")
    real = builtins.open

    def refuse(path, *rest, **options):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    for name, read in (
        ("secret.safetensors", lambda: DistilledSet.load(tmp_path / "secret.safetensors")),
        ("expert_0000.safetensors", lambda: ExpertStore(tmp_path).row(0, 0)),
        ("secret.npy", lambda: load_scores(tmp_path / "secret.npy", digits.train.labels, digits.name)),
        ("secret.json", lambda: files.read_json(tmp_path / "secret.json")),
        ("secret.pt", lambda: import_replay_buffer(tmp_path / "secret.pt", tmp_path / "s", toy(), {})),
    ):
        with pytest.raises(PermissionError, match=f"cannot read .*{name}: Permission denied"):
            read()


@pytest.mark.parametrize("name", ["folder", "pipe"])
def test_what_is_no_file(digits, tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "folder" else os.mkfifo(path)
    for read in (
        lambda: DistilledSet.load(path),
        lambda: load_scores(path, digits.train.labels, digits.name),
        lambda: files.read_json(path),
        lambda: import_replay_buffer(path, tmp_path / "s", toy(), {}),
    ):
        with pytest.raises(FileNotFoundError, match=f"{name} is not a file; expected"):
            read()


LIMITED = """
import resource, sys, types
from pathlib import Path
import torch
from torch import nn
from selmatch_ext.data.trajectories import import_replay_buffer
from selmatch_ext.selection.scores import load_scores
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
train = types.SimpleNamespace(labels=torch.zeros(100, dtype=torch.int64))
data = types.SimpleNamespace(train=train, name="small")
for read in (
    lambda: load_scores(sys.argv[1] + "/zeros.npz", data.train.labels, data.name),
    lambda: load_scores(sys.argv[1] + "/huge.npy", data.train.labels, data.name),
    lambda: import_replay_buffer(sys.argv[1] + "/bomb.pt", sys.argv[1] + "/store", nn.Linear(3, 2), {}),
):
    try:
        read()
    except ValueError as error:
        print(str(error).count(chr(10)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit of memory needs Linux")
def test_within_256_mib(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", scores=np.zeros(4 * 10**7))
    (tmp_path / "huge.npy").write_bytes(header("(5000000000000,)"))
    torch.save([Bomb()], tmp_path / "bomb.pt")
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "0", "0"], result.stderr
