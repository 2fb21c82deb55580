"""Every method, and every way to select real images, on scikit-learn's digits against random selection, with settings
for two CPU cores (`make methods`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selmatch_ext import ranks, report
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import to_train_on
from selmatch_ext.data.load import load_data
from selmatch_ext.evaluation import evaluate
from selmatch_ext.files import write_json
from selmatch_ext.methods.datm import DATMSettings
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.distribution import DMSettings
from selmatch_ext.methods.frepo import FRePoSettings
from selmatch_ext.methods.gradient import DCSettings, DSASettings
from selmatch_ext.methods.kip import KIPSettings, LabelSolveSettings
from selmatch_ext.methods.ld import LDSettings
from selmatch_ext.methods.mtt import MTTSettings
from selmatch_ext.methods.selmatch import SelMatchSettings
from selmatch_ext.output import say
from selmatch_ext.runner import Run, run
from selmatch_ext.selection import coreset
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import SELECTIONS, Data, Evaluation, Experts, Features, Scores, Start, Training, Window

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
FEATURES = Features(MODEL, STRATEGY, Training(epochs=10, lr=0.02, momentum=0.9, batch=64))
SELECTION = "selection"
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
    labels: dict[str, Any] = {"model": MODEL, "batch_real": 128, "strategy": STRATEGY, "iterations": 300}
    labels |= {"inner_steps": 5, "lr_inner": 0.1, "lr_labels": 0.02}
    rows |= {
        # learned as fast as the images, the rates grow until training is unstable: the loss jumps, and may stay there
        "dd-ipc1": ("dd", Start("noise", 1), DDSettings(**known, lr_rates=0.005)),
        "ld-ipc1": ("ld", Start(ipc=1), LDSettings(**labels)),
        "dd-attack-ipc10": ("dd", Start(ipc=10), DDSettings(**attack)),
        "selmatch-ipc10": ("selmatch", WINDOW, SelMatchSettings(**matching)),
    }
    runs = {name: _row(method, start, settings, seed) for name, (method, start, settings) in rows.items()}
    return runs | _regressions(seed)


def _regressions(seed: int) -> dict[str, Run]:
    """The lines of the methods that are evaluated by regression, which learn scores."""
    evaluation = replace(EVALUATION, distilled_strategy=STRATEGY, loss="mse")
    plain = replace(evaluation, model="MLP", distilled_strategy="none")
    frepo: dict[str, Any] = {"model": "FRePoNetD2W32BN", "optimizer": "adam", "flip": False, "batch_real": 256}
    rows: dict[str, tuple[str, Any, Evaluation]] = {
        "kip": ("kip", KIPSettings(iterations=300, batch_real=500), plain),
        "label-solve": ("label-solve", LabelSolveSettings(), plain),
        "frepo": ("frepo", FRePoSettings(iterations=500, lr_images=0.01, lr_labels=0.003, **frepo), evaluation),
    }
    return {
        f"{name}-ipc{ipc}": Run(method, settings, Data("digits"), Start(ipc=ipc), EXPERTS, how, seed)
        for name, (method, settings, how) in rows.items()
        for ipc in (1, 10)
    }


def selections() -> dict[str, Start]:
    """The ways to select real images that the second table compares, by their names: 10 images of each class. C-scores,
    which only files have, are left out."""
    part: dict[str, Any] = {"ipc": 10, "window": Window(beta=0.4), "features": FEATURES}
    score = {name: name if name in coreset.BY_SCORE else "aum" for name in SELECTIONS if name != "c-score"}
    hardest = {name: Window(beta=0.0) for name in coreset.BY_SCORE}
    return {
        name: Start(
            name, **{**part, "window": hardest.get(name, part["window"])}, scores=replace(SCORES, source=source)
        )
        for name, source in score.items()
    }


def _row(method: str, start: Start, settings: Any, seed: int) -> Run:
    evaluation = replace(EVALUATION, distilled_strategy=settings.strategy)
    return Run(method, settings, Data("digits"), start, EXPERTS, evaluation, seed)


def compare(names: Sequence[str], folder: Path, seed: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Runs every entry of the methods in `names` (none: all), and the selections of real images where it has SELECTION;
    prints the tables and writes folder/results.json: of each entry, by its name, what `run` returns, and of a selection
    the accuracies of random images and of its own. All use the same experts, networks and scores.

    Raises ValueError for a name that is none, and where `folder` holds results made with other settings."""
    rows = entries(seed)
    known = tuple(dict.fromkeys(row.method for row in rows.values()))
    unknown = sorted(set(names) - {*known, SELECTION})
    if unknown:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}, and {SELECTION}")
    rows = {name: row for name, row in rows.items() if row.method in (names or known)}
    results = {name: run(row, folder / name, device, folder / "experts") for name, row in rows.items()}
    selected = _selected(folder, seed, device) if not names or SELECTION in names else {}
    if not ranks.first():
        return results | selected
    write_json(folder / "results.json", results | selected)
    title = f"digits, {MODEL}, test accuracy in %"
    if results:
        say(f"\n{title}\n{report.table(_table(rows, results))}")
    if selected:
        say(f"\n{title}, of real images\n{report.table(_selection_table(selected))}")
    return results | selected


def _selected(folder: Path, seed: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """The test accuracy of each of `selections`, and of random images. Networks and scores are kept in folder/selection
    and shared by those that use the same ones; a killed call continues."""
    context, results = Context(load_data(Data("digits"), seed), seed, device), dict[str, dict[str, Any]]()
    evaluation, place = replace(EVALUATION, distilled_strategy=STRATEGY), folder / SELECTION
    for name, start in selections().items():
        images = to_train_on(choose(start, context, evaluation, place / start.scores.source).images)
        found = evaluate(images, context, evaluation, place / f"evaluation_{name}.json", f"selection: {name}")["test"]
        results[name] = {"mean": found.mean, "std": found.std}
    random = results.pop("random")
    return {f"{SELECTION}-{name}": {"random": random, "start": found} for name, found in results.items()}


def _selection_table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    table = [["selection, 10 images per class", "random", "selected", ""]]
    for name, found in results.items():
        selection = name.removeprefix(f"{SELECTION}-")
        note = "hardest images: not expected to be above random" if selection in coreset.BY_SCORE else ""
        table.append(
            [selection, *(f"{found[k]['mean']:.1f} ± {found[k]['std']:.1f}" for k in ("random", "start")), note]
        )
    return table


def _table(rows: dict[str, Run], results: dict[str, dict[str, Any]]) -> list[list[str]]:
    table = [["method, images per class", "random", "start", "distilled"]]
    for name, found in results.items():
        title, sets = name.replace("-ipc", ", "), ("random", "start", rows[name].method)
        other = "" if rows[name].evaluation.model == MODEL else f" ({rows[name].evaluation.model})"
        table.append([title + other, *(f"{found[key]['mean']:.1f} ± {found[key]['std']:.1f}" for key in sets)])
        for what, shares in {**found.get("attack", {}), **found.get("kernel", {})}.items():
            table.append([f"{title}: {what}", *[f"{shares[key]:.1f}" for key in sets]])
    return table
