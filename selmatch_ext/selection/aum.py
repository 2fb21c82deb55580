"""Area under the margin (AUM, arXiv 2001.10528), the difficulty that CCS uses (arXiv 2210.15809)."""

from __future__ import annotations

import torch
from torch import Tensor


def own_margin(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(n,): the probability of the right class minus the largest one of the others; LOWER = harder. With one class it
    is 1. probabilities: (n, K) float; labels: (n,) int64."""
    own = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    if probabilities.shape[1] == 1:
        return own
    return own - probabilities.scatter(1, labels.unsqueeze(1), -torch.inf).max(1).values


def area(margins: Tensor) -> Tensor:
    """(n,) float32 of the margins (runs, epochs, n) after every epoch: their sum over the epochs, averaged over the
    runs. LOWER = harder. CCS takes margins of probabilities, as here; the AUM paper those of logits, averaged."""
    return margins.double().sum(1).mean(0).float()
