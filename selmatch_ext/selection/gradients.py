"""Coresets whose weighted gradient is near that of all images: CRAIG (arXiv 1906.01827), GradMatch (arXiv 2103.00123).

The gradient of an image is that of its cross-entropy at the last linear layer, (softmax − one-hot) ⊗ (features, 1). The
outer products are never made: all that is needed are their inner products, ⟨a ⊗ u, b ⊗ v⟩ = ⟨a, b⟩⟨u, v⟩, so the work
is done class by class on (m, m) float64 matrices of the m images of a class (200 MB each for 5000 images).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext.data.images import check_labels
from selmatch_ext.selection import coreset

TINY = 1e-9  # relative to the largest inner product with the target: below it a gain is rounding


@dataclass(frozen=True)
class LastLayer:
    """Gradients at the last layer: errors[i] ⊗ inputs[i] of image i. errors: (n, K) float64. inputs: (n, F + 1)
    float64, what enters the layer, and a 1 for the bias. labels: (n,) int64."""

    errors: Tensor
    inputs: Tensor
    labels: Tensor

    @classmethod
    def of(cls, logits: Tensor, features: Tensor, labels: Tensor) -> LastLayer:
        """logits: (n, K) float; features: (n, F) float; labels: (n,) int64. ValueError where they do not fit
        together or hold values that are not finite."""
        coreset.check_features(logits, labels, "logits")
        coreset.check_features(features, labels)
        check_labels(labels, "labels", logits.shape[1])
        own = F.one_hot(labels, logits.shape[1]).bool()
        others = logits.double().softmax(1).masked_fill(own, 0.0)
        errors = others - own * others.sum(1, keepdim=True)  # p − 1 of the own class, without the rounding of 1 − p
        inputs = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], 1)
        return cls(errors, inputs, labels)

    def products(self, members: Tensor, rows: Literal["own", "all"] = "all") -> np.ndarray:
        """(m, m) inner products of the gradients of images of one class. rows: the whole layer, or only its row of that
        class."""
        errors, inputs = self.errors[members], self.inputs[members]
        if rows == "own":
            errors = errors[:, self.labels[members[:1]]]
        return ((errors @ errors.T) * (inputs @ inputs.T)).numpy()


def craig(gradients: LastLayer, ipc: int) -> tuple[Tensor, Tensor]:
    """In every class the ipc images that greedily maximize the facility location Σ_i max_j (C − ‖g_i − g_j‖), C the
    largest distance, so that Σ_i min_j ‖g_i − g_j‖ becomes small (CRAIG, arXiv 1906.01827, algorithm 1).

    The weight of an image is the number of images of its class of which it is the nearest that was chosen, the first
    chosen of equally near ones; all weights are scaled to mean 1. Returns (classes * ipc,) int64 indices, class by
    class in the order of choice, and float32 weights. ValueError as for other coresets."""
    chosen, counts = [], []
    for members in coreset.members(gradients.labels, ipc):
        distances = _distances(gradients.products(members))
        picked = facility_location(distances, ipc)
        chosen.append(members[picked])
        counts.append(torch.from_numpy(np.bincount(distances[:, picked].argmin(1), minlength=ipc)))
    return torch.cat(chosen), _mean_one(torch.cat(counts).double())


def facility_location(distances: np.ndarray, count: int) -> list[int]:
    """`count` indices in the order of choice: each adds most to Σ_i max_{j chosen} (C − distances[j, i]), C the largest
    distance; of equal ones the lower index. At least 1 − 1/e of the best possible sum (Nemhauser 1978).

    Lazy: the gain of an image only falls while others are chosen, so its last one is an upper bound, and only the image
    with the largest bound is computed again. distances: (m, m) float64, symmetric."""
    similarity = distances.max() - distances
    reached = np.zeros(len(distances))
    bounds = [(-_gain(similarity[j], reached), j) for j in range(len(similarity))]
    heapq.heapify(bounds)
    chosen: list[int] = []
    while len(chosen) < count:
        _, j = heapq.heappop(bounds)
        current = (-_gain(similarity[j], reached), j)
        if bounds and current > bounds[0]:
            heapq.heappush(bounds, current)
            continue
        chosen.append(j)
        reached = np.maximum(reached, similarity[j])
    return chosen


def gradmatch(
    gradients: LastLayer,
    ipc: int,
    ridge: float = 0.5,
    rows: Literal["own", "all"] = "own",
    fill: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """In every class up to ipc images, and weights w ≥ 0 with a small ‖Σ w_i g_i − G‖² + ridge ‖w‖², G the sum of the
    gradients of the class (GradMatch, arXiv 2103.00123, algorithm 2), see `pursuit`.

    A class can get fewer than ipc images: where no other one makes the sum smaller, and where a weight becomes 0. With
    `fill` (on the CPU), random images of the class with weight 1 stand for those that are missing, after the others'
    weights have been scaled to mean 1; without it the result is shorter than classes * ipc, and a class all of whose
    gradients are 0 raises ValueError. Returns indices, class by class in the order of choice, and float32 weights."""
    chosen, weights, classes = [], [], coreset.members(gradients.labels, ipc)
    for label, members in enumerate(classes):
        picked, found = pursuit(gradients.products(members, rows), ipc, ridge)
        picked, found = picked[found > 0], found[found > 0]
        if fill is None and len(picked) == 0:
            raise ValueError(f"class {label}: all gradients are 0, so there is nothing to match; train fewer epochs")
        chosen.append(members[picked])
        weights.append(torch.from_numpy(found))
    found_all = torch.cat(weights)
    weights = list(_mean_one(found_all).split([len(w) for w in weights])) if len(found_all) else weights
    if fill is not None:
        for label, members in enumerate(classes):
            rest = members[~torch.isin(members, chosen[label])]
            added = rest[torch.randperm(len(rest), generator=fill)[: ipc - len(chosen[label])]]
            chosen[label] = torch.cat([chosen[label], added])
            weights[label] = torch.cat([weights[label].float(), torch.ones(len(added))])
    return torch.cat(chosen), torch.cat(weights)


def pursuit(products: np.ndarray, count: int, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative orthogonal matching pursuit of the sum G of all gradients: adds the image with the largest inner
    product with what is missing, G − Σ w_i g_i, and solves for the weights of all that were added, until there are
    `count` or that inner product is no longer above 0.

    products: (m, m) float64, inner products of the gradients. Returns the indices in the order of choice and their
    weights, ≥ 0. Of equal inner products the lower index."""
    with_sum = products.sum(1)
    chosen, weights = np.empty(0, dtype=np.int64), np.empty(0)
    while len(chosen) < count:
        missing = with_sum - products[:, chosen] @ weights
        missing[chosen] = -np.inf
        best = int(missing.argmax())
        if missing[best] <= TINY * np.abs(with_sum).max():
            break
        chosen, weights = np.append(chosen, best), np.append(weights, 0.0)
        normal = products[np.ix_(chosen, chosen)] + ridge * np.eye(len(chosen))
        weights = nonnegative_solution(normal, with_sum[chosen], weights)
    return chosen, weights


