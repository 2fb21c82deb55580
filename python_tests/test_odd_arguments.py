"""Registered operators, called with right and with odd arguments (odd_arguments.py), and forward-mode derivatives."""

import json
import subprocess
import sys
from pathlib import Path

import odd_arguments
import pytest
import torch
from torch.autograd import forward_ad

from selmatch_ext.ops.block import BATCH_NORM, BlockKind, block
from selmatch_ext.ops.conv3x3 import conv3x3, conv3x3_input_gradient, conv3x3_weight_gradient
from selmatch_ext.ops.conv_block import conv_block


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


KIND = BlockKind(BATCH_NORM, slope=0.0)
LAYER, IMAGES, WEIGHT, MAP = ((None, None), *map(torch.ones, ((2, 3, 4, 4), (32, 3, 3, 3), (2, 32, 4, 4))))


@pytest.mark.parametrize("inside", [False, True], ids=["jvp", "vmap of jvp"])
@pytest.mark.parametrize(
    "function, argument",
    [
        (lambda z: block(z, None, None, KIND), MAP),
        (lambda weight: conv_block(IMAGES, weight, None, LAYER, KIND)[0], WEIGHT),
        (lambda x: conv3x3(x, WEIGHT), IMAGES),
        (lambda g: conv3x3_input_gradient(g, WEIGHT), MAP),
        (lambda g: conv3x3_weight_gradient(IMAGES, g), MAP),
    ],
    ids=["block", "conv_block", "conv3x3", "input_gradient", "weight_gradient"],
)
def test_no_function_loses_a_tangent_under_torch_func(function, argument, inside):
    def derivative(x):
        return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.vmap(derivative)(argument[None]) if inside else derivative(argument)
