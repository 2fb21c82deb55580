"""What the Python objects of a user's module consist of, for the code that copies, compares and restores them."""

from __future__ import annotations

import argparse
import functools
import sys
import types
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Iterator
from typing import Any

from torch import nn

LIMIT = 10_000  # objects that a walk visits; it takes a few milliseconds
CONSTANTS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_CONTAINERS = (dict, list, tuple, deque, set, frozenset)
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy"}
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def is_foreign(kind: Any) -> bool:
    """Whether a class or function is of Python's own library, of torch or of numpy, into which nothing looks."""
    module = getattr(kind, "__module__", None)
    if isinstance(kind, types.FunctionType):  # whose __module__ functools.wraps replaces
        module = kind.__globals__.get("__name__")
    return (module or "builtins").partition(".")[0] in _FOREIGN


def is_large(value: Any) -> bool:
    """Whether a value is a container of more than `LIMIT` entries."""
    return isinstance(value, _CONTAINERS) and len(value) > LIMIT


def entries_of(value: Any) -> dict[Any, Any] | None:
    """The entries of a container by key or number, and the attributes of an object; None for what has neither."""
    attributes = attributes_of(value)
    if not isinstance(value, _CONTAINERS):
        return attributes
    return (dict(value.items()) if isinstance(value, dict) else dict(enumerate(value))) | (attributes or {})


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object or class of the user's, and those of a module that not every module has; None for
    what has none, and for functions and Python modules."""
    if isinstance(value, nn.Module):
        return {name: part for name, part in vars(value).items() if name not in _OF_EVERY_MODULE}
    if isinstance(value, type):
        return None if is_foreign(value) else _of_class(value)
    kind = type(value)
    if is_foreign(kind) and kind not in _NAMESPACES:
        return None
    slots = [name for c in kind.__mro__ for name in _names(vars(c).get("__slots__", ())) if hasattr(value, name)]
    found = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__")}
    if hasattr(value, "__dict__"):
        return found | vars(value)
    return found if slots else None


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _of_class(kind: type) -> dict[str, Any]:
    """What a class keeps beside its methods, properties and the like."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("__") and not hasattr(type(value), "__get__")
    }


def own_classes(kind: type) -> list[type]:
    """The class and its bases, without those of Python, torch and numpy."""
    return [c for c in kind.__mro__ if not is_foreign(c)]


def referred(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of the global variables that a function, or a function inside it, may read."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            if name in function.__globals__:
                yield name, function.__globals__[name]


def hooks_of(m: nn.Module) -> list[dict]:
    """The module's hooks, of each kind."""
    return [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]


EMPTY = object()
_VARIABLE, _DEFAULT = "variable ", "default "  # with a space: no names of attributes
CachedFunction = type(functools.lru_cache(len))


def cell_value(cell: types.CellType) -> Any:
    """What a variable of an enclosing function holds, `EMPTY` where it was not assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def variables_of(function: types.FunctionType) -> dict[str, Any]:
    """What a function of the user's keeps from call to call, by names: the variables of the enclosing functions,
    default values and attributes. Empty for functions that keep nothing that could change."""
    cells = [cell_value(cell) for cell in function.__closure__ or ()]
    found = dict(vars(function)) if not is_foreign(function) else {}
    if is_foreign(function) or all(isinstance(v, type) for v in cells):  # `super()` needs the class
        cells = []
    found |= {f"{_VARIABLE}{name}": v for name, v in zip(function.__code__.co_freevars, cells, strict=False)}
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return found | {f"{_DEFAULT}{i}": v for i, v in enumerate(given) if type(v) not in CONSTANTS}


def set_variable(function: types.FunctionType, name: str, value: Any) -> None:
    """Sets one of `variables_of`. Default values cannot be set; they are changed in place."""
    if name.startswith(_VARIABLE):
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name[len(_VARIABLE) :])]
        if value is not EMPTY:
            cell.cell_contents = value
        elif cell_value(cell) is not EMPTY:
            del cell.cell_contents
    elif not name.startswith(_DEFAULT):
        vars(function)[name] = value


def parts_of(value: Any) -> list[Any]:
    """What a container, an object, a bound method and the like refer to, as far as it can be the user's.
    Containers of more than `LIMIT` entries are not looked into."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, CachedFunction):
        return [value.__wrapped__]
    if isinstance(value, weakref.ref):
        return [value()]
    found = [*value._modules.values(), *value._parameters.values()] if isinstance(value, nn.Module) else []
    found += ({} if is_large(value) else entries_of(value) or {}).values()
    return [part for part in found if type(part) not in CONSTANTS]


def parts_of_function(function: types.FunctionType) -> list[Any]:
    """All that a function of the user's refers to."""
    if is_foreign(function):
        return []
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    cells = map(cell_value, function.__closure__ or ())
    return [*cells, *given, *(value for _, value in referred(function))]


class _Cell:
    """A variable of an enclosing function, as a container."""

    def __init__(self, cell: types.CellType):
        self.cell = cell

    def __setitem__(self, _: Any, value: Any) -> None:
        self.cell.cell_contents = value


def places_in(value: Any) -> list[tuple[Any, Any, Any]]:
    """(container, key, part) of every part of an object that `container[key] = other` replaces."""
    if isinstance(value, dict):
        return [(value, key, part) for key, part in value.items()]
    if isinstance(value, (list, deque)):
        return [(value, i, part) for i, part in enumerate(value)]
    if isinstance(value, functools.partial):
        return [(value.keywords, name, part) for name, part in value.keywords.items()]
    if isinstance(value, types.FunctionType):
        cells = [(_Cell(cell), 0, cell_value(cell)) for cell in value.__closure__ or ()]
        named = [(value.__kwdefaults__, name, part) for name, part in (value.__kwdefaults__ or {}).items()]
        return cells + named + [(value.__globals__, name, part) for name, part in referred(value)]
    own = vars(value) if attributes_of(value) and hasattr(value, "__dict__") and not isinstance(value, type) else {}
    return [(own, name, part) for name, part in own.items() if name not in _OF_EVERY_MODULE]


def walk(roots: list[Any], functions: bool) -> Iterator[Any]:
    """The roots and what can be reached from them, near things first, at most `LIMIT` objects beside the roots.
    functions: whether also by way of functions."""
    waiting, seen = deque(roots), {id(root): root for root in roots}
    limit = LIMIT + len(seen)
    while waiting:
        value = waiting.popleft()
        yield value
        if not isinstance(value, types.FunctionType):
            parts = parts_of(value)
        else:
            parts = parts_of_function(value) if functions else []
        for part in parts:
            if id(part) not in seen and len(seen) < limit:
                seen[id(part)] = part
                waiting.append(part)


def reaches(value: Any, wanted: set[int]) -> bool:
    """Whether one of the objects with the ids `wanted` can be reached from `value`."""
    return any(id(part) in wanted for part in walk([value], functions=True))
