"""The window search of SelMatch (arXiv 2406.18561, section 3.1): which β makes the best training set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, as_selected, real_subset
from selmatch_ext.evaluation import Accuracy, evaluate
from selmatch_ext.seeds import derive
from selmatch_ext.selection.partial_update import marked
from selmatch_ext.selection.window import beta_grid, window
from selmatch_ext.settings import Evaluation, Start


def window_set(context: Context, difficulty: Tensor, settings: Start, beta: float) -> DistilledSet:
    """The window at `beta`, with its easier part, the share alpha, marked as learned."""
    data = context.data
    indices = window(difficulty, data.train.labels, settings.ipc, beta, settings.window.beta_unit)
    return marked(real_subset(data, indices, settings.select), settings.ipc, settings.alpha)


def search_window(
    context: Context, difficulty: Tensor, settings: Start, evaluation: Evaluation, folder: Path
) -> tuple[float, dict[float, Accuracy]]:
    """The β of the best window of a grid, and the test accuracy of each β tried (SelMatch, section 3.1).

    The best window has the highest accuracy on the whole training split, so that no test image takes part in the
    choice. All windows have the same size, so every network has trained on the same share of that split."""
    smallest = int(torch.bincount(context.data.train.labels).min())
    grid = beta_grid(smallest, settings.ipc, settings.window.step, settings.window.beta_unit)
    searching = replace(context, seed=derive(context.seed, "search"))
    how = replace(evaluation, networks=settings.window.networks)
    on_train, on_test = {}, {}
    for beta in grid:
        images = as_selected(window_set(context, difficulty, settings, beta))
        record, label = folder / f"beta_{beta:.4f}.json", f"window β = {beta:.2f}"
        result = evaluate(images, searching, how, record, label, ("train", "test"))
        on_train[beta], on_test[beta] = result["train"].mean, result["test"]
    return max(on_train, key=on_train.__getitem__), on_test
