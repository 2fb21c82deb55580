"""Dataset distillation that is fast, small in memory and exact: fused operations and methods for PyTorch.

On a machine that other processes use too, set OMP_WAIT_POLICY=passive in the environment before torch is imported:
otherwise the threads of OpenMP keep the cores busy while they wait, and a step can take ten times as long. The command
line does so by itself (`openmp.py`).
"""

# ruff: noqa: E402
# isort: off
from selmatch_ext import openmp

openmp.prepare()  # before torch loads the OpenMP runtime

import torch  # noqa: F401  (the extension needs torch's libraries loaded)
# isort: on

from selmatch_ext import models
from selmatch_ext._C import build_info
from selmatch_ext.ops.distance import trajectory_distance
from selmatch_ext.ops.dsa import Augmentation, augment, mix_augmentations
from selmatch_ext.ops.gradient_distance import gradient_distance
from selmatch_ext.ops.sampling import DiffAugment, ParamDiffAug, sample_augmentation
from selmatch_ext.unroll import explain_engine, unrolled_sgd

__version__ = build_info()["version"]

__all__ = [
    "Augmentation",
    "DiffAugment",
    "ParamDiffAug",
    "augment",
    "build_info",
    "explain_engine",
    "gradient_distance",
    "mix_augmentations",
    "models",
    "sample_augmentation",
    "trajectory_distance",
    "unrolled_sgd",
]
