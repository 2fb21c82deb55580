"""What tests of files from strangers share: a set of digits, how it is evaluated, a toy network, a bad pickle."""

from dataclasses import replace

from torch import nn

from selmatch_ext.context import Context
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Evaluation, Start, Training

EVALUATION = Evaluation(model="MLP", networks=1, training=Training(epochs=1))


def digits_set(digits, **changes):
    subset = choose(Start("random", 1), Context(digits), None, None).images
    return replace(subset, **changes)


def toy():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))


class Bomb:
    def __reduce__(self):
        return bytearray, (8 * 10**9,)
