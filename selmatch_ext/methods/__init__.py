"""The distillation methods by name. Each is one class in one short file, and all run in the loop of loop.py."""

from selmatch_ext.methods.base import Method, Task
from selmatch_ext.methods.dd import DD
from selmatch_ext.methods.distribution import DM
from selmatch_ext.methods.gradient import DC, DSA
from selmatch_ext.methods.mtt import DATM, MTT
from selmatch_ext.methods.selmatch import SelMatch

METHODS: dict[str, type[Method]] = {m.name: m for m in (DC, DSA, DM, DD, MTT, DATM, SelMatch)}

__all__ = ["DATM", "DC", "DD", "DM", "DSA", "METHODS", "MTT", "Method", "SelMatch", "Task"]
