"""What a call of a module can change besides its result: random generators, buffers and Python attributes. A `State`
is a picture of all of it, so that a step can be repeated exactly as it was."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selmatch_ext.seeds import RandomState

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_CONTAINERS = (list, dict, set, deque, bytearray)
_CONSTANTS = (int, float, complex, str, bytes, tuple, frozenset, type, type(None))


class State:
    """The state of a module and of the global generators at one moment.

    previous: an earlier state of the same module. Tensors that have not changed since share its memory."""

    def __init__(self, module: nn.Module, device: torch.device, previous: State | None = None):
        self.random = RandomState(device)
        self.of_classes = [_class_attributes(type(m)) for m in module.modules()]
        self.values: dict[tuple, tuple[Any, Any]] = {}  # (module's number, where, name) -> (object, picture of it)
        for key, _, value in _places(module):
            before = previous.values.get(key, (None, None))[1] if previous is not None else None
            picture = _picture(value, before)
            # Of a tensor only the picture: the tensor itself may hold the graph of a whole step.
            self.values[key] = picture if isinstance(value, Tensor) else value, picture

    def change(self, later: State) -> str | None:
        """What has happened since, in words: "draws random numbers" or "changes ...". The running statistics of norms
        do not count."""
        if self.random != later.random:
            return "draws random numbers"
        if self.of_classes != later.of_classes:
            return "changes an attribute of a class"
        for key in self.values.keys() | later.values.keys():
            mine, other = self.values.get(key), later.values.get(key)
            if key[1] != "statistics" and (mine is None or other is None or not _alike(mine, other)):
                return f"changes its {key[1]} {key[2]}"
        return None

    def restore(self, module: nn.Module) -> None:
        """Puts the global generators and `module`, the one that this state is of, back."""
        self.random.restore()
        for key, places, _ in list(_places(module)):
            if key not in self.values:
                del places[key[2]]
        modules = list(module.modules())
        for (number, where, name), (value, picture) in self.values.items():
            places = vars(modules[number]) if where == "attribute" else modules[number]._buffers
            places[name] = _put_back(value, picture)


def _places(module: nn.Module) -> Iterator[tuple[tuple, dict, Any]]:
    """(key, dictionary that holds it, value) of every attribute that is not nn.Module's own, and of every buffer."""
    for number, m in enumerate(module.modules()):
        for name, value in vars(m).items():
            if name not in _OF_EVERY_MODULE:
                yield (number, "attribute", name), vars(m), value
        for name, value in m._buffers.items():
            where = "statistics" if isinstance(m, nn.modules.batchnorm._NormBase) else "buffer"
            yield (number, where, name), m._buffers, value


def _picture(value: Any, before: Any) -> Any:
    """What `value` has to be put back to: a copy of what can change in place, else None."""
    if isinstance(value, Tensor):
        # BatchNorm changes its statistics without telling the tensor's version counter: only the values say so.
        unchanged = isinstance(before, Tensor) and before.device.type == "cpu" and same(before, value)
        return before if unchanged else value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in _CONTAINERS:
        return value.copy()
    return dict(vars(value)) if _is_plain_object(value) else _generator_state(value)


def _put_back(value: Any, picture: Any) -> Any:
    """`value` with the contents it had, in place where others may hold it too."""
    if isinstance(value, Tensor):
        return picture.clone()  # a step that runs on it must not change the picture
    if isinstance(value, np.ndarray):
        value[...] = picture
    elif type(value) in (list, bytearray):
        value[:] = picture
    elif type(value) in (dict, set, deque):
        value.clear()
        (value.extend if isinstance(value, deque) else value.update)(picture)
    elif _is_plain_object(value):
        vars(value).clear()
        vars(value).update(picture)
    elif picture is not None:
        _set_generator(value, picture)
    return value


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, such as a configuration or a counter."""
    foreign = type(value).__module__.partition(".")[0] in (
        "torch",
        "numpy",
        "logging",
        "threading",
        "random",
        "builtins",
    )
    return (
        hasattr(value, "__dict__") and not foreign and not isinstance(value, (nn.Module, type)) and not callable(value)
    )


def _generator_state(value: Any) -> Any:
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.get_state() if isinstance(value, (np.random.RandomState, torch.Generator)) else None


def _set_generator(value: Any, state: Any) -> None:
    if isinstance(value, random.Random):
        value.setstate(state)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = state
    else:
        value.set_state(state)


def _alike(mine: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether two entries of a state say the same. A tensor may have become another one of the same values."""
    (value, picture), (value_of_other, picture_of_other) = mine, other
    if picture is not None or picture_of_other is not None:
        return type(value) is type(value_of_other) and same(picture, picture_of_other)
    return value is value_of_other or (isinstance(value, _CONSTANTS) and same(value, value_of_other))


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors, arrays and containers of them included; NaN equals itself."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[name]) for name, value in a.items())
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    try:
        return bool(a == b)
    except Exception:  # what cannot be compared is taken to have changed
        return False


def signature(module: nn.Module) -> list[Any]:
    """What decides how `module` computes, as far as Python shows it: equal signatures (`same`) of the same object mean
    the same network. Modes are left out; tensors count by shape and, for shared ones, by identity."""
    found: list[Any] = []
    for name, m in module.named_modules(remove_duplicate=False):
        found += [name, id(m), type(m), type(m).forward]
        found += [(key, _plain(value)) for key, value in vars(m).items() if key not in _OF_EVERY_MODULE]
        for key, p in m._parameters.items():
            found.append(
                (key, id(p), None if p is None else (p.shape, tuple(map(id, (p._backward_hooks or {}).values()))))
            )
        found += [(key, None if b is None else b.shape) for key, b in m._buffers.items()]
        found += [tuple(map(id, hooks.values())) for hooks in _hooks(m)]
        found += _class_attributes(type(m))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor", value.shape
    if type(value) in _CONTAINERS:
        return value.copy()
    return value if isinstance(value, _CONSTANTS) else id(value)


def _class_attributes(kind: type) -> list[Any]:
    """Constants that a class of the user's keeps, such as a drop rate."""
    own = [c for c in kind.__mro__ if not c.__module__.startswith(("torch.", "builtins"))]
    return [(n, v) for c in own for n, v in vars(c).items() if isinstance(v, _CONSTANTS) and not n.startswith("__")]


def _hooks(m: nn.Module) -> list[dict]:
    return [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks]


def has_hooks(m: nn.Module) -> bool:
    """Whether something is called beside `m`'s forward."""
    return any(map(len, _hooks(m)))
