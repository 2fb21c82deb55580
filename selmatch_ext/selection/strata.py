"""Coverage-centric coreset selection (CCS, arXiv 2210.15809): all difficulties but the hardest, in equal numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from selmatch_ext.selection.window import check_difficulty, without_hardest


def ccs(difficulty: Tensor, labels: Tensor, ipc: int, cutoff: float, strata: int, generator: torch.Generator) -> Tensor:
    """In every class: leaves out the share `cutoff` of the hardest images, cuts the range of difficulties of the others
    into `strata` parts of equal width, and takes random images, as equally many from each part as there are (CCS, arXiv
    2210.15809, algorithm 1, which does so over all classes together).

    difficulty: (n,) float, higher = harder. labels: (n,) int64. generator: on the CPU.
    Returns (classes * ipc,) int64 indices, class by class, in each class hardest first; of equally hard ones the lower
    index first. Raises ValueError as `window` does, and where too few images are left after the cut-off."""
    check_difficulty(difficulty, labels, ipc)
    if strata < 1:
        raise ValueError(f"strata is {strata}; allowed is 1 and above")
    chosen = []
    for members in without_hardest(difficulty, labels, ipc, cutoff):
        scores = difficulty[members].double()
        parts = strata_of(scores, strata)
        counts = torch.bincount(parts, minlength=strata)
        taken = torch.zeros(len(members), dtype=torch.bool)
        for part, count in enumerate(shares(counts.tolist(), ipc)):
            places = (parts == part).nonzero().squeeze(1)
            taken[places[torch.randperm(len(places), generator=generator)[:count]]] = True
        chosen.append(members[taken])
    return torch.cat(chosen)


def strata_of(scores: Tensor, strata: int) -> Tensor:
    """(m,) int64, 0 to strata − 1: in which of so many parts of equal width, from the lowest to the highest score, each
    score lies; the upper end belongs to the last part. Equal scores are all in part 0."""
    low, high = scores.min(), scores.max()
    if low == high:
        return torch.zeros(len(scores), dtype=torch.int64)
    return ((scores - low) / (high - low) * strata).long().clamp(max=strata - 1)


def shares(counts: list[int], total: int) -> list[int]:
    """How many of `total` images each stratum gives, which has counts[i]: from the smallest on, the lower index first,
    all of it, or its equal share of what is still to be taken, rounded down. They sum to `total`.

    Raises ValueError where there are fewer images than `total`."""
    if total > sum(counts):
        raise ValueError(f"total is {total}; allowed is at most {sum(counts)}, the images of all strata")
    given, left = [0] * len(counts), total
    for done, part in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        given[part] = min(counts[part], left // (len(counts) - done))
        left -= given[part]
    return given
