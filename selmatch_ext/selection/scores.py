"""Difficulty scores of training images: read from files, or computed from networks watched while they train."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selmatch_ext.data.images import ImageData, check_labels

HIGHER_IS_EASIER = {"cscore": True, "forgetting": False, "el2n": False}


def load_scores(path: str | os.PathLike, data: ImageData) -> Tensor:
    """Reads one score per training image of `data`, in its order.

    path: `.npy` with (n,) numbers, or `.npz` with `scores` (n,) and optionally `labels` (n,), which must be `data`'s.
    Returns (n,) float32; `difficulty` gives them a direction.
    Raises FileNotFoundError, and ValueError for a file that is not of this kind, is truncated, has another length,
    other labels, or values that are NaN or infinite.
    """
    path = Path(path)
    labels = data.train.labels
    content = _read(path)
    scores, stored_labels = content["scores"], content.get("labels")
    if scores.dtype.kind not in "fiu" or scores.shape != (len(labels),):
        raise ValueError(
            f"{path}: scores have dtype {scores.dtype} and shape {scores.shape}; "
            f"{data.name} needs numbers of shape ({len(labels)},), one per training image"
        )
    scores = torch.from_numpy(scores.astype(np.float32))
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero().squeeze(1)
        raise ValueError(f"{path}: {len(bad)} of {len(scores)} scores are NaN or infinite, the first at {int(bad[0])}")
    if stored_labels is not None:
        _check_same_labels(path, stored_labels, labels)
    return scores


def describe(path: str | os.PathLike) -> tuple[int, dict]:
    """The number of scores in a file, and how they were made where they were computed here (else {}). Raises as
    `load_scores` does for a file of another kind."""
    content = _read(Path(path))
    return content["scores"].size, json.loads(str(content["how"])) if "how" in content else {}


def difficulty(scores: Tensor, kind: str) -> Tensor:
    """Turns scores so that higher = harder. kind: cscore (higher = easier), forgetting or el2n (higher = harder)."""
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


def _read(path: Path) -> dict[str, np.ndarray]:
    """`scores`, and `labels` and `how` where the file has them."""
    if not path.is_file():
        raise FileNotFoundError(f"score file {path} does not exist")
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"scores": content}
        with content:
            arrays = {name: content[name] for name in content.files if name in ("scores", "labels", "how")}
            if "scores" not in arrays:
                raise ValueError(f"it holds {', '.join(content.files) or 'nothing'}, and no 'scores'")
            return arrays
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no score file (.npy, or .npz with scores[, labels]): {error}") from error


def _check_same_labels(path: Path, stored: np.ndarray, labels: Tensor) -> None:
    if stored.shape != (len(labels),) or stored.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: labels have dtype {stored.dtype} and shape {stored.shape}; expected integers ({len(labels)},)"
        )
    different = np.flatnonzero(stored != labels.numpy())
    if len(different):
        i = int(different[0])
        raise ValueError(
            f"{path}: labels differ from the data set's for {len(different)} of {len(labels)} images, the first at {i} "
            f"({stored[i]} there, {int(labels[i])} here): scores of another data set, or of the same in another order"
        )
