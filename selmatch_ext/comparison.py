"""Every method against random selection on scikit-learn's digits: the table of `make methods`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selmatch_ext import pipeline, report, strict_json
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.images import ImageData, load
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import evaluate, follow_schedule
from selmatch_ext.experts import real_images, train_experts
from selmatch_ext.files import read_json, write_json
from selmatch_ext.output import say
from selmatch_ext.settings import (
    Data,
    DATMSettings,
    DCSettings,
    DDSettings,
    DMSettings,
    DSASettings,
    Evaluation,
    Experts,
    Matching,
    MTTSettings,
    Scores,
    Training,
    Window,
    differences,
    to_dict,
)
from selmatch_ext.training import predict

STRATEGY = "color_crop_cutout_scale_rotate"  # no flips: a digit's mirror image is none
MODEL = "ConvNetD2W32"
EXPERTS = Experts(model=MODEL, count=12, strategy=STRATEGY, training=Training(epochs=20, lr=0.08, batch=64))
EVALUATION = Evaluation(  # each set with the augmentation that its method distils with, as in the papers
    model=MODEL,
    networks=5,
    training=Training(epochs=200, lr=0.02, momentum=0.9, weight_decay=5e-4, batch=64, schedule="cosine"),
)
WINDOW = Window(ipc=10, alpha=0.85, beta=0.4)
SCORES = Scores(source="el2n", model=MODEL, training=Training(epochs=10, lr=0.02, momentum=0.9, batch=64))


@dataclass(frozen=True)
class Entry:
    """One line of the table: a method with settings for less than two minutes on two CPU cores."""

    method: str
    ipc: int
    settings: Any

    @property
    def name(self) -> str:
        attack = self.method == "dd" and self.settings.objective == "attack"
        return "dd-attack" if attack else self.method


def entries() -> list[Entry]:
    """The lines of the table."""
    data = {"model": MODEL, "batch_real": 64}
    matching = {"strategy": STRATEGY, "iterations": 200, "expert_epochs": 2, "max_start_epoch": 8}
    matching |= {"inner_steps": 20, "batch_syn": 50, "lr_images": 100.0, "lr_init": 0.1}
    one = {**matching, "ipc": 1, "max_start_epoch": 6, "lr_init": 0.05}
    ten = {**matching, "ipc": 10}
    mtt = {1: one, 10: {**ten, "iterations": 300, "lr_images": 30.0}}
    datm = {1: {**one, "first_max_start_epoch": 3}, 10: {**ten, "first_max_start_epoch": 7, "max_start_epoch": 14}}
    rows = []
    for ipc, outer_loop, inner_loop, iterations in ((1, 1, 1, 150), (10, 4, 10, 40)):
        loops = {"outer_loop": outer_loop, "inner_loop": inner_loop, "iterations": iterations}
        rows += [
            Entry("dc", ipc, DCSettings(ipc=ipc, lr_images=1.0, start="real", **loops, **data)),
            Entry("dsa", ipc, DSASettings(ipc=ipc, lr_images=1.0, strategy=STRATEGY, **loops, **data)),
            Entry("dm", ipc, DMSettings(ipc=ipc, iterations=300, lr_images=5.0, strategy=STRATEGY, **data)),
            Entry("mtt", ipc, MTTSettings(**mtt[ipc])),
            Entry("datm", ipc, DATMSettings(**datm[ipc], lr_labels=0.1)),
        ]
    unrolled = {"steps": 1, "batch_real": 256, "lr": 0.05}
    known = {"model": "MLP", "init": "known", "epochs": 5, "passes": 200, "halve_every": 70, "lr_init": 0.2, **unrolled}
    attack = {"epochs": 1, "images_per_class_per_step": 10, "passes": 120, "halve_every": 40, "networks": 2, **unrolled}
    # 10 trained networks are too few: the set works on them alone. Their last epochs make it work on others too
    attack |= {"pool_epochs": 15, "start": "real", "lr_init": 0.1}
    rows += [
        # learned as fast as the images, the rates grow until training is unstable: the loss jumps, and may stay there
        Entry("dd", 1, DDSettings(**known, lr_rates=0.005)),
        Entry("dd", 10, DDSettings(model=MODEL, init="loaded", objective="attack", test_networks=2, **attack)),
        Entry("selmatch", WINDOW.ipc, Matching(**matching)),
    ]
    return rows


NAMES = tuple(dict.fromkeys(entry.method for entry in entries()))


def run(names: Sequence[str], folder: Path, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """Distils and evaluates every entry of the methods in `names`; prints the table and writes folder/results.json, for
    each of them:

    method, ipc. random, ours: mean accuracy in % of networks trained on a random set and on ours, both in the same way.
    random_std, ours_std: their standard deviations over the networks, None for one network. seconds: what distillation
    took, without the experts and the scores; None where a kill interrupted it.

    DD trains both in the steps, at the rates and from the start that its set was learned for: one network. For its
    attack both figures are the share in % of the attacked class that is taken for the target class, by networks trained
    in those steps; they have no deviation, and `others` is the accuracy on all other classes, before and after.

    Raises ValueError for a name that is none, and where `folder` holds results made with other settings."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    data = load("digits")
    store = train_experts(data, EXPERTS, folder / "experts", seed, device)
    results = [_result(e, data, store, folder, seed, device) for e in entries() if e.method in names]
    rows = [["method", "images per class", "random", "ours", "seconds"]]
    for r in results:
        seconds = "interrupted" if r["seconds"] is None else f"{r['seconds']:.4g}"
        rows.append([r["method"], str(r["ipc"]), _shown(r, "random"), _shown(r, "ours"), seconds])
    write_json(folder / "results.json", results)
    title = f"digits, {MODEL}, test accuracy in % (dd-attack: share of the class that is flipped)"
    say(f"\n{title}\n{report.table(rows)}")
    return results


