"""The step that trajectory matching compares (ATT, arXiv 2407.14245)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def nearest_step(step: Callable[[Tensor, int], Tensor], start: Tensor, target: Tensor, steps: int) -> int:
    """The number of steps, from 1 to `steps`, after which the student is nearest to `target` (P,) by the sum of
    absolute differences, as in the public code; the smallest such number.

    step(theta, i): the parameters (P,) after step i, counted from 0. Draws from torch's global generators within it are
    taken back, so that the steps can be repeated with the same ones."""
    theta, distances = start, list[Tensor]()
    with torch.random.fork_rng([start.device] if start.device.type == "cuda" else []):
        for i in range(steps):
            theta = step(theta, i)
            distances.append((theta - target).abs().sum())
    return 1 + int(torch.stack(distances).argmin())
