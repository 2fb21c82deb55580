"""The README's page on adding a method: its file runs from the command line, and is as short as it says."""

import json
import pathlib
import re

import torch

from selmatch_ext import cli
from selmatch_ext.data.distilled import DistilledSet

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_your_own_method(tmp_path, monkeypatch):
    page = README.read_text().split("### Your own method")[1]
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    (tmp_path / "pixel_means.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = re.search(r"`selmatch (run pixel_means:PixelMeans .*?) --out DIR`", page)[1].split()
    short = ["--evaluation.model", "ConvNetD2W8", "--evaluation.networks", "1", "--evaluation.training.epochs", "2"]
    assert cli.main([*command, *short, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    start, made = (DistilledSet.load(tmp_path / "out" / f"{name}.safetensors") for name in ("start", "distilled"))
    assert made.method == "pixel-means" and made.distilled.all() and not torch.equal(made.images, start.images)
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == {"random", "start", "pixel-means"}
