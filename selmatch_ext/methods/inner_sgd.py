"""Settings of methods whose loss contains training on the set by `unrolled_sgd`: the optimizer of those inner steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from selmatch_ext.ranges import Checked, Decay, Momentum, SettingError


@dataclass(frozen=True)
class InnerSGD(Checked):
    """Base of the settings of such a method. Raises SettingError for Nesterov's momentum where there is no momentum."""

    inner_momentum: Momentum = 0.0
    """Momentum of the inner steps, of the student that is trained on the set in each iteration. Above 0, or with
    inner_weight_decay, a second parameter vector is kept for each inner step."""
    inner_nesterov: bool = False
    """Whether inner_momentum is Nesterov's."""
    inner_weight_decay: Decay = 0.0
    """Weight decay of the inner steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_nesterov and not self.inner_momentum:
            raise SettingError("inner_nesterov", True, "False where inner_momentum is 0")

    def inner_optimizer(self) -> dict[str, Any]:
        """Keyword arguments of `unrolled_sgd`, and of `Schedule`."""
        return {
            "momentum": self.inner_momentum,
            "nesterov": self.inner_nesterov,
            "weight_decay": self.inner_weight_decay,
        }