def _result(
    entry: Entry, data: ImageData, store: ExpertStore, folder: Path, seed: int, device: torch.device
) -> dict[str, Any]:
    """One line, from its file where it is finished. ValueError when that was made with other settings."""
    mine = folder / f"{entry.name}-ipc{entry.ipc}"
    context = {"settings": to_dict(entry.settings), "seed": seed}
    path, made_with = mine / "result.json", {**context, "evaluation": to_dict(EVALUATION)}
    if path.exists():
        return _finished(path, made_with)
    start = _start(entry, data, store, folder, seed, device)
    resumed, began = (mine / "checkpoint.safetensors").exists(), time.monotonic()
    ours = pipeline.distil(
        entry.method,
        entry.settings,
        start,
        data,
        seed,
        device,
        mine,
        {"data": {"dataset": "digits"}, **context},
        store,
    )
    seconds = None if resumed else round(time.monotonic() - began, 1)
    result = {"method": entry.name, "ipc": entry.ipc, "seconds": seconds}
    random = replace(pipeline.random_set(data, entry.ipc, seed), distilled=torch.ones(len(ours), dtype=torch.bool))
    if entry.name == "dd-attack":
        result |= _attack_figures(entry.settings, random, ours, data, seed, device)
    else:
        how = replace(EVALUATION, distilled_strategy=entry.settings.strategy)
        random = replace(random, schedule=ours.schedule)
        for name, subset in {"random": random, "ours": replace(ours, distilled=random.distilled)}.items():
            record = mine / f"evaluation-{name}.json"
            found = evaluate(subset, data, how, seed, device, record, f"{name}, ipc {entry.ipc}")["test"]
            result |= {name: found.mean, f"{name}_std": found.std if len(found.values) > 1 else None}
    write_json(path, {"result": result, "made_with": made_with})
    return result


def _finished(path: Path, made_with: dict[str, Any]) -> dict[str, Any]:
    """The line in the file of a finished entry. ValueError when it was made with other settings, or is no such line."""
    found = read_json(path, "made_with", "result")
    changed = differences(strict_json.mapping(found["made_with"], f"{path}: made_with"), made_with)
    if changed:
        raise ValueError(f"{path} was made with other settings ({'; '.join(changed)}); choose another --out")
    result = strict_json.mapping(found["result"], f"{path}: result")
    for name in ("method", "ipc", "seconds", "random", "random_std", "ours", "ours_std"):
        value, where = result.get(name), f"{path}: result.{name}"
        if name == "method":
            strict_json.string(value, where)
        elif value is not None or name in ("ipc", "random", "ours"):
            strict_json.numbers([value], where)
    return result


def _shown(result: dict[str, Any], name: str) -> str:
    std = result[f"{name}_std"]
    return f"{result[name]:.1f}" + ("" if std is None else f" ± {std:.1f}")


def _start(
    entry: Entry, data: ImageData, store: ExpertStore, folder: Path, seed: int, device: torch.device
) -> DistilledSet:
    if entry.method != "selmatch":
        return pipeline.initial_set(entry.settings.start, entry.ipc, data, seed, device, store)
    hardness = pipeline.training_difficulty(SCORES, Data("digits"), data, None, seed, device, folder / "scores.npz")
    return pipeline.starting_set(data, hardness, WINDOW)


def _attack_figures(
    settings: DDSettings, random: DistilledSet, ours: DistilledSet, data: ImageData, seed: int, device: torch.device
) -> dict[str, Any]:
    """Shares in % of the attacked class taken for the target class, and accuracies on the other classes, averaged over
    the networks that the attack has not seen. `random` is trained on in the same steps."""
    still = replace(ours.schedule, rates=torch.full_like(ours.schedule.rates, 1e-12))
    sets = {
        "before": replace(random, schedule=still),
        "random": replace(random, schedule=ours.schedule),
        "ours": ours,
    }
    labels, figures = data.test.labels, {}
    attacked = labels == settings.attack_class
    for name, subset in sets.items():
        flipped, others = [], []
        for k in range(settings.test_networks):
            model = follow_schedule(subset, data, seed, device, k)
            guess = predict(model, real_images(data, device, "test"), len(labels), device).argmax(1)
            flipped.append(100 * (guess[attacked] == settings.target_class).double().mean().item())
            others.append(100 * (guess == labels)[~attacked].double().mean().item())
        figures[name] = [sum(values) / len(values) for values in (flipped, others)]
    return {
        "random": figures["random"][0],
        "random_std": None,
        "ours": figures["ours"][0],
        "ours_std": None,
        "others": {"before": figures["before"][1], "after": figures["ours"][1]},
    }
