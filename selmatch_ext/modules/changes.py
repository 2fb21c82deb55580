"""Compares the records of two moments, and puts objects back to what their records say."""

from __future__ import annotations

import operator
import random
import types
from collections import deque
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selmatch_ext.modules.objects import CONSTANTS, attributes_of, hooks_of, set_variable, variables_of
from selmatch_ext.modules.records import (
    GENERATORS,
    STAND_INS,
    OfModule,
    Record,
    TensorRecord,
    TupleOf,
    Whole,
    contents,
    same,
)

_COMPARED = (int, float, complex, str, bytes, frozenset, torch.device, torch.dtype, range, slice, np.generic)


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
    if isinstance(a, TensorRecord):
        return [] if a.values is None or b.values is None or same(a.values, b.values) else None
    if isinstance(a, TupleOf):
        return _pairs(a.parts, b.parts) if a.kind is b.kind else None
    if isinstance(a, OfModule):
        return _pairs(a.parameters, b.parameters) if a.hooks == b.hooks else None
    if isinstance(a, Whole):
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
        if isinstance(items, Whole):
            if _identical(items.parts, contents(value, None)):
                return
            items = items.parts
        if isinstance(value, nn.Module):
            own = value._parameters
            for name in own.keys() - items.parameters.keys():
                del own[name]
            own.update({name: p for name, p in items.parameters.items() if name not in own})
            for now, hooks in zip(hooks_of(value), items.hooks, strict=True):
                self._dictionary(now, hooks)
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
        elif isinstance(value, GENERATORS) and items is not None:
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
        now = _now(value)
        for name in now.keys() - attributes.keys():
            _remove(value, name)
        for name, part in self._wanted(attributes, now).items():
            if name not in now or part is not now[name]:
                _assign(value, name, part)

    def _wanted(self, parts: Any, now: Any) -> Any:
        """The parts of a record as they have to be; now: as they are."""
        if STAND_INS.isdisjoint(map(type, parts.values() if isinstance(parts, dict) else parts)):
            return parts
        if isinstance(parts, dict):
            return {key: self._value(part, now.get(key)) for key, part in parts.items()}
        now = [*now, *[None] * len(parts)]
        return [self._value(part, current) for part, current in zip(parts, now, strict=False)]

    def _value(self, part: Any, now: Any) -> Any:
        if isinstance(part, TupleOf):
            parts = self._wanted(part.parts, now if type(now) is part.kind else ())
            return part.kind._make(parts) if hasattr(part.kind, "_make") else part.kind(parts)
        if not isinstance(part, TensorRecord):
            return part
        if part.values is None:
            return now
        if part.number not in self.tensors:
            kept = isinstance(now, Tensor) and now.device.type == "cpu" and same(now.detach(), part.values)
            # A copy: a step that runs on it must not change the picture.
            self.tensors[part.number] = now if kept else part.values.clone()
        return self.tensors[part.number]


def _now(value: Any) -> dict:
    return variables_of(value) if isinstance(value, types.FunctionType) else attributes_of(value) or {}


def _in_a_slot(value: Any, name: str) -> bool:
    return isinstance(getattr(type(value), name, None), types.MemberDescriptorType)


def _assign(value: Any, name: str, part: Any) -> None:
    if isinstance(value, type):
        setattr(value, name, part)
    elif isinstance(value, types.FunctionType):
        set_variable(value, name, part)
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
        vars(value).pop(name, None)


def _set_generator(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.set_state(state)
