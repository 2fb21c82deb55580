"""Methods, starts and selections of real images over shares of one data set, as in the tables of SelMatch (arXiv
2406.18561): accuracy and coverage of every curve at every share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selmatch_ext import preflight, ranks, report
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, real_subset, to_train_on
from selmatch_ext.data.load import load_data
from selmatch_ext.evaluation import evaluate
from selmatch_ext.experts import train_experts
from selmatch_ext.files import check_writable, read_json, write_json
from selmatch_ext.output import attempt
from selmatch_ext.provenance import check_same, claim, record_images, to_dict
from selmatch_ext.runner import Run, make
from selmatch_ext.selection import coreset
from selmatch_ext.selection.difficulty import COMPUTED, training_difficulty
from selmatch_ext.selection.features import trained_networks
from selmatch_ext.selection.start import Kept, choose, score_source
from selmatch_ext.settings import Coverage, Features, Scores, Sweep
from selmatch_ext.studies.coverage import GROUPS, CoverageMeasure, coverage_measure
from selmatch_ext.studies.curves import ALL, Cell, cells
from selmatch_ext.studies.sets import write

COVERED = {"all": "covered", "easy": "covered_easy", "hard": "covered_hard"}


def sweep(settings: Sweep, base: Run, folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Runs every cell, a curve at a share, and all training images.

    base: data, the starts' scores and networks, experts, evaluation and seed of all curves (`curves.cells`). Returns
    and writes folder/sweep.json, a list of {"method": the curve's name, "share": 0 to 1, "mean": %, "std": %,
    "networks": count, "covered", "covered_easy", "covered_hard": shares of the test images, 0 to 1}, at the end the one
    of all training images, "all" at 1.0; and sweep.md, accuracy.png and coverage.png. A cell's run is in
    folder/cells/CURVE/SHARE, and what several cells use is made once, in folder/shared. Of several processes each takes
    every world-th cell. The same call after a kill continues; finished cells are not run again. Raises ValueError,
    before any training, for what no cell can work with, and for a cell that was made with other settings."""
    context = Context(load_data(base.data, base.seed), base.seed, device)
    study = _Study(context, folder, cells(settings, base, context.data), settings, base.start.features)
    with ranks.alone():
        study.check()
    left = [cell for cell in study.cells if not study.has_finished(cell)]
    ranks.barrier()
    if left:
        study.prepare(left)
        _work(study, left)
    found = [study.result(cell) for cell in study.cells]
    if ranks.first():
        _write(found, study)
    ranks.barrier()
    return found


def _work(study: _Study, left: list[Cell]) -> None:
    """Runs the cells of this rank. The bar counts those of all ranks."""
    measure = study.coverage()
    done = len(study.cells) - len(left)
    with ranks.progress(total=len(study.cells), initial=done, desc="sweep", unit="cell") as progress:
        for k in ranks.mine(len(left)):
            progress.set_description(left[k].label)
            with ranks.alone():
                study.run(left[k], measure)
            progress.update(sum(map(study.has_finished, study.cells)) - progress.n)
        progress.set_description("sweep")
        ranks.barrier()
        progress.update(len(study.cells) - progress.n)


