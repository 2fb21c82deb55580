"""What tests of imported and exported sets share: commands, and what they say."""

import io
from dataclasses import replace

import pytest
import torch

from selmatch_ext import cli
from selmatch_ext.data.distilled import DistilledSet

DIGITS = ("--data.dataset", "digits")
DATASET = (*DIGITS, "--normalization", "dataset")


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
