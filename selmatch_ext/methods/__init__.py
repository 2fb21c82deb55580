"""The distillation methods by name. Each is one class in one short file, and all run in the loop of loop.py."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path

from selmatch_ext.methods.base import Defaults, LoopSettings, Method, MethodSettings, Task
from selmatch_ext.methods.datm import DATM
from selmatch_ext.methods.dd import DD
from selmatch_ext.methods.distribution import DM
from selmatch_ext.methods.frepo import FRePo
from selmatch_ext.methods.gradient import DC, DSA
from selmatch_ext.methods.kip import KIP, LabelSolve
from selmatch_ext.methods.ld import LD
from selmatch_ext.methods.mtt import MTT
from selmatch_ext.methods.selmatch import SelMatch

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (DC, DSA, DM, DD, LD, MTT, DATM, SelMatch, KIP, LabelSolve, FRePo)
}
TAKEN = ("random", "start", "expert", "evaluation", "scores", "features", "noise", "correct")
"""Names of other sets and random streams, which no method can have."""
RESERVED = (
    *("out", "seed", "device", "experts", "experts_model", "settings", "reduced", "debug"),
    *("data", "start", "evaluation"),
)
"""Names of other options, which no setting of a method can have."""


def find_method(name: str) -> type[Method]:
    """The method of that name, or the class `Class` of a module of yours for "package.module:Class", which is imported.

    Raises ValueError for a name that is none, for a module without such a class, and for a class that is no Method with
    a name of its own."""
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        raise ValueError(f"{name!r} is written without .py, and from the folder of the file: {module[:-3]}:{attribute}")
    if not attribute or not module or module.startswith("."):
        raise ValueError(f"no method is called {name!r}; there are {', '.join(METHODS)}, and package.module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ModuleNotFoundError(f"{error} in {Path.cwd()}, nor on Python's path", name=error.name) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"{name}: {module} has no class {attribute} that is a selmatch_ext.methods.Method")
    own = getattr(found, "name", "")
    if not re.fullmatch(r"[\w.-]+", own) or own in TAKEN:
        raise ValueError(
            f"{name}: its name is {own!r}; it must consist of letters, digits, '.', '_' and '-', and not be one of "
            f"{', '.join(TAKEN)}"
        )
    clash = sorted({field.name for field in fields(found.settings_type)} & set(RESERVED))
    if clash:
        raise ValueError(f"{name}: its settings cannot be called {', '.join(clash)}, as other options are")
    return found


__all__ = [
    "DATM",
    "DC",
    "DD",
    "DM",
    "DSA",
    "Defaults",
    "FRePo",
    "KIP",
    "LabelSolve",
    "LD",
    "LoopSettings",
    "METHODS",
    "MTT",
    "Method",
    "MethodSettings",
    "SelMatch",
    "Task",
    "find_method",
]
