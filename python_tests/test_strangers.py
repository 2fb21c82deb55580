"""Files from strangers: they choose no code, take no memory that they do not justify, and errors name what is wrong."""

import builtins
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MODEL, tiny_run
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from selmatch_ext import cli, evaluation, files, models, strict_json
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.trajectories import ExpertStore, import_replay_buffer
from selmatch_ext.data.whitening import Whitening
from selmatch_ext.methods import METHODS, Task
from selmatch_ext.methods.checkpoint import Checkpoint
from selmatch_ext.models import from_file
from selmatch_ext.selection.scores import describe_scores, load_scores
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Evaluation, Start, Training

EVALUATION = Evaluation(model="MLP", networks=1, training=Training(epochs=1))


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """The name of a network in a module that is on the path; importing it leaves a file."""
    text = "import pathlib\npathlib.Path(__file__ + '.ran').touch()\nfrom selmatch_ext.models import build\n"
    text += "def make(channels, classes, size):\n    return build('MLP', channels, classes, size)\n"
    (tmp_path / "strangers_code.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "strangers_code:make"
    sys.modules.pop("strangers_code", None)


def ran(tmp_path):
    return (tmp_path / "strangers_code.py.ran").exists()


def digits_set(digits, **changes):
    subset = choose(Start("random", 1), Context(digits), None, None).images
    return replace(subset, **changes)


def scheduled(digits, model, starts=None):
    schedule = Schedule(torch.full((1,), 0.01), torch.arange(10)[None], model, starts)
    return digits_set(digits, schedule=schedule)


# names of networks


def test_a_set_does_not_choose_the_code_that_evaluates_it(digits, tmp_path, stranger):
    made = scheduled(digits, stranger)
    made.save(tmp_path / "set.safetensors")
    subset = DistilledSet.load(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="set.safetensors: schedule_model is strangers_code:make, .* add --evaluation"):
        evaluation.evaluate(subset, Context(digits), EVALUATION)
    assert not ran(tmp_path)
    evaluation.evaluate(subset, Context(digits), replace(EVALUATION, model=stranger))
    assert ran(tmp_path)


def test_a_schedule_made_in_python_may_name_any_code(digits, tmp_path, stranger):
    evaluation.evaluate(scheduled(digits, stranger), Context(digits), EVALUATION)
    assert ran(tmp_path)


def test_the_command_line_says_what_to_add(digits, tmp_path, stranger, capsys):
    scheduled(digits, stranger).save(tmp_path / "set.safetensors")
    arguments = [
        "evaluate",
        str(tmp_path / "set.safetensors"),
        "--data.dataset",
        "digits",
        "--evaluation.networks",
        "1",
    ]
    assert cli.main(arguments) == 1 and not ran(tmp_path)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(f"add --evaluation.model {stranger}")
    assert cli.main([*arguments, "--evaluation.model", stranger]) == 0 and ran(tmp_path)


def test_experts_do_not_choose_the_code_of_their_network(digits, tmp_path, stranger):
    count = models.flat.parameter_count(models.build("MLP", 1, 10, 8))
    rows = torch.randn(4, count, generator=torch.Generator().manual_seed(0))
    ExpertStore(tmp_path / "e").save(0, rows, {"model": stranger, "dataset": "digits"})
    start, settings = digits_set(digits), replace(METHODS["mtt"].settings_type(), max_start_epoch=1, expert_epochs=1)
    for make in (
        lambda store: METHODS["mtt"](Task(start, Context(digits), store), settings),
        lambda store: choose(Start("correct", 1), Context(digits), None, tmp_path, store),
    ):
        sys.modules.pop("strangers_code", None)
        (tmp_path / "strangers_code.py.ran").unlink(missing_ok=True)
        with pytest.raises(
            ValueError, match=r"expert_0000.safetensors: model is .* add --experts-model strangers_code:m"
        ):
            make(ExpertStore(tmp_path / "e"))
        assert not ran(tmp_path)
        make(ExpertStore(tmp_path / "e", trusted=[stranger]))
        assert ran(tmp_path)


def test_a_named_network_is_measured_before_it_is_made(digits, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Context, "network", lambda *a: made.append(a))
    for starts, message in ((None, "parameters, more than 100000000"), (torch.zeros(1, 5), "but the file holds 5")):
        scheduled(digits, "ConvNetW65536NP", starts).save(tmp_path / "set.safetensors")
        with pytest.raises(ValueError, match=f"set.safetensors: schedule_model is ConvNetW65536NP, .*{message}"):
            evaluation.evaluate(DistilledSet.load(tmp_path / "set.safetensors"), Context(digits), EVALUATION)
    assert not made
    for name in ("ConvNetD99999999NP", "ConvNetW99999999999"):
        with pytest.raises(ValueError, match=r"must be from 1 to"):
            models.build(name, 1, 10, 8)


@pytest.mark.parametrize("name", ["ConvNetD4W64BN", "torchvision:resnet18", "timm:resnet18"])
def test_known_networks_may_be_named(name):
    assert from_file.checked_name(name, "x", "--model") == name
    from_file.check_size(name, (3, 10, (32, 32)), "x", "--model")


@pytest.mark.parametrize("name", [None, 3, ["MLP"], {"a": 1}])
def test_names_that_are_no_strings(name):
    with pytest.raises(ValueError, match="x must be the name of a network, got"):
        from_file.checked_name(name, "x", "--model")


def test_a_network_whose_size_is_unknown_must_be_named_by_the_user():
    like = 3, 10, (32, 32)
    with pytest.raises(ValueError, match="whose size is not known before it is made; to make it, add --model"):
        from_file.check_size("torchvision:regnet_y_400mf", like, "x", "--model")
    from_file.check_size("torchvision:regnet_y_400mf", like, "x", "--model", trusted=["torchvision:regnet_y_400mf"])


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


def forged(path, tensors=None, **fields):
    """Changes a file of ours and gives it right checksums."""
    with safe_open(path, "pt") as file:
        kind = file.metadata()["format"].removeprefix(files.FORMAT)
    found, metadata = files.load_tensors(path, kind)
    files.save_tensors(path, kind, found | (tensors or {}), metadata | fields)


SINGULAR = torch.eye(64)
SINGULAR[3, 3] = 0


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({}, {"settings": "[" * 100_000}, "metadata field 'settings' .*nested more than 32"),
        ({}, {"settings": "[1]"}, r"settings is \[1\]; it must be an object"),
        ({}, {"mean": "null"}, "mean is None; it must be a list of finite numbers"),
        ({}, {"std": '["a"]'}, "std is .*; it must be a list of finite numbers"),
        ({}, {"std": "[0.1, 0.2]"}, "std is .*; it must hold a finite number for each channel"),
        ({}, {"class_names": "[1]"}, r"class_names is \[1\]; it must be a list of strings"),
        ({}, {"class_names": '{"a": 1}'}, "class_names is .*; it must be a list of strings"),
        ({}, {"method": "3"}, "method is 3; it must be a string"),
        (
            {"lr": torch.ones(2).double()},
            {},
            r"lr is torch.float64 of shape \(2,\); it must be one floating-point number",
        ),
        ({"lr": torch.tensor(1)}, {}, "lr is torch.int64"),
        ({"lr": torch.tensor(-0.1)}, {}, "lr is -0.1.*; it must be a finite number above 0"),
        ({"lr": torch.tensor(float("nan"))}, {}, "lr is nan"),
        ({"labels": torch.full((10, 10), 0.2)}, {}, "soft labels are not probabilities: those of image 0 sum to 2"),
        ({"labels": torch.eye(10) * 2 - 0.1}, {}, "soft labels are not probabilities"),
        ({"labels": torch.zeros(10, dtype=torch.cfloat)}, {}, "labels is torch.complex64"),
        ({"indices": torch.full((10,), -2)}, {}, "indices holds -2"),
        ({"zca_mean": torch.zeros(64)}, {}, "of zca_mean and zca_transform one is missing"),
        ({"zca_mean": torch.zeros(64), "zca_transform": torch.full((64, 64), torch.nan)}, {}, "whitening holds NaN"),
        ({"zca_mean": torch.zeros(64), "zca_transform": torch.zeros(64, 64)}, {}, "transform is singular"),
        ({"zca_mean": torch.zeros(64), "zca_transform": SINGULAR}, {}, "transform is singular"),
        ({"zca_mean": torch.zeros(64), "zca_transform": torch.ones(64, 64).tril()}, {}, "transform is not symmetric"),
        ({"zca_mean": torch.zeros(9), "zca_transform": torch.eye(9)}, {}, "whitening is of 9 values; an image has 64"),
        ({"schedule_rates": torch.ones(1)}, {}, "of schedule_rates and schedule_batches one is missing"),
        (
            {"schedule_rates": torch.ones(1), "schedule_batches": torch.zeros(1, 1, dtype=torch.int64)},
            {"schedule_model": "[]"},
            r"schedule.model is \[\]; it must be the name of a network",
        ),
        (
            {"schedule_rates": torch.ones(1), "schedule_batches": torch.zeros(1, 1)},
            {"schedule_model": '"MLP"'},
            "schedule.batches is torch.float32",
        ),
    ],
)
def test_sets_that_make_no_sense(digits, tmp_path, tensors, fields, message):
    path = tmp_path / "set.safetensors"
    digits_set(digits).save(path)
    forged(path, tensors, **fields)
    with pytest.raises(ValueError, match=f"set.safetensors.*{message}") as caught:
        DistilledSet.load(path)
    assert "\n" not in str(caught.value)


