"""What the distances take as a list of tensors."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Tensor | Iterable[Tensor] | Mapping[str, Tensor]  # what a public function takes as a list of tensors

PLAIN = {Tensor, torch.nn.Parameter}


def as_lists(given: dict[str, Any], allowed: str, single: bool = False, missing: bool = False) -> list[list[Any]]:
    """The arguments `given`, by name, as lists: of iterables their elements, of dicts of parameters their values.

    Dicts are compared by their names: each is read in the order of the first one. allowed: how an error describes what
    may be given. single: a tensor alone may be given too. missing: None may stand in place of a tensor.
    Raises TypeError for what is no list of tensors, ValueError for dicts of other names.
    """
    names, lists = None, []
    for argument, value in given.items():
        if isinstance(value, (list, tuple)):
            value = list(value)
        elif single and isinstance(value, Tensor):
            value = [value]
        elif isinstance(value, (Mapping, torch.nn.ParameterDict)):
            names = list(value.keys()) if names is None else names
            value = _by_name(argument, value, names)
        elif isinstance(value, Iterable) and not isinstance(value, (Tensor, str, bytes)):
            value = list(value)
        else:
            raise TypeError(f"{argument} must be {allowed}, got {type(value).__name__}")
        lists.append(value)
        if set(map(type, value)) <= PLAIN:  # all at once: a network has a hundred parameters
            continue
        for i, element in enumerate(value):
            if not isinstance(element, Tensor) and not (missing and element is None):
                raise TypeError(f"{argument} must be {allowed}, got {type(element).__name__} at position {i}")
    return lists


def _by_name(argument: str, value: Any, names: list[str]) -> list[Any]:
    different = sorted(map(str, set(value.keys()) ^ set(names)))
    if different:
        raise ValueError(f"{argument} and the dict before it must have the same names; only one has {different[0]!r}")
    return [value[name] for name in names]
