"""Pictures of objects that a call of a module may change in place; changes.py compares them and puts objects back."""

from __future__ import annotations

import functools
import math
import operator
import random
import types
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from selmatch_ext.modules.objects import (
    CONSTANTS,
    LIMIT,
    CachedFunction,
    attributes_of,
    hooks_of,
    own_classes,
    parts_of,
    variables_of,
)

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_BYTES = 1024  # of a tensor or array count as much as one object


class TensorRecord(NamedTuple):
    """Stands for a tensor. The tensor itself is not kept: it may hold the graph of a whole step."""

    values: Tensor | None  # None: not looked at
    number: int  # of one tensor in several places: the same


class TupleOf(NamedTuple):
    """Stands for a tuple that holds tensors."""

    kind: type
    parts: tuple


class OfModule(NamedTuple):
    """What a module keeps beside buffers, submodules and attributes."""

    parameters: dict[str, nn.Parameter | None]  # None: the value is given at each call
    hooks: list[dict]  # of each kind


class Whole(NamedTuple):
    """Stands for what a container held that is too large to be looked into."""

    parts: Any


STAND_INS = frozenset({TensorRecord, TupleOf})


class Record(NamedTuple):
    """An object that can be changed in place, and what it held. Among the parts of a container a `TensorRecord` stands
    for a tensor; another object that can change stands for itself, and has a record of its own."""

    value: Any
    items: Any  # of a container a dictionary, list or set; else a state
    attributes: dict | None


class StateRecorder:
    """Makes the records of a module's state. before: those of an earlier one."""

    def __init__(self, before: dict[int, Record]):
        self.before = before
        self.records: dict[int, Record] = {}
        self.waiting: deque[Any] = deque()
        self.left: float = math.inf
        self.near = True  # attributes themselves always count
        self.parameters: set[int] = set()  # ids of what stands in their places, which is given at each call

    def records_of(self, modules: Iterable[nn.Module]) -> dict[int, Record]:
        """By the ids of the objects, which live as long as their records."""
        modules = list(modules)
        self.parameters = {id(p) for m in modules for p in m._parameters.values()}
        for m in modules:
            self._add(m)
            self._add_classes(type(m))
        self.left = LIMIT
        for _ in range(len(self.waiting)):
            self._add(self.waiting.popleft())
        self.near = False
        while self.waiting and self.left > 0:
            self._add(self.waiting.popleft())
        return self.records

    def _add(self, value: Any) -> None:
        if id(value) in self.records:
            return
        if isinstance(value, nn.Module):
            # Other tensors than parameters were put in their places by `PrivateModel`.
            own = {name: p if isinstance(p, nn.Parameter) else None for name, p in value._parameters.items()}
            hooks = [dict(hooks) for hooks in hooks_of(value)]
            self.waiting += [hook for found in hooks for hook in found.values()]
            self._record(value, OfModule(own, hooks), attributes_of(value))
            self._record(value._buffers, dict(value._buffers), None)
            self._record(value._modules, dict(value._modules), None)
        elif isinstance(value, type):
            self._add_classes(value)
        elif isinstance(value, types.FunctionType):
            variables = variables_of(value)
            if variables:
                self._record(value, None, variables)
        elif isinstance(value, (types.MethodType, functools.partial, CachedFunction)):
            self.waiting += parts_of(value)
        elif self.near or not isinstance(value, (dict, list, deque, set)) or len(value) <= self.left:
            old = self.before.get(id(value))
            items, attributes = contents(value, old.items if old is not None else None), attributes_of(value)
            if items is not None or attributes is not None:
                self._record(value, items, attributes)
                self._add_classes(type(value))

    def _add_classes(self, kind: type) -> None:
        for c in own_classes(kind):
            if id(c) not in self.records:
                self._record(c, None, attributes_of(c))
                self.waiting += [part for part in vars(c).values() if isinstance(part, types.FunctionType)]

    def _record(self, value: Any, items: Any, attributes: dict | None) -> None:
        size = _size(items) + _size(attributes)
        if size > self.left and not self.near:
            return
        old = self.before.get(id(value), Record(None, None, None))
        large = size > self.left and not isinstance(items, np.ndarray)
        self.left -= 0 if large else size
        items = Whole(items) if large else self._entries(items, old.items)
        self.records[id(value)] = Record(value, items, self._entries(attributes, old.attributes))

    def _entries(self, parts: Any, old: Any) -> Any:
        """The parts of an object, with pictures in place of tensors."""
        if isinstance(parts, dict):
            old = old if isinstance(old, dict) else {}
            return {key: self._entry(value, old.get(key)) for key, value in parts.items()}
        if type(parts) in (list, tuple):
            if CONSTANTS.issuperset(map(type, parts)):
                return parts
            old = [*(old if type(old) is type(parts) else ()), *[None] * len(parts)]
            return type(parts)([self._entry(value, before) for value, before in zip(parts, old, strict=False)])
        if isinstance(parts, set):
            self.waiting += parts
        return parts

    def _entry(self, value: Any, old: Any) -> Any:
        if type(value) in CONSTANTS:
            return value
        if isinstance(value, Tensor):
            if id(value) in self.parameters or hasattr(value, "is_placeholder"):
                return TensorRecord(None, id(value))
            if isinstance(value, nn.Parameter):
                return value
            return self._picture(value, old.values if isinstance(old, TensorRecord) else None)
        if isinstance(value, tuple):
            if CONSTANTS.issuperset(map(type, value)):
                return value
            plain = tuple(value)
            parts = self._entries(plain, old.parts if isinstance(old, TupleOf) else None)
            self.left -= len(parts)
            return value if all(map(operator.is_, parts, plain)) else TupleOf(type(value), parts)
        self.waiting.append(value)
        return value

    def _picture(self, value: Tensor, old: Tensor | None) -> TensorRecord:
        if not self.near:
            self.left -= value.nbytes // _BYTES
            if self.left < 0:
                return TensorRecord(None, id(value))
        # BatchNorm changes its statistics without telling the tensor's version counter: only the values say so.
        unchanged = old is not None and old.device.type == "cpu" and same(old, value)
        return TensorRecord(old if unchanged else value.detach().clone(), id(value))


def contents(value: Any, old: Any) -> Any:
    """A copy of what a container or an array holds, or the state of a generator; None for other objects."""
    if isinstance(value, np.ndarray):
        if isinstance(value, np.memmap) or not value.flags.writeable:
            return None
        return old if same(old, value) else value.copy()
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, (np.random.RandomState, torch.Generator)):
        return value.get_state()
    if isinstance(value, dict):
        return dict(value.items())
    return list(value) if isinstance(value, (list, deque)) else set(value) if isinstance(value, set) else None


def _size(parts: Any) -> int:
    """How many objects it counts for."""
    if isinstance(parts, np.ndarray):
        return 1 + parts.nbytes // _BYTES
    return 1 + len(parts) if isinstance(parts, (dict, list, set)) else 1


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors, arrays and containers of them included; NaN equals itself."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    try:
        if isinstance(a, Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b)
        return bool(a == b)
    except Exception:  # what cannot be compared is taken to have changed
        return False
