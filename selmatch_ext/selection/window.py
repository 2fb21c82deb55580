"""SelMatch's sliding window over difficulty (arXiv 2406.18561, section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selmatch_ext.data.images import check_labels

MOST = 10000  # values of beta in a search, each of which costs the training of networks


def window(
    difficulty: Tensor, labels: Tensor, ipc: int, beta: float, beta_unit: Literal["class", "ipc"] = "class"
) -> Tensor:
    """Chooses `ipc` images of every class: in each, hardest first, skips a share and takes the next ones (section 3.2).

    difficulty: (n,) float, higher = harder. labels: (n,) int64, 0 to classes-1.
    beta: with beta_unit "class", the share of the class that is skipped, as the paper says; with "ipc", a multiple of
    `ipc`, as the public code does. Either way a whole number of images, rounded down.
    Returns (classes * ipc,) int64 indices, class by class, hardest first; of equally hard ones the lower index first.
    Raises ValueError for a class without images, an ipc larger than a class, and a beta that runs past a class.
    """
    counts = check_difficulty(difficulty, labels, ipc)
    if beta_unit not in ("class", "ipc"):
        raise ValueError(f"beta_unit is {beta_unit!r}; allowed are 'class' and 'ipc'")
    if not beta >= 0 or (beta_unit == "class" and beta > 1):
        raise ValueError(f"beta is {beta}; allowed is 0 to 1 (beta_unit 'class') or 0 and above (beta_unit 'ipc')")
    chosen = []
    for label, count in enumerate(counts):
        unit = count if beta_unit == "class" else ipc
        skip = whole(beta, unit)
        if skip + ipc > count:
            raise ValueError(
                f"beta {beta} runs past class {label}: it skips {skip} of {count} images and ipc {ipc} does not fit "
                f"after them; allowed is a beta of at most {(count - ipc) / unit:.6g}"
            )
        members = (labels == label).nonzero().squeeze(1)
        order = difficulty[members].sort(descending=True, stable=True).indices
        chosen.append(members[order[skip : skip + ipc]])
    return torch.cat(chosen)


def beta_grid(
    class_size: int, ipc: int, step: float = 0.1, beta_unit: Literal["class", "ipc"] = "class"
) -> list[float]:
    """The values of beta that a window search tries: 0, step, 2 step, …, and the last that fits: 1 - ipc / class_size,
    or with beta_unit "ipc" class_size / ipc - 1.

    class_size: images in the smallest class.
    """
    if not 0 < ipc <= class_size:
        raise ValueError(f"ipc is {ipc}; allowed is 1 to {class_size}, the size of the smallest class")
    last = 1 - ipc / class_size if beta_unit == "class" else class_size / ipc - 1
    largest = max(1, last)
    if not 0 < step <= largest:
        raise ValueError(f"step is {step}; allowed is above 0, up to {largest:g}")
    if last / step > MOST:
        raise ValueError(f"step is {step}, which makes {last / step:.3g} windows to try; allowed are at most {MOST}")
    inner = [round(i * step, 10) for i in range(int(last / step) + 1)]
    return [beta for beta in inner if beta < last - 1e-9] + [last]


def whole(share: float, count: int) -> int:
    """share * count rounded down to a whole number; floating-point error (0.29 * 100 = 28.99…) does not lose one."""
    return int(share * count + 1e-6)


def check_classes(labels: Tensor, ipc: int) -> list[int]:
    """Images in each class. Raises ValueError for a class without images and for an ipc larger than a class."""
    check_labels(labels, "labels")
    counts = torch.bincount(labels).tolist()
    if 0 in counts:
        raise ValueError(
            f"class {counts.index(0)} is empty: labels go to {len(counts) - 1}, but none is {counts.index(0)}"
        )
    if not 0 < ipc <= min(counts):
        smallest = counts.index(min(counts))
        raise ValueError(f"ipc is {ipc}; allowed is 1 to {min(counts)}, the size of class {smallest}, the smallest")
    return counts


def without_hardest(difficulty: Tensor, labels: Tensor, ipc: int, cutoff: float) -> list[Tensor]:
    """Of each class the indices of its images, hardest first, without the share `cutoff` of the hardest, a whole number
    of images, rounded down; of equally hard ones the lower index first.

    Raises ValueError for a cutoff that is not from 0 to 1, or that leaves fewer than ipc images of a class."""
    if not 0 <= cutoff <= 1:
        raise ValueError(f"cutoff is {cutoff}; allowed is 0 to 1")
    kept = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        skip = whole(cutoff, len(members))
        if len(members) - skip < ipc:
            raise ValueError(
                f"cutoff {cutoff} leaves {len(members) - skip} of {len(members)} images of class {label}, and ipc is "
                f"{ipc}; allowed is a cutoff of at most {(len(members) - ipc) / len(members):.6g}"
            )
        kept.append(members[difficulty[members].sort(descending=True, stable=True).indices[skip:]])
    return kept


def check_difficulty(difficulty: Tensor, labels: Tensor, ipc: int) -> list[int]:
    """As `check_classes`; also raises ValueError for difficulties that are not (n,) finite numbers."""
    counts = check_classes(labels, ipc)
    if difficulty.shape != labels.shape:
        raise ValueError(f"difficulty has shape {tuple(difficulty.shape)}; labels has {tuple(labels.shape)}")
    if not difficulty.isfinite().all():
        raise ValueError(f"difficulty holds {int((~difficulty.isfinite()).sum())} values that are NaN or infinite")
    return counts