def test_a_whitening_that_can_be_undone_is_accepted():
    Whitening(torch.zeros(4), torch.eye(4) * 1e-3 + 1e-5)
    with pytest.raises(ValueError, match="both must be torch.float32"):
        Whitening(torch.zeros(4), torch.eye(4).double())


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


# experts and replay buffers


def test_experts_with_other_values_than_numbers(tmp_path):
    store = ExpertStore(tmp_path)
    wrong = torch.zeros(3, 5)
    wrong[1, 2] = torch.nan
    for trajectory, metadata, message in (
        (wrong, "{}", "expert_0000.safetensors: the parameters of epoch 1 are not finite"),
        (torch.zeros(3, 5).double(), "{}", "trajectory is torch.float64; it must be torch.float32"),
        (torch.zeros(3, 5), "null", "metadata field 'expert' is None; it must be an object"),
        (torch.zeros(3, 5), '{"model": 3}', "expert_0000.safetensors: model is 3; it must be a string"),
        (torch.zeros(1, 5), "{}", r"trajectory has shape \(1, 5\)"),
    ):
        files.save_tensors(
            store.path(0), "expert", {"trajectory": trajectory}, {"expert": metadata}, by_row=["trajectory"]
        )
        with pytest.raises(ValueError, match=message):
            [store.row(0, epoch) for epoch in range(3)]
            assert store.model
    files.save_tensors(store.path(0), "expert", {"trajectory": torch.zeros(3, 5)}, {"expert": "{}"})
    with pytest.raises(ValueError, match="'trajectory' has no checksum for each of its rows"):
        store.row(0, 0)


