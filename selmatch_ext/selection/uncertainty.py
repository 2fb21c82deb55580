"""How unsure a trained network is about each image: least confidence, entropy and margin of its predictions."""

from __future__ import annotations

import torch
from torch import Tensor


def least_confidence(probabilities: Tensor) -> Tensor:
    """(n,) of probabilities (n, K): 1 − the largest one. Higher = less sure."""
    return 1 - probabilities.max(1).values


def entropy(probabilities: Tensor) -> Tensor:
    """(n,) of probabilities (n, K): −Σ p log p in nats, with 0 log 0 = 0. Higher = less sure."""
    return -torch.xlogy(probabilities, probabilities).sum(1)


def margin(probabilities: Tensor) -> Tensor:
    """(n,) of probabilities (n, K): the largest minus the second largest. LOWER = less sure. With one class it is 1."""
    if probabilities.shape[1] == 1:
        return probabilities[:, 0].clone()
    top = probabilities.topk(2, 1).values
    return top[:, 0] - top[:, 1]
