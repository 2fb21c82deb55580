"""SelMatch's partial update (arXiv 2406.18561, section 3.3): of the chosen images, which are learned.

Here they are marked, in `DistilledSet.distilled`. Every method keeps the others as they are (`Method.combined`), and an
evaluation augments both kinds in their own ways (`training.combined_augmenter`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.selection.window import whole


def learned_mask(indices: Tensor, ipc: int, alpha: float) -> Tensor:
    """Marks the last int(alpha * ipc) images of each class: the easier part of a window.

    indices: (classes * ipc,), class by class, as `window` returns them. alpha: 0 to 1.
    Returns (classes * ipc,) bool: True = learned, False = selected, which stays as it is. Raises ValueError for another
    shape or alpha.
    """
    if ipc < 1 or indices.ndim != 1 or len(indices) % ipc:
        raise ValueError(f"indices has shape {tuple(indices.shape)}; it must be (classes * ipc,) with ipc {ipc}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; allowed is 0 to 1")
    learned = torch.arange(ipc) >= ipc - whole(alpha, ipc)
    return learned.repeat(len(indices) // ipc)


def marked(chosen: DistilledSet, ipc: int, alpha: float) -> DistilledSet:
    """The set with the share alpha of each class, those that were chosen last, marked as learned. chosen: class by
    class, with ipc images of each, or fewer."""
    if len(chosen) == ipc * len(chosen.class_names):
        return replace(chosen, distilled=learned_mask(chosen.indices, ipc, alpha))
    rows = chosen.indices.split(torch.bincount(chosen.hard_labels, minlength=len(chosen.class_names)).tolist())
    return replace(chosen, distilled=torch.cat([learned_mask(row, len(row), alpha) for row in rows if len(row)]))
