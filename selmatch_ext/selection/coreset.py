"""Coresets: small training sets of real images, chosen class by class. Windows over a score are in window.py, and other
coresets in the files of their names.

All functions return (classes * ipc,) int64 indices, class by class, in the order of choice, and raise ValueError for a
class without images or an ipc larger than a class, naming the class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selmatch_ext.selection.window import check_classes

BY_NETWORK = ("herding", "k-center", "moderate", "craig", "gradmatch", "d2")
"""Ways to choose that need a network trained on all training images, whose settings are start.features."""
BY_SCORE = {
    "forgetting": "forgetting",
    "el2n": "el2n",
    "grand": "grand",
    "aum": "aum",
    "c-score": "cscore",
    "least-confidence": "least-confidence",
    "entropy": "entropy",
    "margin": "margin",
}
"""Hardest first: way to choose -> kind of score (see selection/scores.py)."""
BY_DIFFICULTY = ("window", "ccs", "d2", *BY_SCORE)
"""Ways to choose that need the difficulty of each image, whose settings are start.scores."""


def random(labels: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """ipc random images of every class. labels: (n,) int64; generator: on the CPU."""
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:ipc]] for m in members(labels, ipc)])


def herding(features: Tensor, labels: Tensor, ipc: int) -> Tensor:
    """In every class greedily the image that brings the mean of those chosen nearest to the class mean (Welling 2009;
    iCaRL, arXiv 1611.07725, algorithm 4).

    features: (n, F) float; labels: (n,) int64. Of equally good images the one with the lower index. In float64."""
    return by_class(features, labels, ipc, _herd)


def k_center(features: Tensor, labels: Tensor, ipc: int) -> Tensor:
    """In every class the image nearest to the class mean, then greedily the one farthest from all that are chosen
    (Sener and Savarese, arXiv 1708.00489, algorithm 1).

    features: (n, F) float; labels: (n,) int64. Of equally far images the one with the lower index. In float64."""
    return by_class(features, labels, ipc, _farthest)


def _herd(x: Tensor, ipc: int) -> list[int]:
    # Step k minimizes |k mean - sum of chosen - x|; times n, so that whole numbers stay whole and ties stay ties.
    n, total, squares = len(x), x.sum(0), x.square().sum(1)
    chosen: list[int] = []
    added = torch.zeros_like(total)
    for k in range(1, ipc + 1):
        cost = n * squares - 2 * (x @ (k * total - n * added))
        cost[chosen] = torch.inf
        chosen.append(int(cost.argmin()))
        added += x[chosen[-1]]
    return chosen


def _farthest(x: Tensor, ipc: int) -> list[int]:
    n, total, squares = len(x), x.sum(0), x.square().sum(1)
    chosen = [int((n * squares - 2 * (x @ total)).argmin())]
    distance = torch.full((n,), torch.inf, dtype=x.dtype)
    while len(chosen) < ipc:
        newest = chosen[-1]
        distance = torch.minimum(distance, squares + squares[newest] - 2 * (x @ x[newest]))
        distance[chosen] = -torch.inf
        chosen.append(int(distance.argmax()))
    return chosen


def by_class(features: Tensor, labels: Tensor, ipc: int, choose: Callable[[Tensor, int], list[int]]) -> Tensor:
    """(classes * ipc,) indices, class by class: what `choose` takes of a class's features (m, F), in float64. Raises
    ValueError as `check_features` does."""
    check_features(features, labels)
    return torch.cat([m[choose(features[m].double(), ipc)] for m in members(labels, ipc)])


def check_features(features: Tensor, labels: Tensor, name: str = "features") -> None:
    """ValueError unless `features`, called `name`, is (n, F), float and finite, with a row for each label."""
    if features.ndim != 2 or len(features) != len(labels) or not features.is_floating_point():
        raise ValueError(
            f"{name} is {features.dtype} of shape {tuple(features.shape)}; it must be float ({len(labels)}, …), one "
            "row per label"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} holds {int((~features.isfinite()).sum())} values that are NaN or infinite")


def members(labels: Tensor, ipc: int) -> list[Tensor]:
    """Indices of each class's images, ascending. Raises ValueError as `check_classes` does."""
    return [(labels == label).nonzero().squeeze(1) for label in range(len(check_classes(labels, ipc)))]