@dataclass(frozen=True)
class _Study:
    """The cells of one sweep, and where they are kept."""

    context: Context
    folder: Path
    cells: list[Cell]
    settings: Sweep
    features: Features

    def place(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.folder / "cells" / cell.curve / f"{cell.share:g}"

    def shared(self, kind: str, settings: Any) -> Path:
        """Where what is made with such settings is kept for all cells."""
        digest = hashlib.sha256(json.dumps(to_dict(settings), sort_keys=True).encode()).hexdigest()
        return self.folder / "shared" / f"{kind}-{digest[:8]}"

    def has_finished(self, cell: Cell) -> bool:
        """Whether a cell needs no more work."""
        return (self.place(cell) / "results.json").exists()

    def kept(self, cell: Cell) -> Kept:
        """Where the start of a cell finds scores and networks."""
        start = cell.run.start
        scores = self.shared("scores", _scores(cell) or start.scores).with_suffix(".npz")
        return Kept(scores, self.shared("features", start.features), self.place(cell) / "window")

    def check(self) -> None:
        """Raises the error of a cell that is certain to fail, or was made with other settings, before any training."""
        check_writable(self.folder / "sweep.json")
        for cell in self.cells:
            place, run = self.place(cell), cell.run
            settings = cell.settings()
            preflight.check_choices(run if cell.kind == "learned" else settings, self.context.device)
            claim(place, settings)
            if self.has_finished(cell):
                self.result(cell)
            elif cell.kind == "learned":
                preflight.check_run(run, self.context, place, self.shared("experts", run.experts))
            else:
                preflight.check_networks({"evaluation": run.evaluation}, self.context.data)
                if cell.kind == "selected":
                    preflight.check_start(run.start, run.evaluation, self.context)
        preflight.check_networks({"start": {"features": self.features}}, self.context.data)

    def prepare(self, left: list[Cell]) -> None:
        """Trains what the cells share, by all processes together: experts, scores, networks of features."""
        for experts in _distinct(c.run.experts for c in left if c.kind == "learned" and c.run.needs_experts()):
            train_experts(self.context, experts, self.shared("experts", experts))
        for scores in _distinct(_scores(cell) for cell in left):
            training_difficulty(self.context, scores, self.shared("scores", scores).with_suffix(".npz"))
        for features in _distinct(c.run.start.features for c in left if _selects(c, coreset.BY_NETWORK)):
            trained_networks(self.context, features, self.shared("features", features))

    def coverage(self) -> CoverageMeasure:
        """What coverage is measured with; its first network is that of the starts' features."""
        how = Coverage(self.settings.coverage_networks)
        return coverage_measure(self.context, how, self.features, self.shared("features", self.features))

    def run(self, cell: Cell, measure: CoverageMeasure) -> None:
        """Makes the images of a cell, trains networks on them, measures their coverage; writes results.json."""
        place = self.place(cell)
        context = replace(self.context, data=record_images(place, cell.settings(), self.context.data))
        images = self._images(cell, context, place)
        record = place / f"evaluation_{cell.curve}.json"
        accuracy = evaluate(images, context, cell.run.evaluation, record, cell.label)["test"]
        covered = measure.measure(images)
        result = {"method": cell.curve, "share": cell.share, "mean": accuracy.mean, "std": accuracy.std}
        result |= {"networks": len(accuracy.values)} | {COVERED[g]: covered[g] / 100 for g in GROUPS}
        write_json(place / "results.json", {"result": result, "coverage": self._how()})

    def _images(self, cell: Cell, context: Context, place: Path) -> DistilledSet:
        run, data = cell.run, context.data
        if cell.kind == "all":
            return real_subset(data, torch.arange(len(data.train)), "all training images")
        if cell.kind == "learned":
            return make(run, context, place, self.shared("experts", run.experts), self.kept(cell))[1].distilled()
        images = choose(run.start, context, run.evaluation, self.kept(cell)).images
        replace(images, settings=cell.settings()).save(place / f"{run.start.select}.safetensors")
        return to_train_on(images)

    def _how(self) -> dict[str, Any]:
        """How coverage is measured."""
        return {"networks": self.settings.coverage_networks, "features": to_dict(self.features)}

    def result(self, cell: Cell) -> dict[str, Any]:
        """What a finished cell has found. Raises ValueError where its coverage was measured in another way."""
        path = self.place(cell) / "results.json"
        found = read_json(path, "result", "coverage")
        check_same(path, found["coverage"], self._how())
        return found["result"]


def _selects(cell: Cell, ways: Iterable[str]) -> bool:
    return cell.kind != "all" and cell.run.start.select in ways


def _scores(cell: Cell) -> Scores | None:
    """The scores that are computed for a cell's start, if it needs any."""
    start = cell.run.start
    if not _selects(cell, coreset.BY_DIFFICULTY) or start.scores.source not in COMPUTED:
        return None
    if start.select in coreset.BY_SCORE:
        return replace(start.scores, source=score_source(start.select, start.scores.source))
    return start.scores


def _distinct(settings: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(s for s in settings if s is not None))


def _write(found: list[dict[str, Any]], study: _Study) -> None:
    """sweep.json, the table, which is printed as well, and the plots."""
    rows = [["curve", "share", "images", "test accuracy", *(f"covered: {group}" for group in GROUPS)]]
    accuracy, covered = dict[str, dict[float, tuple[float, float]]](), dict[str, dict[str, list[float]]]()
    size = len(study.context.data.train)
    for cell, result in zip(study.cells, found, strict=True):
        images = size if cell.kind == "all" else cell.run.start.ipc * study.context.data.classes
        shown = f"{result['mean']:.1f} ± {result['std']:.1f} %"
        shares = {group: 100 * result[COVERED[group]] for group in GROUPS}
        rows.append(
            [cell.curve, f"{100 * cell.share:g} %", str(images), shown, *(f"{s:.1f} %" for s in shares.values())]
        )
        accuracy.setdefault(cell.curve, {})[100 * cell.share] = result["mean"], result["std"]
        over = covered.setdefault(cell.curve, {name: [] for name in ("iterations", *GROUPS)})
        over["iterations"].append(100 * cell.share)
        for group, share in shares.items():
            over[group].append(share)
    write(study.folder, "sweep", rows, found)
    ((mean, _),) = accuracy.pop(ALL).values()
    axes, level = "training images in the set (%)", ("all training images", mean)
    attempt(report.plot_curves, accuracy, study.folder / "accuracy.png", axes, "test accuracy (%)", level)
    attempt(report.plot_coverage, covered, study.folder / "coverage.png", axes)
