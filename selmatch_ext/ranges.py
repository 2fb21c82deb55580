"""The range of every number among the settings, declared with its type, and the one check of all of them.

A field of a settings class is annotated with one of the types below (`epochs: Count = 100`); `check` compares the
field with the range in its type. Bounds are wide: they refuse what cannot work, not what is unusual.
"""

from __future__ import annotations

import functools
import math
import numbers
import types
import typing
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The allowed values of a number: from `low` to `high`, each of them included unless `above` or `below` is set."""

    low: float
    high: float
    above: bool = False
    """low itself is not allowed."""
    below: bool = False
    """high itself is not allowed."""

    def __contains__(self, value: float) -> bool:
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (str(end) if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"{'above ' * self.above}{low} to {'below ' * self.below}{high}"


MOST = 10**8

Count = Annotated[int, Range(1, MOST)]
Number = Annotated[int, Range(0, MOST)]  # of something counted from 0, or how often, 0 = never
Pixels = Annotated[int, Range(1, 4096)]  # a side of an image; all images are held in memory
Channels = Annotated[int, Range(1, 65536)]
Depth = Annotated[int, Range(1, 100)]
Seed = Annotated[int, Range(-(2**63), 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
Part = Annotated[float, Range(0, 1, above=True, below=True)]  # neither none nor all
Skipped = Annotated[float, Range(0, 1, below=True)]  # not all
Weight = Annotated[float, Range(0, 1, above=True)]
Beta = Annotated[float, Range(0, 1e6)]  # a share of the class, or a multiple of ipc
Spacing = Annotated[float, Range(0.001, 1e6)]  # each value of the grid costs the training of networks
Rate = Annotated[float, Range(0, 1e30)]  # step sizes; 0 learns nothing
Positive = Annotated[float, Range(0, 1e30, above=True)]
Decay = Annotated[float, Range(0, 1e6)]
Momentum = Annotated[float, Range(0, 1, below=True)]
Seconds = Annotated[float, Range(0, 1e9)]


class SettingError(ValueError):
    """A setting whose value is not allowed. name: the field; given: its value."""

    def __init__(self, name: str, given: Any, allowed: str):
        super().__init__(f"{name} is {given}; allowed is {allowed}")
        self.name, self.given, self.allowed = name, given, allowed


@dataclass(frozen=True)
class Checked:
    """Base of the settings: refuses numbers that are not in their ranges."""

    def __post_init__(self) -> None:
        check(self)


def check(settings: object) -> None:
    """SettingError for the first field of a dataclass whose number is NaN, infinite, of another type or not in its
    range, or whose value is none of those that its type names. None passes where the type allows it."""
    kind: Any = type(settings)  # to mypy a class is not Hashable, which the caches below ask for
    for name, names in named_fields(kind).items():
        if vars(settings)[name] not in names:
            raise SettingError(name, repr(vars(settings)[name]), ", ".join(map(str, names)))
    for name, (number, allowed, optional, several) in numeric_fields(kind).items():
        given = vars(settings)[name]
        if given is None and optional:
            continue
        for value in given if several and isinstance(given, (tuple, list)) else [given]:
            check_number(name, value, Annotated[number, allowed])


def check_number(name: str, value: Any, annotation: Any) -> None:
    """SettingError unless `value` is in the range of one of the types above, for a number that stands alone."""
    kind, allowed, _, _ = _read(annotation)
    if kind is None or allowed is None:
        raise TypeError(f"{name} has no number with a range as its type, but {annotation}")
    if not _is(value, kind) or value not in allowed:
        raise SettingError(name, value, f"{'a whole number from ' * (kind is int)}{allowed}")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        return False
    return kind is int or math.isfinite(value)


@functools.cache
def numeric_fields(settings: type) -> dict[str, tuple[type, Range, bool, bool]]:
    """Of each numeric field of a settings class: int or float, its range, whether it may be None, and whether it is a
    tuple of numbers. TypeError for a number without a range."""
    hints = get_type_hints(settings, include_extras=True)
    found = {}
    for field in fields(settings):
        kind, allowed, optional, several = _read(hints[field.name])
        if kind is not None:
            if allowed is None:
                raise TypeError(f"{settings.__name__}.{field.name} is a number without a range; see ranges.py")
            found[field.name] = kind, allowed, optional, several
    return found


@functools.cache
def named_fields(settings: type) -> dict[str, tuple]:
    """The allowed values of each field of a settings class whose type is a Literal, or one of several that are; None is
    one where the type allows it."""
    hints = get_type_hints(settings)
    found = {f.name: _named(hints[f.name]) for f in fields(settings)}
    return {name: values for name, values in found.items() if values is not None}


def _named(hint: Any) -> tuple | None:
    """The values of a Literal, of an Optional or other union of Literals; None for other types."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is type(None):
        return (None,)
    if origin is Literal:
        return inside
    if origin is Annotated:
        return _named(inside[0])
    if origin not in (Union, types.UnionType):
        return None
    parts = [_named(part) for part in inside]
    known = [part for part in parts if part is not None]
    return tuple(value for part in known for value in part) if len(known) == len(parts) else None


def _read(hint: Any) -> tuple[type | None, Range | None, bool, bool]:
    """What the annotation of a setting allows: the type of its numbers (int, float, or None where it is no number),
    their range (None: any), whether the setting may be None, and whether it is a tuple of such numbers."""
    if hint in (int, float):
        return hint, None, False, False
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, _, optional, several = _read(inside[0])
        return kind, next((extra for extra in inside[1:] if isinstance(extra, Range)), None), optional, several
    if origin in (Union, types.UnionType, tuple):
        for part in inside:
            kind, allowed, optional, several = _read(part)
            if kind is not None:
                return kind, allowed, optional or type(None) in inside, several or origin is tuple
    return None, None, False, False


def settings_classes(*modules: types.ModuleType) -> list[type]:
    """The settings classes that are defined in modules."""
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return [kind for kind in dict.fromkeys(found) if issubclass(kind, Checked) and kind is not Checked]


__all__ = [name for name, value in list(globals().items()) if typing.get_origin(value) is Annotated]
__all__ += ["Checked", "Range", "SettingError", "check", "check_number", "named_fields", "numeric_fields"]
__all__ += ["settings_classes"]
