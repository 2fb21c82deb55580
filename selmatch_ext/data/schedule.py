"""The training that a distilled set was made for, which is saved with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selmatch_ext.strict_json import shown

REQUIRED = "schedule_rates", "schedule_batches"
STARTS, OPTIMIZER = "schedule_starts", "schedule_optimizer"


@dataclass
class Schedule:
    """The training that a set was made for (DD, arXiv 1811.10959): SGD of a network `model`, one batch a step.

    rates: (N,) float32, the learning rate of each step. batches: (N, B) int64, the images of each step. starts: (k, P)
    float32, the parameters from which training starts; None = fresh ones, with Xavier weights and zero biases. source:
    the file that the schedule was read from, whose `model` may not be a function of the user's own; None = made here.
    momentum, nesterov, weight_decay: as in `unrolled_sgd`, the same in all steps.
    """

    rates: Tensor
    batches: Tensor
    model: str
    starts: Tensor | None = None
    source: str | None = None
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def check(self, images: int) -> None:
        """ValueError unless the fields fit together and the batches count through `images` images."""
        if not isinstance(self.model, str):
            raise ValueError(f"schedule.model is {shown(self.model)}; it must be the name of a network")
        for name, dtype in (("rates", torch.float32), ("batches", torch.int64), ("starts", torch.float32)):
            value = getattr(self, name)
            if value is not None and value.dtype != dtype:
                raise ValueError(f"schedule.{name} is {value.dtype}; it must be {dtype}")
        if self.rates.ndim != 1 or not (self.rates > 0).all() or not self.rates.isfinite().all():
            raise ValueError("schedule.rates must be (N,) positive numbers")
        if self.batches.ndim != 2 or len(self.batches) != len(self.rates) or self.batches.numel() == 0:
            raise ValueError(
                f"schedule.batches has shape {tuple(self.batches.shape)}; it must be ({len(self.rates)}, B), not empty"
            )
        if int(self.batches.min()) < 0 or int(self.batches.max()) >= images:
            raise ValueError(f"schedule.batches must hold indices of the {images} images")
        starts = self.starts
        if starts is not None and (starts.ndim != 2 or starts.numel() == 0 or not starts.isfinite().all()):
            raise ValueError(f"schedule.starts has shape {tuple(starts.shape)}; it must be (k, P) finite numbers")
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"schedule.{name} is {value}; it must be a finite number, 0 or above")
        if self.nesterov and not self.momentum:
            raise ValueError("schedule.nesterov is True; with momentum 0 it must be False")

    def tensors(self) -> dict[str, Tensor]:
        """All fields but `model` and `source`, by their names in a set's file."""
        found = dict(zip(REQUIRED, (self.rates, self.batches), strict=True))
        if self.starts is not None:
            found[STARTS] = self.starts
        optimizer = self.momentum, float(self.nesterov), self.weight_decay
        if any(optimizer):
            found[OPTIMIZER] = torch.tensor(optimizer, dtype=torch.float64)
        return found


def schedule_of(tensors: dict[str, Tensor], model: str, source: str) -> Schedule:
    """The schedule whose `tensors` are among those of the file `source`, which has those in REQUIRED. Raises ValueError
    for an optimizer that makes no sense; `Schedule.check` finds what else does not."""
    rates, batches = (tensors[name] for name in REQUIRED)
    schedule = Schedule(rates, batches, model, tensors.get(STARTS), source)
    if OPTIMIZER not in tensors:
        return schedule
    values = tensors[OPTIMIZER]
    if values.dtype != torch.float64 or tuple(values.shape) != (3,):
        raise ValueError(f"{OPTIMIZER} is {values.dtype} {tuple(values.shape)}; it must be torch.float64 (3,)")
    momentum, nesterov, weight_decay = values.tolist()
    if nesterov not in (0, 1):
        raise ValueError(f"{OPTIMIZER} holds {nesterov} for whether the momentum is Nesterov's; it must be 0 or 1")
    return replace(schedule, momentum=momentum, nesterov=nesterov == 1, weight_decay=weight_decay)
