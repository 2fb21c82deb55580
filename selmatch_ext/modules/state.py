"""What a call of a module can change besides its result: random generators, buffers, Python attributes and what they
hold, and attributes of classes. A `ModuleState` records it, so that a step can be repeated exactly as it was."""

from __future__ import annotations

import types

import torch
from torch import nn

from selmatch_ext.modules.changes import Comparison, PutBack
from selmatch_ext.modules.records import Record, StateRecorder
from selmatch_ext.seeds import RandomState

_OF_WHAT = "an attribute of a class", "what a function keeps"


class ModuleState:
    """The state of a module and of the global generators at one moment.

    Looked at are the module's attributes and buffers, those of the classes of its modules, and what can be reached from
    them: containers, arrays, random generators, modules that are not registered, and objects, classes and functions
    that are not of Python, torch or numpy. Attributes themselves always count; of what lies deeper the nearest
    `objects.LIMIT` objects do, where a tensor or an array counts once more for each KiB. A change beyond that is not
    noticed and not undone, and neither is one of a global variable or an iterator.

    previous: an earlier state of the same module. Tensors that have not changed since share its memory."""

    def __init__(self, module: nn.Module, device: torch.device, previous: ModuleState | None = None):
        self.random = RandomState(device)
        self.modules = {id(m): m for m in module.modules()}
        recorder = StateRecorder(previous.records if previous is not None else {})
        self.records: dict[int, Record] = recorder.records_of(self.modules.values())

    def change(self, later: ModuleState) -> str | None:
        """What has happened since, in words: "draws random numbers" or "changes ...". The running statistics of norms
        do not count."""
        if self.random != later.random:
            return "draws random numbers"
        if self.modules.keys() != later.modules.keys():
            return "changes its submodules"
        compared = Comparison(self.records, later.records, self.modules)
        for number, m in self.modules.items():
            now, then = self.records[number].items, later.records[number].items
            if now.parameters.keys() != then.parameters.keys():
                return "changes which parameters it has"
            if now.hooks != then.hooks:
                return "changes its hooks"
            name = compared.first_difference(number)
            if name is not None:
                return f"changes its attribute {name}"
            if not isinstance(m, nn.modules.batchnorm._NormBase):
                name = compared.first_difference(id(m._buffers))
                if name is not None:
                    return f"changes its buffer {name}"
        for number, record in self.records.items():
            value = record.value
            if isinstance(value, (type, types.FunctionType)):
                name = compared.first_difference(number)
                if name is not None:
                    return f"changes {_OF_WHAT[type(value) is types.FunctionType]}, {value.__name__}.{name}"
        return None

    def restore(self) -> None:
        """Puts the global generators and the module that this state is of back."""
        self.random.restore()
        self.restore_objects()

    def restore_objects(self) -> None:
        """Puts the module back, and the attributes of classes, which the user's own module has too."""
        put_back = PutBack()
        for record in self.records.values():
            put_back(record)
