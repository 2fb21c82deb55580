"""Which parameters trajectory matching compares (PAD, arXiv 2408.03360; EDF, arXiv 2410.17193)."""

from __future__ import annotations

import torch
from torch import Tensor

from selmatch_ext.selection.window import whole


@torch.no_grad()
def compared(student: Tensor, target: Tensor, first: float, smallest: float) -> Tensor:
    """(k,) int64, ascending: the parameters that the distance is taken over.

    student, target: (P,). first: share of the parameters that is left out from the front, so from the first layers
    (PAD's paper). smallest: share of the others that is left out, those whose squared error is smallest (EDF, and the
    public code of PAD); of equal ones those in front."""
    skipped = whole(first, len(student))
    errors = (student - target)[skipped:].square()
    order = errors.argsort(stable=True)[whole(smallest, len(errors)) :]
    return order.sort().values + skipped