def test_experts_that_differ_are_refused_before_the_run(tmp_path):
    store = ExpertStore(tmp_path)
    store.save(0, torch.randn(3, 5), {"model": "MLP"})
    ExpertStore(tmp_path / "other").save(0, torch.randn(4, 5), {"model": "MLP"})
    (tmp_path / "other" / "expert_0000.safetensors").rename(store.path(1))
    with pytest.raises(ValueError, match="expert_0001.safetensors has 3 epochs, 5 parameters .*; expert 0 has 2, 5"):
        store.check_alike()


def toy():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))


def epochs(count=3):
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(p.shape, generator=g) for p in toy().parameters()] for _ in range(count)]


class Bomb:
    def __reduce__(self):
        return bytearray, (8 * 10**9,)


def unusual(tensor):
    changed = epochs()
    changed[1][2] = tensor
    return [changed]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([Bomb()], "bytearray"),
        (unusual(torch.ones(2, 2).to_sparse()), "sparse"),
        (unusual(torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.quint8)), "qtensor"),
        (unusual(torch.ones(2, 2, device="meta")), "meta"),
        (unusual(torch.ones(2, 2, dtype=torch.cfloat)), "expert 0, epoch 1 .*must be a list of float tensors"),
        (unusual(torch.zeros(1).expand(10**9, 10**9)), "declares a size of 1000000000"),
        (unusual(None), "expert 0, epoch 1 is a list of 3; it must be a list of float tensors"),
        ([[[p.clone() for p in toy().parameters()]] * 3], "repeats|epochs are equal|share"),
        ([[epoch[:] for epoch in [epochs(1)[0]] * 40]], "epochs"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_replay_buffers(tmp_path, content, message):
    path = tmp_path / "buffer.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"buffer.pt.*({message})") as caught:
        import_replay_buffer(path, tmp_path / "store", toy(), {})
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_a_buffer_that_aliasing_made_equal(tmp_path):
    """What the public code writes on a CPU: p.detach().cpu() of the same parameters after every epoch."""
    network, expert = toy(), []
    for _ in range(4):
        with torch.no_grad():
            for p in network.parameters():
                p += 1
        expert.append([p.detach().cpu() for p in network.parameters()])
    torch.save([expert], tmp_path / "buffer.pt")
    with pytest.raises(
        ValueError, match=r"buffer.pt: expert 0: all 4 epochs are equal. The public code .* \.clone\(\)"
    ):
        import_replay_buffer(tmp_path / "buffer.pt", tmp_path / "store", toy(), {})


def test_a_buffer_with_compressed_or_changed_members(tmp_path):
    path = tmp_path / "buffer.pt"
    torch.save([epochs()], path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="buffer.pt .* is compressed or encrypted"):
        import_replay_buffer(path, tmp_path / "store", toy(), {})
    value = epochs()[1][0].numpy().tobytes()
    at = content.index(value)
    path.write_bytes(content[: at + 3] + bytes([content[at + 3] ^ 1]) + content[at + 4 :])
    with pytest.raises(ValueError, match="buffer.pt .* has changed since the file was written: its checksum differs"):
        import_replay_buffer(path, tmp_path / "store", toy(), {})
    path.write_bytes(pickle.dumps([1]) + b"\0" * 100)
    with pytest.raises(ValueError, match="buffer.pt is truncated or is no replay buffer"):
        import_replay_buffer(path, tmp_path / "store", toy(), {})


# checkpoints and records


def toy_method(momentum=0.5):
    learned = {"images": torch.zeros(3, 4, requires_grad=True), "unused": torch.ones(2, requires_grad=True)}
    method = types.SimpleNamespace(name="toy", learned=learned, state={"count": torch.tensor([1, 2])})
    return method, torch.optim.SGD(list(learned.values()), lr=0.1, momentum=momentum)


@pytest.fixture
def checkpoint(tmp_path):
    method, optimizer = toy_method()
    method.learned["images"].grad = torch.ones(3, 4)  # the other one had no gradient so far
    optimizer.step()
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", {"lr": 0.1})
    checkpoint.save(method, optimizer, [0.5])
    return checkpoint


def test_a_checkpoint_comes_back(checkpoint):
    method, optimizer = toy_method()
    assert checkpoint.restore(method, optimizer) == [0.5]
    assert torch.equal(optimizer.state[method.learned["images"]]["momentum_buffer"], torch.ones(3, 4))
    assert torch.equal(method.learned["images"], torch.full((3, 4), -0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned.images": torch.zeros(1, 4)}, r"learned.images is torch.float32 \(1, 4\); it must be .* \(3, 4\)"),
        ({"learned.images": torch.zeros(3, 4).double()}, "learned.images is torch.float64"),
        ({"learned.images": torch.full((3, 4), torch.nan)}, "learned.images holds NaN"),
        ({"state.count": torch.tensor([1])}, r"state.count is torch.int64 \(1,\)"),
        ({"optimizer.images.momentum_buffer": None}, "lacks 'optimizer.images.momentum_buffer', without which"),
        ({"optimizer.images.momentum_buffer": torch.zeros(4)}, r"momentum_buffer is torch.float32 \(4,\)"),
        ({"optimizer.images.momentum_buffer": torch.full((3, 4), torch.inf)}, "momentum_buffer holds NaN or infinite"),
        (
            {"optimizer.images.exp_avg": torch.zeros(3, 4)},
            "holds 'optimizer.images.exp_avg', which method toy does not",
        ),
        ({"losses": torch.tensor([torch.nan]).double()}, "losses is .*all finite"),
        ({"losses": torch.zeros(1, 1).double()}, "losses is"),
    ],
)
def test_checkpoints_that_make_no_sense(checkpoint, changes, message):
    tensors, metadata = files.load_tensors(checkpoint.path, "checkpoint")
    changed = {name: t for name, t in (tensors | changes).items() if t is not None}
    files.save_tensors(checkpoint.path, "checkpoint", changed, metadata)
    method, optimizer = toy_method()
    with pytest.raises(ValueError, match=f"checkpoint.safetensors.*{message}"):
        checkpoint.restore(method, optimizer)
    assert not method.learned["images"].any() and not optimizer.state


def test_settings_of_a_checkpoint_that_are_none(checkpoint):
    forged(checkpoint.path, settings="[]")
    with pytest.raises(ValueError, match=r"what it was made from is \[\]; it must be an object"):
        checkpoint.restore(*toy_method())


@pytest.mark.parametrize(
    ("accuracies", "message"),
    [
        ([["NaN"]], "NaN is no number"),
        ([[101.0]], "no percentage"),
        ([[-1.0]], "no percentage"),
        ([50.0], "must be a list of 1 finite numbers"),
        ([[50.0, 50.0]], "must be a list of 1 finite numbers"),
        ([[50.0]] * 3, "at most 2 networks"),
        (None, "at most 2 networks"),
        ([[True]], "must be a list of 1 finite numbers"),
    ],
)
def test_records_that_make_no_sense(digits, tmp_path, accuracies, message):
    path, settings = tmp_path / "record.json", replace(EVALUATION, networks=2)
    evaluation.evaluate(digits_set(digits), Context(digits), settings, path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "accuracies": accuracies}).replace('"NaN"', "NaN"))
    with pytest.raises(ValueError, match=f"record.json.*{message}"):
        evaluation.evaluate(digits_set(digits), Context(digits), settings, path)


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


def test_the_demo_still_names_its_network(digits, experts):
    """Stores that are trained here, with a network of ours, need no option."""
    assert ExpertStore(experts.folder).model == MODEL == tiny_run().experts.model
    assert ExpertStore(experts.folder).check_model_size(1, 10, (8, 8)) is None
