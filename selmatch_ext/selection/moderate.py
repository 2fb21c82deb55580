"""Moderate coreset (ICLR 2023): images neither near the center of their class nor far from it."""

from __future__ import annotations

from torch import Tensor

from selmatch_ext.selection import coreset


def moderate(features: Tensor, labels: Tensor, ipc: int) -> Tensor:
    """In every class the ipc images whose distance to the mean of the class's features is nearest to the median of
    these distances, the nearest first ("Moderate coreset", ICLR 2023; its code ranks over all classes together, and
    takes the median of each feature for the center).

    features: (n, F) float; labels: (n,) int64. The median of an even number is the mean of the middle two. Of equally
    near images the one with the lower index. In float64. Returns (classes * ipc,) int64 indices, class by class."""
    return coreset.by_class(features, labels, ipc, _nearest_to_median)


def _nearest_to_median(x: Tensor, ipc: int) -> list[int]:
    distances = (x - x.mean(0)).norm(dim=1)
    middle = distances.sort().values[[(len(x) - 1) // 2, len(x) // 2]].mean()
    return (distances - middle).abs().sort(stable=True).indices[:ipc].tolist()
