"""Pictures of objects that a call of a module may change in place: taken, compared and put back."""

from __future__ import annotations

import math
import operator
import random
import types
from collections import deque
from collections.abc import Container, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from selmatch_ext.models.objects import CONSTANTS, LIMIT, attributes_of, own_classes

_COMPARED = (int, float, complex, str, bytes, frozenset, torch.device, torch.dtype, range, slice, np.generic)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_BYTES = 1024  # of a tensor or array count as much as one object


class _Picture(NamedTuple):
    """Stands for a tensor. The tensor itself is not kept: it may hold the graph of a whole step."""

    values: Tensor | None  # None: not looked at
    number: int  # of one tensor in several places: the same


class _Tuple(NamedTuple):
    """Stands for a tuple that holds tensors."""

    kind: type
    parts: tuple


class _Whole(NamedTuple):
    """Stands for what a container held that is too large to be looked into."""

    parts: Any


_STAND_INS = frozenset({_Picture, _Tuple})


class Record(NamedTuple):
    """An object that can be changed in place, and what it held. Among the parts of a container a `_Picture` stands for
    a tensor; another object that can change stands for itself, and has a record of its own."""

    value: Any
    items: Any  # of a container a dictionary, list or set; of a module its parameters; else a state
    attributes: dict | None


class Recorder:
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
            self._record(value, own, attributes_of(value))
            self._record(value._buffers, dict(value._buffers), None)
            self._record(value._modules, dict(value._modules), None)
        elif isinstance(value, type):
            self._add_classes(value)
        elif self.near or not isinstance(value, (dict, list, deque, set)) or len(value) <= self.left:
            old = self.before.get(id(value))
            items, attributes = _contents(value, old.items if old is not None else None), attributes_of(value)
            if items is not None or attributes is not None:
                self._record(value, items, attributes)
                self._add_classes(type(value))

    def _add_classes(self, kind: type) -> None:
        for c in own_classes(kind):
            if id(c) not in self.records:
                self._record(c, None, attributes_of(c))

    def _record(self, value: Any, items: Any, attributes: dict | None) -> None:
        size = _size(items) + _size(attributes)
        if size > self.left and not self.near:
            return
        old = self.before.get(id(value), Record(None, None, None))
        large = size > self.left and not isinstance(items, np.ndarray)
        self.left -= 0 if large else size
        items = _Whole(items) if large else self._entries(items, old.items)
        self.records[id(value)] = Record(value, items, self._entries(attributes, old.attributes))

    def _entries(self, parts: Any, old: Any) -> Any:
        """The parts of an object, with pictures in place of tensors."""
        if isinstance(parts, dict):
            old = old if isinstance(old, dict) else {}
            return {key: self._entry(value, old.get(key)) for key, value in parts.items()}
        if isinstance(parts, (list, tuple)):
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
            if isinstance(value, nn.Parameter) or id(value) in self.parameters:
                return value
            return self._picture(value, old.values if isinstance(old, _Picture) else None)
        if isinstance(value, tuple):
            if CONSTANTS.issuperset(map(type, value)):
                return value
            plain = tuple(value)
            parts = self._entries(plain, old.parts if isinstance(old, _Tuple) else None)
            self.left -= len(parts)
            return value if all(map(operator.is_, parts, plain)) else _Tuple(type(value), parts)
        self.waiting.append(value)
        return value

    def _picture(self, value: Tensor, old: Tensor | None) -> _Picture:
        if not self.near:
            self.left -= value.nbytes // _BYTES
            if self.left < 0:
                return _Picture(None, id(value))
        # BatchNorm changes its statistics without telling the tensor's version counter: only the values say so.
        unchanged = old is not None and old.device.type == "cpu" and same(old, value)
        return _Picture(old if unchanged else value.detach().clone(), id(value))


def _contents(value: Any, old: Any) -> Any:
    """A copy of what a container or an array holds, or the state of a generator; None for other objects."""
    if isinstance(value, np.ndarray):
        if isinstance(value, np.memmap) or not value.flags.writeable:
            return None
        return old if same(old, value) else value.copy()
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else value.getstate()
    if isinstance(value, _GENERATORS):
        return value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state()
    if isinstance(value, dict):
        return dict(value.items())
    return list(value) if isinstance(value, (list, deque)) else set(value) if isinstance(value, set) else None


def _size(parts: Any) -> int:
    """How many objects it counts for."""
    if isinstance(parts, np.ndarray):
        return 1 + parts.nbytes // _BYTES
    return 1 + len(parts) if isinstance(parts, (dict, list, set)) else 1


