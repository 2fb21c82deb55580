"""Copies of a user's module, which share nothing with it that a call may change."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from selmatch_ext.modules.objects import (
    EMPTY,
    CachedFunction,
    attributes_of,
    cell_value,
    hooks_of,
    reaches,
    referred,
    walk,
)


def copied(model: nn.Module, stand_in: Callable[[nn.Parameter], nn.Parameter]) -> nn.Module:
    """A deep copy of `model`, with `stand_in(p)` in place of each parameter p.

    Functions that refer to a part of the model, such as a `forward` that was replaced on an instance, refer to that of
    the copy. Raises TypeError where the module cannot be copied."""
    memo: dict[int, Any] = {id(p): stand_in(p) for p in model.parameters()}
    for m in model.modules():
        # deepcopy refuses results of operations, such as the weight that torch.nn.utils.weight_norm computes.
        memo |= {id(t): t.detach().clone() for t in vars(m).values() if isinstance(t, Tensor) and t.grad_fn is not None}
    try:
        result = copy.deepcopy(model, memo)
        functions = _Functions({id(part) for part in (*model.modules(), *model.parameters())}, memo)
        hooks = [hooks for m in result.modules() for hooks in hooks_of(m) if hooks]
        functions.replace_in([*result.modules(), *hooks])
    except Exception as error:
        raise TypeError(f"model, a {type(model).__name__}, cannot be copied by copy.deepcopy: {error}") from error
    return result


class _Functions:
    """Copies functions that refer to the original model: deepcopy leaves functions as they are.
    (net.forward = lambda x: 2 * Net.forward(net, x) is such a one.)

    own: ids of the parts of the original. memo: deepcopy's, which knows the copy of each part."""

    def __init__(self, own: set[int], memo: dict[int, Any]):
        self.own, self.memo = own, memo
        self.copies: dict[int, types.FunctionType] = {}

    def replace_in(self, roots: list[Any]) -> None:
        """Puts copies in place of functions in modules and containers of the copied model, and in what they hold."""
        copies = {id(value) for value in (*roots, *self.memo.values())}  # what __deepcopy__ left as it is stays so
        for value in walk(roots, functions=False):
            if id(value) not in copies:
                continue
            if isinstance(value, functools.partial):
                state = tuple(map(self._moved, (value.func, value.args, value.keywords)))
                if any(a is not b for a, b in zip(state, (value.func, value.args, value.keywords), strict=True)):
                    value.__setstate__((*state, vars(value)))  # type: ignore[attr-defined]  # not in typeshed
            for places in (value, vars(value) if attributes_of(value) and hasattr(value, "__dict__") else None):
                if isinstance(places, (dict, list)):
                    for key, part in list(places.items() if isinstance(places, dict) else enumerate(places)):
                        moved = self._moved(part)
                        if moved is not part:
                            places[key] = moved

    def _moved(self, value: Any) -> Any:
        """`value` of the copied model with copies in place of functions; itself where there are none."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, CachedFunction) and reaches(value, self.own):
            return self._part(value)
        if isinstance(value, weakref.ref):
            return self._part(value)
        if type(value) is tuple:
            parts = tuple(map(self._moved, value))
            return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
        return value

    def _part(self, value: Any) -> Any:
        """What takes the place of `value`, which a function of the original refers to."""
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if not reaches(value, self.own):
            return value
        if isinstance(value, CachedFunction):
            return functools.lru_cache(**value.cache_parameters())(self._part(value.__wrapped__))
        if isinstance(value, weakref.ref):
            return weakref.ref(copy.deepcopy(value(), self.memo))
        if id(value) not in self.memo:
            self.replace_in([copy.deepcopy(value, self.memo)])
        result = copy.deepcopy(value, self.memo)
        if result is value:
            raise TypeError(f"a function refers to it by way of {value!r:.80}, which stays the same object in a copy")
        return result

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self.copies:
            return self.copies[id(function)]
        if not reaches(function, self.own):
            return function
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        moving = {name: value for name, value in referred(function) if reaches(value, self.own)}
        scope = dict(function.__globals__) if moving else function.__globals__
        result = types.FunctionType(function.__code__, scope, function.__name__, None, cells or None)
        self.copies[id(function)] = result  # before its parts are copied: it may refer to itself
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            if cell_value(original) is not EMPTY:
                cell.cell_contents = self._part(original.cell_contents)
        scope.update((name, self._part(value)) for name, value in moving.items())
        result.__defaults__ = function.__defaults__ and tuple(map(self._part, function.__defaults__))
        if function.__kwdefaults__:
            result.__kwdefaults__ = {name: self._part(value) for name, value in function.__kwdefaults__.items()}
        vars(result).update(vars(function))
        return result
