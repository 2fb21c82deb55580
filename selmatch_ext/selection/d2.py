"""D2 pruning (arXiv 2310.07931): difficult images that are not like each other, by messages along a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from selmatch_ext.selection.coreset import check_features
from selmatch_ext.selection.window import check_difficulty, without_hardest
from selmatch_ext.settings import Graph


def d2(difficulty: Tensor, features: Tensor, labels: Tensor, ipc: int, settings: Graph) -> Tensor:
    """In every class: leaves out the share `settings.cutoff` of the hardest images, adds to the difficulty of each of
    the others that of its nearest neighbors, and takes the highest one by one, each time lowering those of its
    neighbors (D2 pruning, arXiv 2310.07931, section 3.2); see `messages`.

    difficulty: (n,) float, higher = harder; where a class has negative ones, they are shifted to begin at 0, because a
    neighbor that counts negatively would repel. features: (n, F) float. labels: (n,) int64.
    Returns (classes * ipc,) int64 indices, class by class in the order of choice. In float64. Raises ValueError as
    `window` does, and where too few images are left after the cut-off."""
    check_difficulty(difficulty, labels, ipc)
    check_features(features, labels)
    chosen = []
    for members in without_hardest(difficulty, labels, ipc, settings.cutoff):
        members = members.sort().values
        scores = difficulty[members].double()
        scores = scores - scores.min().clamp(max=0)
        chosen.append(members[messages(scores, features[members].double(), ipc, settings)])
    return torch.cat(chosen)


def messages(scores: Tensor, features: Tensor, count: int, settings: Graph) -> list[int]:
    """Chooses `count` images of one class by messages between neighbors (D2 pruning, arXiv 2310.07931).

    scores: s (m,), ≥ 0; features: (m, F); both float64. The neighbors of image i are the `settings.neighbors` other
    images with the smallest Euclidean distance d_ij to it, or all other images where the class has fewer.
    1. Every score grows at once: s_i ← s_i + Σ_{j neighbor of i} exp(−d_ij) s_j.
    2. Repeatedly: the image i with the largest score is chosen (of equal ones that with the lowest index), and the
       scores of its neighbors j fall: s_j ← s_j − exp(−gamma d_ij) s_i.
    Returns indices into the class in the order of choice."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    order = distances.fill_diagonal_(torch.inf).sort(dim=1, stable=True)
    nearest, far = (t[:, : min(settings.neighbors, len(scores) - 1)] for t in (order.indices, order.values))
    scores = scores + ((-far).exp() * scores[nearest]).sum(1)
    open_, chosen = torch.ones(len(scores), dtype=torch.bool), list[int]()
    while len(chosen) < count:
        best = int(scores.where(open_, -torch.inf).argmax())
        chosen.append(best)
        open_[best] = False
        scores[nearest[best]] -= (-settings.gamma * far[best]).exp() * scores[best]
    return chosen
