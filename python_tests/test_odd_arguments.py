"""Registered operators, called with right and with odd arguments (odd_arguments.py), and forward-mode derivatives."""

import json
import subprocess
import sys
from pathlib import Path

import odd_arguments
import pytest
import torch
from torch.autograd import forward_ad


def test_odd_arguments_are_refused_or_right():
    """In a process of its own, so that a crash is seen."""
    program = [
        sys.executable,
        "-W",
        "ignore",
        Path(odd_arguments.__file__),
        "--calls",
        str(400 * len(odd_arguments.OPERATORS)),
    ]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report["defects"] == []
    for operator in odd_arguments.OPERATORS:
        assert report["counts"][f"{operator.__name__} right"] > 80
        assert report["counts"][f"{operator.__name__} refused"] > 80


@pytest.mark.parametrize("operator", odd_arguments.OPERATORS, ids=lambda operator: operator.__name__)
def test_no_operator_loses_a_tangent(operator):
    """The operators themselves; what `augment` and the distances make of forward mode is their wrappers' affair."""
    name = operator.__name__
    for seed in range(20):
        args = operator(odd_arguments.Draw(seed))
        places = [k for k, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if not places:
            lists = next(k for k, a in enumerate(args) if isinstance(a, list))
            tensors, index = args[lists], 0
        else:
            tensors, index = args, places[seed % len(places)]
        with forward_ad.dual_level():
            tensors[index] = forward_ad.make_dual(tensors[index], torch.ones_like(tensors[index]))
            with pytest.raises((NotImplementedError, RuntimeError), match="forward-mode|jvp is not implemented"):
                getattr(torch.ops.selmatch_ext, name)(*args)
