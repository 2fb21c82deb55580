"""The base of methods that learn scores: labels of a regression, which need be no probabilities (KIP, FRePo)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.soft_labels import centered, probabilities
from selmatch_ext.methods.base import Method, Task


class ScoreMethod(Method):
    """Base of methods whose targets are scores, one for each image and class. They start as `scale` times the labels
    minus 1/K; where `learns` is True, those of the images marked `distilled` are learned.

    A set with learned scores holds them for regression, and for all else the nearest probabilities as its labels."""

    def __init__(self, task: Task, settings: Any, learns: bool, scale: float = 1.0):
        super().__init__(task, settings)
        self._fixed_scores = scale * centered(self.labels, task.data.classes, task.dtype)
        self.scores = self._fixed_scores[self._where].clone()
        if learns:
            self.learned["scores"] = self.scores.requires_grad_()

    def all_scores(self) -> Tensor:
        """(n, K): the scores of the whole set, learned ones as they are now; differentiable in them."""
        return self._fixed_scores.index_copy(0, self._where, self.scores)

    def distilled(self) -> DistilledSet:
        found = super().distilled()
        if "scores" not in self.learned:
            return found
        scores = self.all_scores().detach().cpu().float()
        return replace(found, labels=probabilities(scores), scores=scores)