def nonnegative_solution(normal: np.ndarray, wanted: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The w ≥ 0 that minimizes wᵀ normal w − 2 wᵀ wanted: for normal = AᵀA + ridge·I and wanted = Aᵀ G the weights of
    non-negative least squares with rows √ridge·I added (Lawson and Hanson 1974, chapter 23).

    start: (k,) ≥ 0, where to begin: the solution of a smaller problem, with 0 for what was added since."""
    weights, free = start.copy(), start > 0
    for _ in range(10 * len(start) + 10):
        slack = np.where(free, -np.inf, wanted - normal @ weights)
        enters = int(slack.argmax())
        if slack[enters] <= TINY * np.abs(wanted).max():
            break
        free[enters] = True
        while free.any():
            solved = np.zeros_like(weights)
            solved[free] = _solve(normal[np.ix_(free, free)], wanted[free])
            stops = free & (solved <= 0)
            if not stops.any():
                weights = solved
                break
            # As far towards the solution as all weights stay ≥ 0; what reaches 0 is no longer free.
            step = float((weights[stops] / (weights[stops] - solved[stops])).min()) if weights[stops].all() else 0.0
            weights = np.maximum(weights + step * (solved - weights), 0.0)
            free &= ~(stops & (weights <= TINY * weights.max()))
            weights[~free] = 0.0
    return weights


def _solve(normal: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(normal, wanted)
    except np.linalg.LinAlgError:  # images with the same gradient, and no ridge
        return np.linalg.lstsq(normal, wanted, rcond=None)[0]


def _distances(products: np.ndarray) -> np.ndarray:
    squares = products.diagonal()
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0))
    np.fill_diagonal(distances, 0.0)
    return distances


def _mean_one(weights: Tensor) -> Tensor:
    return (weights / weights.mean()).float()


def _gain(similarity: np.ndarray, reached: np.ndarray) -> float:
    return float(np.maximum(similarity - reached, 0).sum())
