"""The README's page on adding a method: its code runs, and is as short as it says."""

import pathlib
import re

import torch

from selmatch_ext.data.distilled import DistilledSet

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_your_own_method(tmp_path, monkeypatch):
    page = README.read_text().split("### Your own method")[1]
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    losses, start = found["losses"], found["start"]
    assert len(losses) == 100 and sum(losses[-10:]) < 0.5 * sum(losses[:10])
    made = DistilledSet.load(tmp_path / "runs/pixel-means/distilled.safetensors")
    assert made.method == "pixel-means" and made.distilled.all() and not torch.equal(made.images, start.images)
