"""Labels that are not classes: scores, which a regression is trained on, and the probabilities that stand for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """What networks are trained on by the squared error: the loss of image i is weights[i]·½·‖output − scores[i]‖².

    scores: (n, K) float. weights: (n,) float, on the same device; None = all 1."""

    scores: Tensor
    weights: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the scores, as of a tensor."""
        return self.scores.device

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device) -> Regression:
        """The same on another device."""
        return Regression(self.scores.to(device), None if self.weights is None else self.weights.to(device))

    def loss(self, outputs: Tensor, indices: Tensor) -> Tensor:
        """The mean loss, 0-d, of the images at `indices` (b,), which the network answers by `outputs` (b, K)."""
        errors = (outputs - self.scores[indices]).square().sum(1) / 2
        return (errors if self.weights is None else self.weights[indices] * errors).mean()


def centered(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, K) scores of ordinary labels: 1 − 1/K for the class of an image and −1/K for the others (KIP, FRePo); or its
    probabilities minus 1/K.

    labels: (n,) int64, or (n, K) float probabilities."""
    if not labels.is_floating_point():
        labels = torch.nn.functional.one_hot(labels, classes)
    return labels.to(dtype) - 1 / classes


def probabilities(scores: Tensor) -> Tensor:
    """(n, K) probabilities that stand for scores (n, K), of the same type: the nearest ones to scores + 1/K by the
    Euclidean distance. They undo `centered`, and keep the order of the classes.

    Source: projection onto the simplex, Duchi et al., ICML 2008, figure 1."""
    classes = scores.shape[1]
    values = scores.double() + 1 / classes
    ordered = values.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, classes + 1, device=scores.device)
    count = (ordered > excess).sum(1, keepdim=True)
    return (values - excess.gather(1, count - 1)).clamp(min=0).to(scores.dtype)
