"""What the compiled module was built for. Its calls into torch are fixed to one version of torch's C++ interface: with
another one it cannot be loaded, or reads memory wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

FILE = Path(__file__).with_name("built_for.json")
"""Written by setup.py beside the compiled module."""


class Built(TypedDict):
    """What setup.py writes."""

    version: str  # of this package
    torch: str  # the version of torch, such as 2.14.1+cu130
    cuda: str | None  # that of CUDA in torch; None: built without CUDA


def read() -> Built | None:
    """The content of FILE; None where there is no such file, or not with these fields: a module that was built in
    another way."""
    try:
        found = json.loads(FILE.read_text())
        return Built(version=str(found["version"]), torch=str(found["torch"]), cuda=found["cuda"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check(torch: str, cuda: str | None) -> None:
    """Raises ImportError, which says what to do, where the compiled module does not go with this torch.

    torch: its version, of which the first two numbers must be those that the module was built for. cuda: the version of
    CUDA that it was built with, None where without; a module with CUDA needs the same major version."""
    built = read()
    if built is None:
        return
    here = f"torch {torch} {'without CUDA' if cuda is None else f'with CUDA {cuda}'}"
    made = f"torch {built['torch']} {'(CUDA left out)' if built['cuda'] is None else 'with CUDA ' + built['cuda']}"
    same_cuda = built["cuda"] is None or (cuda or "").split(".")[0] == built["cuda"].split(".")[0]
    if built["torch"].split(".")[:2] != torch.split(".")[:2] or not same_cuda:
        raise ImportError(
            f"selmatch_ext {built['version']} was built for {made}, and this is {here}. Install the torch that it was "
            "built for, or build the package again beside this one: pip install --no-build-isolation --force-reinstall "
            "--no-deps, and the folder of its source"
        )
