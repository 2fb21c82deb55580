"""What a network was when it was compared with what was read from it."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor, nn

from selmatch_ext.modules.objects import CONSTANTS, LIMIT, attributes_of, entries_of, hooks_of, is_large, own_classes


def signature(module: nn.Module) -> list[Any]:
    """What decides how `module` computes, as far as Python shows it: equal signatures of the same object mean the same
    network. Modes are left out; tensors count by shape and, for shared ones, by identity.

    It consists of numbers, strings and ids, and keeps no object of the user's alive."""
    found: list[Any] = []
    for name, m in module.named_modules(remove_duplicate=False):
        found += [name, id(m), id(type(m)), id(type(m).forward)]
        for key, p in m._parameters.items():
            hooks = tuple(map(id, (getattr(p, "_backward_hooks", None) or {}).values()))
            found.append((key, id(p), None if p is None else (*p.shape,), hooks))
        found += [(key, None if b is None else (*b.shape,)) for key, b in m._buffers.items()]
        found += [tuple(map(id, hooks.values())) for hooks in hooks_of(m)]
    modules = list(module.modules())
    classes = dict.fromkeys(c for m in modules for c in own_classes(type(m)))
    return found + _described([attributes_of(part) or {} for part in (*modules, *classes)])


def _described(attributes: list[dict[str, Any]]) -> list[Any]:
    """What dictionaries hold, and the nearest `LIMIT` objects inside that, without the objects."""
    found: list[Any] = [tuple(parts) for parts in attributes]
    waiting = deque(part for parts in attributes for name, part in parts.items() if name != "training")
    left = len(waiting) + LIMIT
    seen: dict[int, int] = {}
    while waiting:
        value = waiting.popleft()
        if type(value) in CONSTANTS:
            found.append(value)
        elif isinstance(value, Tensor):
            found.append(("tensor", *value.shape))
        elif id(value) in seen or is_large(value) or left <= 0:
            found.append(seen.get(id(value), id(value)))
        else:
            parts = None if isinstance(value, (nn.Module, type)) else entries_of(value)
            if parts is None:  # a function, a class, or a module, of which the registered ones are in `attributes`
                found.append(id(value))
                continue
            seen[id(value)] = -len(seen)  # no id
            left -= 1 + len(parts)
            found.append((type(value).__qualname__, *(key if type(key) in CONSTANTS else id(key) for key in parts)))
            waiting += parts.values()
    return found
