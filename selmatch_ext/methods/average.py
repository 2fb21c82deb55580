"""The moving average of what a method learns (FTD, arXiv 2211.11004; DATM, arXiv 2310.05773)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from selmatch_ext.methods.base import Method


class MovingAverage:
    """mean ← decay · mean + (1 − decay) · learned after each update, from what is learned at the beginning. The means
    belong to the method's state, so that a run that is continued has the same ones."""

    def __init__(self, method: Method, decay: float):
        self.decay = decay
        self.learned = list(method.learned.values())
        self.means = [t.detach().clone() for t in self.learned]
        method.state |= {f"mean.{name}": mean for name, mean in zip(method.learned, self.means, strict=True)}

    def update(self) -> None:
        """Takes in what is learned now."""
        for mean, t in zip(self.means, self.learned, strict=True):
            mean.mul_(self.decay).add_(t.detach(), alpha=1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, what is learned has the values of the means."""
        kept = [t.detach().clone() for t in self.learned]
        self._put(self.means)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: list[torch.Tensor]) -> None:
        for t, value in zip(self.learned, values, strict=True):
            t.copy_(value)
