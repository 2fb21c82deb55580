"""Difficulty scores of training images: read from files, or computed from networks watched while they train."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selmatch_ext import strict_json
from selmatch_ext.arrays import Arrays, open_arrays
from selmatch_ext.data.images import check_labels
from selmatch_ext.files import plain

WHAT = "score file (.npy, or .npz with scores[, labels])"
HIGHER_IS_EASIER = {
    "cscore": True,
    "forgetting": False,
    "el2n": False,
    "grand": False,
    "aum": True,
    "least-confidence": False,
    "entropy": False,
    "margin": True,
}
"""Kind of score -> its direction."""


def load_scores(path: str | os.PathLike, labels: Tensor, name: str = "the data set") -> Tensor:
    """Reads one score per training image of a data set, in its order.

    path: `.npy` with (n,) numbers, or `.npz` with `scores` (n,) and optionally `labels` (n,), which must be the same as
    `labels`, (n,) int64, those of the data set. name: what messages call it.
    Returns (n,) float64: of the published C-scores many differ in their last bits only. `difficulty` gives them a
    direction.
    Raises FileNotFoundError, OSError where the file cannot be read, and ValueError for a file that is not of this kind,
    is truncated or damaged (.npz has checksums, .npy has none), has another length, other labels, or values that are
    NaN or infinite. What the header declares is compared with the file and the data before memory is taken.
    """
    path = Path(path)
    with open_arrays(path, WHAT) as arrays:
        _check_names(arrays)
        shape, dtype = arrays.header("scores")
        if dtype.kind not in "fiu" or shape != (len(labels),):
            raise ValueError(
                f"scores have dtype {dtype} and shape {shape}; {name} needs numbers of shape ({len(labels)},), "
                "one per training image"
            )
        scores = arrays.read("scores", len(labels) * dtype.itemsize)
        stored_labels = _stored_labels(arrays, len(labels)) if "labels" in arrays.names else None
    with np.errstate(over="ignore"):  # said below
        values = torch.from_numpy(scores.astype(np.float64))
    if not values.isfinite().all():
        bad = (~values.isfinite()).nonzero().squeeze(1)
        raise ValueError(f"{path}: {len(bad)} of {len(values)} scores are NaN or infinite, the first at {int(bad[0])}")
    if stored_labels is not None:
        _check_same_labels(path, stored_labels, labels)
    return values


def describe_scores(path: str | os.PathLike) -> tuple[int, dict]:
    """The number of scores in a file, and how they were made where they were computed here (else {}). Raises as
    `load_scores` does for a file of another kind."""
    with open_arrays(path, WHAT) as arrays:
        _check_names(arrays)
        how = strict_json.parse(arrays.text("how"), "how") if "how" in arrays.names else {}
        return math.prod(arrays.header("scores")[0]), strict_json.mapping(how, "how")


def difficulty(scores: Tensor, kind: str) -> Tensor:
    """Turns scores so that higher = harder. kind: one of HIGHER_IS_EASIER."""
    if kind not in HIGHER_IS_EASIER:
        raise ValueError(f"score kind is {kind!r}; allowed are {', '.join(HIGHER_IS_EASIER)}")
    return -scores if HIGHER_IS_EASIER[kind] else scores


def forgetting_events(correct: Tensor) -> Tensor:
    """How often training unlearns each image (arXiv 1812.05159, section 2).

    correct: (runs, epochs, n) bool: classified correctly after that epoch.
    Returns (n,) float32, higher = harder: epochs at which an image turned from right to wrong. An image that was never
    right in a run counts `epochs` there, more than any other can reach. Averaged over the runs.
    """
    if correct.dtype != torch.bool or correct.ndim != 3 or 0 in correct.shape[:2]:
        raise ValueError(
            f"correct is {correct.dtype} of shape {tuple(correct.shape)}; it must be torch.bool (runs, epochs, n)"
        )
    events = (correct[:, :-1] & ~correct[:, 1:]).sum(1)
    events[~correct.any(1)] = correct.shape[1]
    return events.double().mean(0).float()


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How wrong networks early in training are about each image (EL2N, arXiv 2107.07075, definition 2.3).

    probabilities: (runs, n, K) float, softmax outputs. labels: (n,) int64.
    Returns (n,) float32, higher = harder: the norm of (probabilities - one-hot label), averaged over the runs.
    """
    if not probabilities.is_floating_point() or probabilities.ndim != 3 or probabilities.shape[0] == 0:
        raise ValueError(
            f"probabilities is {probabilities.dtype} {tuple(probabilities.shape)}; it must be float (runs, n, K)"
        )
    check_labels(labels, "labels", probabilities.shape[2])
    if len(labels) != probabilities.shape[1]:
        raise ValueError(f"labels has {len(labels)} entries; probabilities is for {probabilities.shape[1]} images")
    onehot = torch.nn.functional.one_hot(labels, probabilities.shape[2])
    return (probabilities - onehot).norm(dim=2).mean(0).float()


def _check_names(arrays: Arrays) -> None:
    if "scores" not in arrays.names:
        raise ValueError(f"it holds {', '.join(map(plain, arrays.names[:5])) or 'nothing'}, and no 'scores'")


def _stored_labels(arrays: Arrays, count: int) -> np.ndarray:
    shape, dtype = arrays.header("labels")
    if shape != (count,) or dtype.kind not in "iu":
        raise ValueError(f"labels have dtype {dtype} and shape {shape}; expected integers ({count},)")
    return arrays.read("labels", count * dtype.itemsize)


def _check_same_labels(path: Path, stored: np.ndarray, labels: Tensor) -> None:
    different = np.flatnonzero(stored != labels.numpy())
    if len(different):
        i = int(different[0])
        raise ValueError(
            f"{path}: labels differ from the data set's for {len(different)} of {len(labels)} images, the first at {i} "
            f"({stored[i]} there, {int(labels[i])} here): scores of another data set, or of the same in another order"
        )