class Comparison:
    """Of the records of two moments. registered: ids of modules that are compared by themselves, and not as a part of
    what refers to them."""

    def __init__(self, mine: dict[int, Record], others: dict[int, Record], registered: Container[int]):
        self.mine, self.others, self.registered = mine, others, registered

    def first_difference(self, number: int) -> str | None:
        """The name of the first attribute, or entry, of the object with the id `number` that differs."""
        records = self.mine[number], self.others.get(number, Record(None, None, {}))
        mine, other = (r.items if r.attributes is None else r.attributes for r in records)
        for name in [*mine, *(other.keys() - mine.keys())]:
            if name not in mine or name not in other:
                return name
            a, b = mine[name], other[name]
            if not (a is b and type(a) in CONSTANTS) and not self._alike(a, b):
                return name
        return None

    def _alike(self, mine: Any, other: Any) -> bool:
        """Whether two entries say the same. An object may have become another one that holds the same."""
        waiting, seen = [(mine, other)], set()
        while waiting:
            a, b = waiting.pop()
            if (a is b and (type(a) in CONSTANTS or id(a) in self.registered)) or (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            record, of_other = self.mine.get(id(a)), self.others.get(id(b))
            if isinstance(a, tuple):
                found = _pairs(a, b)
            elif record is not None and of_other is not None and type(a) is type(b):
                found = _pairs(record.items, of_other.items)
                more = _pairs(record.attributes, of_other.attributes)
                found = None if found is None or more is None else found + more
                if found is not None and isinstance(a, nn.Module):
                    found += [(a._buffers, b._buffers), (a._modules, b._modules)]
            else:
                found = [] if a is b or (isinstance(a, _COMPARED) and same(a, b)) else None
            if found is None:
                return False
            waiting += found
        return True


def _pairs(a: Any, b: Any) -> list[tuple[Any, Any]] | None:
    """What has to be alike for `a` and `b`, parts of records, to be alike; None where they differ."""
    if type(a) is not type(b):
        return None
    if isinstance(a, _Picture):
        return [] if a.values is None or b.values is None or same(a.values, b.values) else None
    if isinstance(a, _Tuple):
        return _pairs(a.parts, b.parts) if a.kind is b.kind else None
    if isinstance(a, _Whole):
        return [] if _identical(a.parts, b.parts) else None
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return None
        a, b = list(a.values()), [b[key] for key in a]
    if isinstance(a, (list, tuple)):
        pairs = zip(a, b, strict=False)
        different = [(x, y) for x, y in pairs if x is not y or type(x) not in CONSTANTS]
        return different if len(a) == len(b) else None
    return [] if same(a, b) else None


def _identical(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects."""
    if type(a) is not type(b) or len(a) != len(b):
        return False
    if isinstance(a, set):
        return a == b
    return all(map(operator.is_, a, b)) and (not isinstance(a, dict) or _identical([*a.values()], [*b.values()]))


class PutBack:
    """Puts objects back to what their records say, in place; what is so already is left alone."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}  # by their numbers: one tensor in several places stays one

    def __call__(self, record: Record) -> None:
        value, items = record.value, record.items
        if isinstance(items, _Whole):
            if _identical(items.parts, _contents(value, None)):
                return
            items = items.parts
        if isinstance(value, nn.Module):
            for name in value._parameters.keys() - items.keys():
                del value._parameters[name]
            value._parameters.update({name: p for name, p in items.items() if name not in value._parameters})
        elif isinstance(value, dict):
            self._dictionary(value, items)
        elif isinstance(value, (list, deque)):
            wanted = self._wanted(items, value)
            if len(wanted) != len(value) or not all(map(operator.is_, wanted, value)):
                value.clear()
                value.extend(wanted)
        elif isinstance(value, set):
            value.clear()
            value.update(items)
        elif isinstance(value, np.ndarray):
            value[...] = items
        elif isinstance(value, bytearray):
            value[:] = items
        elif isinstance(value, _GENERATORS) and items is not None:
            _set_generator(value, items)
        if record.attributes is not None:
            self._attributes(value, record.attributes)

    def _dictionary(self, value: dict, items: dict) -> None:
        now = dict(value.items())
        wanted = self._wanted(items, now)
        if len(wanted) != len(now) or any(key not in now or part is not now[key] for key, part in wanted.items()):
            value.clear()
            for key, part in wanted.items():  # `update` of collections.Counter adds
                value[key] = part

    def _attributes(self, value: Any, attributes: dict) -> None:
        now = attributes_of(value) or {}
        for name in now.keys() - attributes.keys():
            _remove(value, name)
        for name, part in self._wanted(attributes, now).items():
            if name not in now or part is not now[name]:
                _assign(value, name, part)

    def _wanted(self, parts: Any, now: Any) -> Any:
        """The parts of a record as they have to be; now: as they are."""
        if _STAND_INS.isdisjoint(map(type, parts.values() if isinstance(parts, dict) else parts)):
            return parts
        if isinstance(parts, dict):
            return {key: self._value(part, now.get(key)) for key, part in parts.items()}
        now = [*now, *[None] * len(parts)]
        return [self._value(part, current) for part, current in zip(parts, now, strict=False)]

    def _value(self, part: Any, now: Any) -> Any:
        if isinstance(part, _Tuple):
            parts = self._wanted(part.parts, now if type(now) is part.kind else ())
            return part.kind._make(parts) if hasattr(part.kind, "_make") else part.kind(parts)
        if not isinstance(part, _Picture):
            return part
        if part.values is None:
            return now
        if part.number not in self.tensors:
            kept = isinstance(now, Tensor) and now.device.type == "cpu" and same(now.detach(), part.values)
            # A copy: a step that runs on it must not change the picture.
            self.tensors[part.number] = now if kept else part.values.clone()
        return self.tensors[part.number]


def _in_a_slot(value: Any, name: str) -> bool:
    return isinstance(getattr(type(value), name, None), types.MemberDescriptorType)


def _assign(value: Any, name: str, part: Any) -> None:
    if isinstance(value, type):
        setattr(value, name, part)
    elif _in_a_slot(value, name):
        object.__setattr__(value, name, part)
    else:  # whatever the class does when an attribute is set
        vars(value)[name] = part


def _remove(value: Any, name: str) -> None:
    if isinstance(value, type):
        delattr(value, name)
    elif _in_a_slot(value, name):
        object.__delattr__(value, name)
    else:
        del vars(value)[name]


def _set_generator(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.set_state(state)


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
