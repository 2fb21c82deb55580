"""A copy of the user's module that the engines may run and change."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selmatch_ext.modules.copying import copied
from selmatch_ext.modules.objects import parts_of, parts_of_function, places_in, walk
from selmatch_ext.modules.state import ModuleState


class PrivateModel:
    """A copy of a module without memory for parameters: they are given at each call. Buffers and Python attributes are
    the copy's own and change from call to call as in ordinary training; buffers are in the dtype of `like`.

    Raises TypeError where the module cannot be copied."""

    def __init__(self, model: nn.Module, like: Tensor):
        self.device = like.device
        self.module = copied(model, _placeholder)
        # Every place of each parameter, in the order of `parameters()`: a shared one has several.
        self.names, self.shapes, placeholders = [], [], []
        for name, p in self.module.named_parameters():
            self.names.append(name)
            self.shapes.append(p.shape)
            placeholders.append(p)
        found: dict[int, list[tuple[dict, str]]] = {id(p): [] for p in placeholders}
        for m in self.module.modules():
            for key, held in m._parameters.items():
                if held is not None:
                    found[id(held)].append((m._parameters, key))
            for key, b in m._buffers.items():
                if b is not None and b.is_floating_point():
                    m._buffers[key] = b.to(like.dtype)
        self.places = list(found.values())
        # Names of parameters that something holds where they cannot be replaced, such as a tuple.
        self.out_of_reach = self._add_places(found, dict(zip(found, self.names, strict=True)))
        # Hooks on parameters change their gradients. They are the user's functions, not copies.
        self.hooks = [list((p._backward_hooks or {}).values()) for p in model.parameters()]
        self.sizes = [shape.numel() for shape in self.shapes]

    def _add_places(self, found: dict[int, list[tuple[Any, Any]]], names: dict[int, str]) -> list[str]:
        """Adds the places of parameters in containers, objects and functions; returns the names of those that are also
        where nothing can take their place."""
        out_of_reach = []
        for value in walk(list(self.module.modules()), functions=True):
            places = [place for place in places_in(value) if id(place[2]) in found]
            for container, key, part in places:
                found[id(part)].append((container, key))
            if not isinstance(value, nn.Module):
                parts = parts_of_function(value) if isinstance(value, types.FunctionType) else parts_of(value)
                replaced = {id(part) for _, _, part in places}
                out_of_reach += [names[id(p)] for p in parts if id(p) in found and id(p) not in replaced]
        return out_of_reach

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a (P,) vector in the parameters' shapes."""
        return [part.view(shape) for part, shape in zip(vector.split(self.sizes), self.shapes, strict=True)]

    def place(self, parameters: list[Tensor]) -> None:
        """The parameters of the calls that follow. They stay, because torch.utils.checkpoint calls parts of the module
        again during the backward pass."""
        for places, tensor in zip(self.places, parameters, strict=True):
            for holder, key in places:
                holder[key] = tensor

    def renew_buffers(self) -> None:
        """Replaces all buffers by copies. Later calls change the copies in place; a graph that is kept from an earlier
        call may still need the buffers that it was made with."""
        for m in self.module.modules():
            m._buffers.update({key: b.clone() for key, b in m._buffers.items() if b is not None})

    def __call__(self, parameters: list[Tensor], x: Tensor) -> Any:
        self.place(parameters)
        return self.module(x)

    def hooked(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the hooks on the model's parameters make of their gradients."""
        result = []
        for gradient, hooks in zip(gradients, self.hooks, strict=True):
            for hook in hooks:
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
            result.append(gradient)
        return tuple(result)

    def state(self, previous: ModuleState | None = None) -> ModuleState:
        return ModuleState(self.module, self.device, previous)

    @contextlib.contextmanager
    def as_it_was(self, state: ModuleState) -> Iterator[None]:
        """Within, the module and the global random generators are as in `state`; afterwards they are as before."""
        now = self.state(state)
        state.restore()
        try:
            yield
        finally:
            now.restore()


def _placeholder(p: nn.Parameter) -> nn.Parameter:
    """Stands for a parameter in the copy, which would otherwise be copied for nothing: one number, which is no number,
    so that no result can come from it unnoticed."""
    value = torch.zeros((), dtype=p.dtype, device=p.device)
    if p.is_floating_point() or p.is_complex():
        value.fill_(torch.nan)
    result = nn.Parameter(value.expand(p.shape), requires_grad=False)
    vars(result)["is_placeholder"] = True  # for records.py
    return result
