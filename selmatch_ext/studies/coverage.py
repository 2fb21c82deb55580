"""Coverage: which test images a small training set stands for (SelMatch, arXiv 2406.18561, section 4.3).

A test image is covered when some image of the set lies within the radius r of it, in the feature space of a network
trained on all training images; r is the mean distance of a real training image to its nearest neighbor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext import models, ranks, report
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, seen_as, training_set
from selmatch_ext.data.images import ImageData
from selmatch_ext.evaluation import evaluate
from selmatch_ext.files import write_json, write_text
from selmatch_ext.output import attempt, say
from selmatch_ext.provenance import to_dict
from selmatch_ext.selection.features import split_features, trained_networks
from selmatch_ext.selection.scores import el2n
from selmatch_ext.settings import Coverage, Evaluation, Features
from selmatch_ext.studies.sets import named
from selmatch_ext.training import predict

GROUPS = ("all", "easy", "hard")


def nearest(queries: Tensor, points: Tensor, themselves: bool = False, block: int = 2**24) -> Tensor:
    """(m,) Euclidean distance of each query to the nearest point. queries: (m, F); points: (n, F), same dtype.

    themselves: queries are the points, and none is its own neighbor. block: distances held in memory at a time.
    Raises ValueError where there is no point to be near to."""
    if len(points) < 1 + themselves:
        raise ValueError(f"nearest: {len(points)} points are too few for a nearest neighbor")
    rows, result = max(1, block // len(points)), []
    for start in range(0, len(queries), rows):
        distances = torch.cdist(queries[start : start + rows], points)
        if themselves:
            distances[:, start:].diagonal().fill_(torch.inf)
        result.append(distances.min(1).values)
    return torch.cat(result)


def easy_half(difficulty: Tensor) -> Tensor:
    """(m,) bool, True for the easier half; difficulty: (m,), higher = harder. Of an odd number the middle one is hard;
    of equally hard ones the first are easy."""
    easy = torch.zeros(len(difficulty), dtype=torch.bool)
    easy[difficulty.argsort(stable=True)[: len(difficulty) // 2]] = True
    return easy


def shares(covered: Tensor, easy: Tensor) -> dict[str, float]:
    """% of test images that are covered: of all, of the easy half and of the hard half. covered, easy: (m,) bool."""
    return {name: 100.0 * covered[mask].double().mean().item() for name, mask in _groups(easy).items()}


@dataclass
class CoverageMeasure:
    """What coverage is measured with. center (F,): subtracted from all features; test (m, F): those of the test images;
    radius: r; easy: (m,) bool, the easier half of the test images."""

    network: torch.nn.Module
    context: Context
    center: Tensor
    test: Tensor
    radius: float
    easy: Tensor

    def measure(self, subset: DistilledSet) -> dict[str, float]:
        """Coverage in % by the images of `subset`, as the data's network sees them without augmentation."""
        device = self.context.device
        images = _seen_by(self.context.data, subset).to(device)
        seen = predict(self.network, images.__getitem__, len(images), device, output=models.embed)
        return shares(nearest(self.test, seen.to(self.test) - self.center) <= self.radius, self.easy)


def coverage_measure(context: Context, settings: Coverage, features: Features, folder: Path) -> CoverageMeasure:
    """Trains the networks (or reads those in `folder`) and measures r and the difficulty of each test image: the norm
    of softmax − one-hot label (EL2N's formula), averaged over the networks at the end of their training. Features and r
    are those of the first network."""
    networks = trained_networks(context, features, folder, settings.networks)
    labels, errors, device = context.data.test.labels, [], context.device
    for network in networks:
        logits = predict(network, context.real_images("test"), len(labels), device)
        errors.append(F.softmax(logits, 1))
    # Centered, so that squares do not swamp the differences in `nearest`
    train = split_features(networks[0], context).to(device)
    center = train.mean(0)
    test = split_features(networks[0], context, "test").to(device) - center
    radius = nearest(train - center, train - center, themselves=True).double().mean().item()
    return CoverageMeasure(networks[0], context, center, test, radius, easy_half(el2n(torch.stack(errors), labels)))


