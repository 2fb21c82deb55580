"""Files with right checksums whose values make no sense: sets, checkpoints and records say what is wrong."""

import json
import types
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from strangers import EVALUATION, digits_set

from selmatch_ext import evaluation, files
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.whitening import Whitening
from selmatch_ext.methods.checkpoint import Checkpoint


def forged(path, tensors=None, **fields):
    """Changes a file of ours and gives it right checksums."""
    with safe_open(path, "pt") as file:
        kind = file.metadata()["format"].removeprefix(files.FORMAT)
    found, metadata = files.load_tensors(path, kind)
    files.save_tensors(path, kind, found | (tensors or {}), metadata | fields)


# sets


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
