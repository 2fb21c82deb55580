"""Every method on scikit-learn's digits against random selection, with settings for two CPU cores (`make methods`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selmatch_ext import report
from selmatch_ext.files import write_json
from selmatch_ext.methods.datm import DATMSettings
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.distribution import DMSettings
from selmatch_ext.methods.gradient import DCSettings, DSASettings
from selmatch_ext.methods.mtt import MTTSettings
from selmatch_ext.methods.selmatch import SelMatchSettings
from selmatch_ext.output import say
from selmatch_ext.runner import Run, run
from selmatch_ext.settings import Data, Evaluation, Experts, Scores, Start, Training, Window

STRATEGY = "color_crop_cutout_scale_rotate"  # no flips: a digit's mirror image is none
MODEL = "ConvNetD2W32"
EXPERTS = Experts(model=MODEL, count=12, strategy=STRATEGY, training=Training(epochs=20, lr=0.08, batch=64))
EVALUATION = Evaluation(
    model=MODEL,
    networks=5,
    selected_strategy=None,
    training=Training(epochs=200, lr=0.02, momentum=0.9, weight_decay=5e-4, batch=64, schedule="cosine"),
)
SCORES = Scores(source="el2n", model=MODEL, training=Training(epochs=10, lr=0.02, momentum=0.9, batch=64))
WINDOW = Start("window", ipc=10, alpha=0.85, window=Window(beta=0.4), scores=SCORES)


def entries(seed: int) -> dict[str, Run]:
    """The lines of the table by the names of their folders: runs of less than two minutes each on two CPU cores. All
    images are augmented as the method augments those that it learns, as in the papers."""
    given: dict[str, Any] = {"model": MODEL, "batch_real": 64}
    matching: dict[str, Any] = {"strategy": STRATEGY, "iterations": 200, "expert_epochs": 2, "max_start_epoch": 8}
    matching |= {"inner_steps": 20, "batch_syn": 50, "lr_images": 100.0, "lr_init": 0.1}
    one = {**matching, "max_start_epoch": 6, "lr_init": 0.05}
    mtt = {1: one, 10: {**matching, "iterations": 300, "lr_images": 30.0}}
    datm = {1: {**one, "first_max_start_epoch": 3}, 10: {**matching, "first_max_start_epoch": 7, "max_start_epoch": 14}}
    rows: dict[str, tuple[str, Start, Any]] = {}
    for ipc, outer_loop, inner_loop, iterations in ((1, 1, 1, 150), (10, 4, 10, 40)):
        loops: dict[str, Any] = {"outer_loop": outer_loop, "inner_loop": inner_loop, "iterations": iterations}
        real, correct = Start(ipc=ipc), Start("correct", ipc)
        rows |= {
            f"dc-ipc{ipc}": ("dc", real, DCSettings(lr_images=1.0, **loops, **given)),
            f"dsa-ipc{ipc}": ("dsa", real, DSASettings(lr_images=1.0, strategy=STRATEGY, **loops, **given)),
            f"dm-ipc{ipc}": ("dm", real, DMSettings(iterations=300, lr_images=5.0, strategy=STRATEGY, **given)),
            f"mtt-ipc{ipc}": ("mtt", real, MTTSettings(**mtt[ipc])),
            f"datm-ipc{ipc}": ("datm", correct, DATMSettings(**datm[ipc], lr_labels=0.1)),
        }
    unrolled: dict[str, Any] = {"steps": 1, "batch_real": 256, "lr": 0.05}
    known = {"model": "MLP", "init": "known", "epochs": 5, "passes": 200, "halve_every": 70, "lr_init": 0.2, **unrolled}
    attack: dict[str, Any] = {
        "init": "loaded",
        "objective": "attack",
        "epochs": 1,
        "passes": 120,
        "halve_every": 40,
        **unrolled,
    }
    # 10 trained networks are too few: the set works on them alone. Their last epochs make it work on others too
    attack |= {"model": MODEL, "networks": 2, "test_networks": 2, "pool_epochs": 15, "lr_init": 0.1}
    rows |= {
        # learned as fast as the images, the rates grow until training is unstable: the loss jumps, and may stay there
        "dd-ipc1": ("dd", Start("noise", 1), DDSettings(**known, lr_rates=0.005)),
        "dd-attack-ipc10": ("dd", Start(ipc=10), DDSettings(**attack)),
        "selmatch-ipc10": ("selmatch", WINDOW, SelMatchSettings(**matching)),
    }
    return {name: _row(method, start, settings, seed) for name, (method, start, settings) in rows.items()}


def _row(method: str, start: Start, settings: Any, seed: int) -> Run:
    evaluation = replace(EVALUATION, distilled_strategy=settings.strategy)
    return Run(method, settings, Data("digits"), start, EXPERTS, evaluation, seed)


def compare(names: Sequence[str], folder: Path, seed: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Runs every entry of the methods in `names` (none: all); prints the table and writes folder/results.json: of each
    entry, by its name, what `run` returns. All use the same experts.

    Raises ValueError for a name that is none, and where `folder` holds results made with other settings."""
    rows = entries(seed)
    known = tuple(dict.fromkeys(row.method for row in rows.values()))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}")
    rows = {name: row for name, row in rows.items() if row.method in (names or known)}
    results = {name: run(row, folder / name, device, folder / "experts") for name, row in rows.items()}
    write_json(folder / "results.json", results)
    say(f"\ndigits, {MODEL}, test accuracy in %\n{report.table(_table(rows, results))}")
    return results


def _table(rows: dict[str, Run], results: dict[str, dict[str, Any]]) -> list[list[str]]:
    table = [["method, images per class", "random", "start", "distilled"]]
    for name, found in results.items():
        title, sets = name.replace("-ipc", ", "), ("random", "start", rows[name].method)
        table.append([title, *(f"{found[key]['mean']:.1f} ± {found[key]['std']:.1f}" for key in sets)])
        for what, shares in found.get("attack", {}).items():
            table.append([f"{title}: {what}", *[f"{shares[key]:.1f}" for key in sets]])
    return table
