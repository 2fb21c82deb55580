"""What the loop writes while it runs: checkpoints to continue from, and snapshots of the set."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selmatch_ext import ranks
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.files import json_field, load_tensors, save_tensors
from selmatch_ext.methods.base import Method
from selmatch_ext.provenance import check_same


class Snapshots:
    """Saves the set after every `every` iterations, before the next checkpoint, so that a resumed run misses none, and
    returns it; None where no snapshot is due."""

    def __init__(self, folder: Path, every: int, last: int, settings: dict[str, Any]):
        self.folder, self.every, self.last, self.settings = folder, every, last, settings

    def __call__(self, method: Method, iteration: int) -> DistilledSet | None:
        if self.every < 1 or not ranks.first() or (iteration % self.every and iteration != self.last):
            return None
        subset = replace(method.distilled(), settings=self.settings)
        subset.save(self.folder / f"iteration_{iteration:06d}.safetensors")
        return subset


class LoopState:
    """A copy of what is learned, of the method's state and of the optimizer's."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer):
        self.tensors = [t.detach().clone() for t in _tensors(method)]
        self.optimizer = copy.deepcopy(optimizer.state_dict())

    def put_back(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        optimizer.load_state_dict(self.optimizer)
        with torch.no_grad():
            for t, value in zip(_tensors(method), self.tensors, strict=True):
                t.copy_(value)


def _tensors(method: Method) -> list[Tensor]:
    return [*method.learned.values(), *method.state.values()]


class Checkpoint:
    """The state of a run in one file: learned tensors, the method's and the optimizer's state, losses, and the settings
    that made them."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.settings = json.loads(json.dumps(settings))

    def save(self, method: Method, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
        """Writes the state; of several processes that have the same, only the first writes."""
        if not ranks.first():
            return
        tensors = {f"learned.{name}": t for name, t in method.learned.items()}
        for name, t in method.learned.items():
            for key, value in optimizer.state.get(t, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        tensors |= {f"state.{name}": t for name, t in method.state.items()} | _group_tensors(optimizer)
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        save_tensors(self.path, "checkpoint", tensors, {"settings": json.dumps(self.settings)})

    def restore(self, method: Method, optimizer: torch.optim.Optimizer) -> list[float]:
        """Loads the state into `method` and `optimizer` where there is a checkpoint; the losses so far.

        Raises ValueError where the checkpoint was made with other settings, has changed since it was written, or does
        not hold exactly the tensors that `method` and `optimizer` have; they are then unchanged."""
        if not self.path.exists():
            return []
        own = {f"learned.{name}": t for name, t in method.learned.items()}
        own |= {f"state.{name}": t for name, t in method.state.items()}
        tensors, metadata = load_tensors(self.path, "checkpoint", "losses", *own)
        check_same(self.path, json_field(metadata, "settings", self.path), self.settings)
        self._check(tensors, own, method, optimizer)
        with torch.no_grad():
            for name, t in own.items():
                t.copy_(tensors[name])
        for name, t in method.learned.items():
            state = _below(tensors, f"optimizer.{name}.")
            if state:
                optimizer.state[t] = state
        for number, group in enumerate(optimizer.param_groups):
            group |= _below(tensors, f"group.{number}.")
        optimizer.load_state_dict(optimizer.state_dict())  # moves each tensor to where the optimizer wants it
        return tensors["losses"].tolist()

    def _check(
        self, tensors: dict[str, Tensor], own: dict[str, Tensor], method: Method, optimizer: torch.optim.Optimizer
    ) -> None:
        """ValueError unless `tensors` are those of `method` and `optimizer`, with their shapes and types."""
        losses = tensors["losses"]
        if losses.ndim != 1 or losses.dtype != torch.float64 or not losses.isfinite().all():
            raise ValueError(
                f"{self.path}: losses is {_kind(losses)}; it must be torch.float64 (iterations,), all finite"
            )
        kept = _optimizer_tensors(method, optimizer)
        for name in sorted(tensors.keys() - own.keys() - kept.keys() - {"losses"}):
            raise ValueError(f"{self.path} holds {name!r}, which method {method.name} does not have")
        for name, (learned, _) in kept.items():
            # What never had a gradient has no state, and is as it was at the beginning
            if name not in tensors and not torch.equal(tensors[learned], own[learned].detach().cpu()):
                raise ValueError(f"{self.path} lacks {name!r}, without which the optimizer cannot continue")
        for name, like in {**own, **{name: value for name, (_, value) in kept.items()}}.items():
            found = tensors.get(name, like)
            if found.shape != like.shape or found.dtype != like.dtype:
                raise ValueError(f"{self.path}: {name} is {_kind(found)}; it must be {_kind(like)}")
            if not name.startswith("state.") and not found.isfinite().all():
                raise ValueError(f"{self.path}: {name} holds NaN or infinite values")


def _optimizer_tensors(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, Tensor]]:
    """The tensors that `optimizer` keeps of each learned one, and of each group, by their names in the file, with the
    name of the learned one, for a group of its first: those that a copy of it has after a step."""
    trial = copy.deepcopy(optimizer)
    copies = {id(t): copied for t, copied in zip(_parameters(optimizer), _parameters(trial), strict=True)}
    for copied in copies.values():
        copied.grad = torch.zeros_like(copied)
    trial.step()
    names = {id(copies[id(t)]): name for name, t in method.learned.items() if id(t) in copies}
    groups = {}
    for name, value in _group_tensors(trial).items():
        first = trial.param_groups[int(name.split(".")[1])]["params"][0]
        groups[name] = f"learned.{names[id(first)]}", value
    return groups | {
        f"optimizer.{name}.{key}": (f"learned.{name}", value)
        for name, t in method.learned.items()
        if id(t) in copies
        for key, value in trial.state.get(copies[id(t)], {}).items()
        if isinstance(value, Tensor)
    }


def _group_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps of a whole group, as the step number of timm's Lamb, by the names in the file."""
    return {
        f"group.{number}.{key}": value
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if isinstance(value, Tensor)
    }


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for group in optimizer.param_groups for t in group["params"]]


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
