"""GraNd (arXiv 2107.07075): the norm of the gradient of each image's loss, early in training."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gradient_norm(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """(n,) float32, higher = harder: the norm of the gradient of each image's cross-entropy at the last layer's weight
    and bias, ‖softmax − one-hot‖ √(1 + ‖features‖²) (GraNd, arXiv 2107.07075, definition 2.1, with that layer in place
    of all).

    logits: (n, K) float; features: (n, F) float, what enters the last layer; labels: (n,) int64."""
    errors = logits.double().softmax(1) - F.one_hot(labels, logits.shape[1])
    return (errors.norm(dim=1) * (1 + features.double().square().sum(1)).sqrt()).float()