def snapshots(path: Path) -> dict[int, Path]:
    """Files of sets by iteration: those in path/snapshots, or, for a file, itself alone at -1.

    Raises FileNotFoundError when a folder has no snapshots."""
    if not path.is_dir():
        return {-1: path}
    files = {int(p.stem.rpartition("_")[2]): p for p in (path / "snapshots").glob("iteration_*.safetensors")}
    if not files:
        raise FileNotFoundError(
            f"{path} has no snapshots: distill with a snapshot_every above 0, or name the .safetensors file of one set"
        )
    return dict(sorted(files.items()))


def coverage(
    paths: list[Path],
    context: Context,
    settings: Coverage,
    features: Features,
    evaluation: Evaluation,
    folder: Path,
) -> dict:
    """Coverage and accuracy of each set in `paths`, over all, easy and hard test images; for a folder of a run, the
    coverage of each of its snapshots and the accuracy of the last.

    Returns and writes folder/coverage.json: {"radius": r, "coverage": {name: {"iterations": [-1 for a single set],
    "all": [%], "easy": [%], "hard": [%]}}, "accuracy": {name: {"all": {"mean": %, "std": %}, …}}, "settings": …}, and
    coverage.png, accuracy.png and table.md. Trained networks and finished evaluations are kept in `folder`."""
    sets = {name: snapshots(path) for name, path in named(paths).items()}
    for files in sets.values():  # what does not fit is refused before any training
        seen_as(DistilledSet.load(list(files.values())[-1]), context.data)
    measure = coverage_measure(context, settings, features, folder / "networks")
    result: dict = {"radius": measure.radius, "coverage": {}, "accuracy": {}}
    for name, files in sets.items():
        measured = [measure.measure(DistilledSet.load(file)) for file in files.values()]
        over = {group: [m[group] for m in measured] for group in GROUPS}
        result["coverage"][name] = {"iterations": list(files), **over}
        if settings.accuracy:
            subset, record = training_set(list(files.values())[-1]), folder / f"evaluation_{name}.json"
            groups = {"easy": measure.easy, "hard": ~measure.easy}
            found = evaluate(subset, context, evaluation, record, name, groups=groups)
            found["all"] = found.pop("test")
            result["accuracy"][name] = {group: {"mean": found[group].mean, "std": found[group].std} for group in GROUPS}
    how = {
        "data": context.data.name,
        "seed": context.seed,
        "coverage": settings,
        "features": features,
        "evaluation": evaluation,
    }
    result["settings"] = {key: value if key in ("data", "seed") else to_dict(value) for key, value in how.items()}
    if ranks.first():
        _write(result, folder)
    return result


def _groups(easy: Tensor) -> dict[str, Tensor]:
    return {"all": torch.ones_like(easy), "easy": easy, "hard": ~easy}


def _seen_by(data: ImageData, subset: DistilledSet) -> Tensor:
    """The images (n, C, H, W) of `subset` normalized as `data` is, as networks trained on it expect; not clamped."""
    images = subset.images if subset.whitening is None else subset.whitening.undo(subset.images)
    if not (torch.equal(subset.mean, data.mean) and torch.equal(subset.std, data.std)):
        mean, std, new_mean, new_std = (t.view(-1, 1, 1) for t in (subset.mean, subset.std, data.mean, data.std))
        images = (images * std + mean - new_mean) / new_std
    return images if data.whitening is None else data.whitening(images)


def _write(result: dict, folder: Path) -> None:
    """coverage.json, the plots and the table, which it prints as well."""
    write_json(folder / "coverage.json", result)
    rows = [["set", *(f"covered: {g}" for g in GROUPS), *(f"accuracy: {g}" for g in GROUPS)]]
    for name, found in result["coverage"].items():
        accuracy = result["accuracy"].get(name)
        shown = [f"{accuracy[g]['mean']:.1f} ± {accuracy[g]['std']:.1f} %" if accuracy else "" for g in GROUPS]
        rows.append([name, *(f"{found[g][-1]:.1f} %" for g in GROUPS), *shown])
    write_text(folder / "table.md", report.markdown(rows) + "\n")
    say(report.table(rows))
    attempt(report.plot_coverage, result["coverage"], folder / "coverage.png")
    if result["accuracy"]:
        bars = {n: {g: (a[g]["mean"], a[g]["std"]) for g in GROUPS} for n, a in result["accuracy"].items()}
        attempt(report.plot_bars, bars, folder / "accuracy.png", "test accuracy (%)", "test images")
