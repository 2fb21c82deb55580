"""Dataset distillation that is fast, small in memory and exact: fused operations and methods for PyTorch.

On a machine that other processes use too, set OMP_WAIT_POLICY=passive in the environment before torch is imported:
otherwise the threads of OpenMP keep the cores busy while they wait, and a step can take ten times as long. The command
line does so by itself (`openmp.py`).
"""

# ruff: noqa: E402
# isort: off
import sys

from selmatch_ext import cli_help, openmp

openmp.prepare()  # before torch loads the OpenMP runtime
# isort: on

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not (openmp.is_command_line() and cli_help.asked(sys.argv[1:])):
    import torch

    from selmatch_ext import built_for

    built_for.check(torch.__version__, torch.version.cuda)

    from selmatch_ext import models
    from selmatch_ext._C import build_info
    from selmatch_ext.allocator import keep_memory
    from selmatch_ext.ops.distance import trajectory_distance
    from selmatch_ext.ops.dsa import Augmentation, augment, mix_augmentations
    from selmatch_ext.ops.gradient_distance import gradient_distance
    from selmatch_ext.ops.sampling import DiffAugment, ParamDiffAug, sample_augmentation
    from selmatch_ext.unroll import UnrolledSGD, explain_engine, unrolled_sgd

    __version__ = build_info()["version"]

if TYPE_CHECKING:
    from selmatch_ext import ranges
    from selmatch_ext.context import Context
    from selmatch_ext.data.distilled import DistilledSet
    from selmatch_ext.data.load import load
    from selmatch_ext.methods import Method, MethodSettings, Task
    from selmatch_ext.runner import Run, run
    from selmatch_ext.settings import Start

_LATER = {
    "Context": "context",
    "DistilledSet": "data.distilled",
    "Method": "methods",
    "MethodSettings": "methods",
    "Run": "runner",
    "Start": "settings",
    "Task": "methods",
    "load": "data.load",
    "ranges": "",
    "run": "runner",
}
"""Names that are imported when they are first asked for, with their modules: whoever uses the operations alone does not
wait for the rest."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LATER[name] or name}")
    found = getattr(module, name) if _LATER[name] else module
    globals()[name] = found
    return found


__all__ = [
    "Augmentation",
    "Context",
    "DiffAugment",
    "DistilledSet",
    "Method",
    "MethodSettings",
    "ParamDiffAug",
    "Run",
    "Start",
    "Task",
    "UnrolledSGD",
    "augment",
    "build_info",
    "explain_engine",
    "gradient_distance",
    "keep_memory",
    "load",
    "mix_augmentations",
    "models",
    "ranges",
    "run",
    "sample_augmentation",
    "trajectory_distance",
    "unrolled_sgd",
]
