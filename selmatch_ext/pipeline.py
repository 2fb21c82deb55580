"""The stages of a SelMatch run, each a function that continues what an earlier, killed call left in its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selmatch_ext import preflight, ranks, report
from selmatch_ext.claims import claim, recognize
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.images import ImageData, load
from selmatch_ext.data.origin import changes, known_name
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import Accuracy, evaluate, real_subset, seen_as
from selmatch_ext.experts import compute_scores, train_experts
from selmatch_ext.features import split_features, trained_networks
from selmatch_ext.files import atomic_write, check_writable, read_json, write_json, write_text
from selmatch_ext.methods import METHODS, Task
from selmatch_ext.methods.loop import run as run_method
from selmatch_ext.methods.trajectory import expert_logits
from selmatch_ext.output import attempt, say
from selmatch_ext.seeds import derive, generator
from selmatch_ext.selection import coreset
from selmatch_ext.selection.scores import describe, difficulty, load_scores
from selmatch_ext.selection.window import beta_grid, split, window
from selmatch_ext.settings import Data, Evaluation, Experts, Features, MethodRun, Run, Scores, Window, to_dict
from selmatch_ext.stages import stage


def load_data(settings: Data, seed: int) -> tuple[ImageData, Tensor | None]:
    """The data set, and which training images were kept of the full one (None: all)."""
    data = load(
        settings.dataset,
        root=settings.root,
        download=settings.download,
        resize=settings.resize,
        cache=settings.cache,
        background=settings.background,
        test_share=settings.test_share,
        seed=seed,
    )
    kept = None
    if settings.per_class is not None:
        data, kept = data.subset(settings.per_class, generator(seed, "subset"))
    return data.whitened() if settings.zca else data, kept


def training_difficulty(
    settings: Scores,
    data_settings: Data,
    data: ImageData,
    kept: Tensor | None,
    seed: int,
    device: torch.device,
    path: Path,
) -> Tensor:
    """(n,) difficulty of each training image, higher = harder: read from `settings.source`, or computed and kept at
    `path`. A score file is for `data`, or for the full data set; then `kept` picks from it."""
    if settings.source in ("forgetting", "el2n"):
        made_from = {"data": data.name, "images": data.train.digest(), "zca": data.whitening is not None}
        how = json.dumps({"scores": to_dict(settings), "seed": seed, **made_from})
        if not path.exists():
            check_writable(path)
            scores = compute_scores(data, settings, seed, device)
            if ranks.first():
                with atomic_write(path) as temporary, open(temporary, "wb") as file:
                    np.savez(file, scores=scores.numpy(), labels=data.train.labels.numpy(), how=how)
            ranks.barrier()
        scores = load_scores(path, data)
        made = describe(path)[1]
        if changed := changes(made, json.loads(how)):
            raise ValueError(
                f"{path} holds scores made with other settings ({'; '.join(changed)}); choose another or delete it"
            )
        known_name(made, data.name, path)
        return difficulty(scores, settings.source)
    kind, _, source = settings.source.rpartition(":")
    kind = kind or "cscore"
    if kept is None or _is_of_subset(source, data):
        return difficulty(load_scores(source, data), kind)
    full, _ = load_data(replace(data_settings, per_class=None, zca=False), seed)
    return difficulty(load_scores(source, full), kind)[kept]


def _is_of_subset(source: str, data: ImageData) -> bool:
    """Whether a score file has as many scores as the subset `data`. ValueError when it says it is of another."""
    count, how = describe(source)
    digest = data.train.digest()
    if count == len(data.train) and how.get("images", digest) != digest:
        raise ValueError(f"{source} holds scores of other images than those of {data.name}: another subset or seed")
    return count == len(data.train)


def search_window(
    data: ImageData,
    hardness: Tensor,
    settings: Window,
    evaluation: Evaluation,
    seed: int,
    device: torch.device,
    folder: Path,
) -> tuple[float, dict[float, Accuracy]]:
    """The β of the best window of a grid, and the test accuracy of each β tried (section 3.1 of the paper).

    Best means highest accuracy on the whole training split, so that no test image takes part in the choice; all windows
    are of one size, so the images a network has seen weigh the same in each."""
    smallest = int(torch.bincount(data.train.labels).min())
    on_train, on_test = {}, {}
    for beta in beta_grid(smallest, settings.ipc, settings.step, settings.beta_unit):
        subset = starting_set(data, hardness, replace(settings, beta=beta))
        record = folder / f"beta_{beta:.4f}.json"
        result = evaluate(
            replace(subset, distilled=torch.zeros_like(subset.distilled)),
            data,
            replace(evaluation, networks=settings.networks),
            derive(seed, "search"),
            device,
            record,
            f"window β = {beta:.2f}",
            ("train", "test"),
        )
        on_train[beta], on_test[beta] = result["train"].mean, result["test"]
    return max(on_train, key=on_train.__getitem__), on_test


def starting_set(data: ImageData, hardness: Tensor, settings: Window) -> DistilledSet:
    """The window at settings.beta with its easier α marked for distillation."""
    indices = window(hardness, data.train.labels, settings.ipc, settings.beta, settings.beta_unit)
    subset = real_subset(data, indices, "window")
    return replace(subset, distilled=split(indices, settings.ipc, settings.alpha))


def random_set(data: ImageData, ipc: int, seed: int) -> DistilledSet:
    """ipc random training images of each class."""
    return real_subset(data, coreset.random(data.train.labels, ipc, generator(seed, "random")), "random")


def feature_set(
    method: str, data: ImageData, ipc: int, settings: Features, seed: int, device: torch.device, folder: Path
) -> DistilledSet:
    """ipc training images of each class by herding or k-center, in the features of a network kept in `folder`."""
    model = trained_networks(data, settings, seed, device, folder)[0]
    choose = {"herding": coreset.herding, "k-center": coreset.k_center}[method]
    return real_subset(data, choose(split_features(model, data, device), data.train.labels, ipc), method)


def score_source(method: str, source: str) -> str:
    """Where the scores of the coreset method forgetting, el2n or c-score come from, given `scores.source`.

    Raises ValueError when that is a file of other scores, and for c-score, which only files have, when it is none."""
    kind, _, _ = source.rpartition(":")
    if source in ("forgetting", "el2n"):
        if method == "c-score":
            raise ValueError(f"C-scores come from a file: scores.source must be its path, got {source!r}")
        return method
    if (kind or "cscore") != coreset.BY_SCORE[method]:
        raise ValueError(f"method {method} does not go with scores.source {source!r}, a file of {kind or 'C-score'}s")
    return source


def initial_set(
    start: str, ipc: int, data: ImageData, seed: int, device: torch.device, store: ExpertStore | None = None
) -> DistilledSet:
    """What a method begins with, every image to be distilled. start: noise (normal), real (random training images),
    correct (random ones that expert 0 of `store` classifies correctly, as far as a class has them), or a set's path.

    Raises ValueError for a set of other data, and for correct without experts."""
    if start not in ("noise", "real", "correct"):
        chosen = DistilledSet.load(start)
        seen_as(chosen, data)
    else:
        chosen = random_set(data, ipc, seed)
    if start == "noise":
        noise = torch.randn(chosen.images.shape, generator=generator(seed, "noise"))
        chosen = replace(chosen, images=noise, indices=None, method="noise")
    if start == "correct":
        if store is None:
            raise ValueError("start correct needs expert trajectories, whose first expert classifies the images")
        task = Task(chosen, data, seed, device, store)
        logits = expert_logits(task, data.normalise(data.train.images))
        right, order = logits.argmax(1).cpu() == data.train.labels, generator(seed, "correct")
        picked = []
        for members in task.members:
            members = members[torch.randperm(len(members), generator=order)]
            picked.append(members[(~right[members]).sort(stable=True).indices[:ipc]])
        chosen = real_subset(data, torch.cat(picked), "correct")
    return replace(chosen, distilled=torch.ones(len(chosen), dtype=torch.bool))


def distil(
    name: str,
    settings: Any,
    start: DistilledSet,
    data: ImageData,
    seed: int,
    device: torch.device,
    folder: Path,
    context: dict,
    store: ExpertStore | None = None,
) -> DistilledSet:
    """Runs the method of that name from `start`; writes folder/distilled.safetensors and loss.png. `context` is saved
    with the result, and with it the seed, the digest of `start` and what the experts say of themselves.

    Raises FloatingPointError when the loss explodes; the last good set is then in folder/stopped.safetensors. Raises
    ValueError when `start` or the experts are of other data (but for DD's objective adapt) or another network."""
    check_writable(folder / "distilled.safetensors")
    method = METHODS[name](Task(start, seen_as(start, data), seed, device, store), settings)
    made_from = {**context, "seed": seed, "start": start.digest()}
    if store is not None:
        adapt = getattr(settings, "objective", None) == "adapt"  # it wants experts of other data
        if "images" in store.metadata and not adapt:  # imported experts do not say
            store.check(0, {"images": data.train.digest(), "zca": start.whitening is not None})
        made_from["experts"] = {"count": store.count, **store.metadata}
    draws = getattr(settings, "experts_per_iteration", 1)  # only trajectory matching has experts
    how_often = settings.checkpoint_seconds, draws, settings.snapshot_every
    # A checkpoint is of these images, wherever they lie, and no evaluation comes before it
    identity = {key: value for key, value in made_from.items() if key != "evaluation"}
    if "data" in identity:
        identity["data"] = {"images": data.train.digest(), "zca": start.whitening is not None}
    sizes, memory = _sizes(method, settings, start)
    try:
        with stage(f"distillation by {name}", memory, **sizes):
            losses = run_method(method, method.iterations, folder, made_from, seed, *how_often, identity)
    except FloatingPointError:
        if ranks.first():
            replace(method.distilled(), settings=made_from).save(folder / "stopped.safetensors")
        raise
    result = replace(method.distilled(), settings=made_from)
    if ranks.first():
        result.save(folder / "distilled.safetensors")
        attempt(report.plot_loss, losses, folder / "loss.png")
    return result


def _sizes(method: Any, settings: Any, start: DistilledSet) -> tuple[dict[str, Any], str]:
    """What an error in distillation says of its size, and the settings that take less memory."""
    names = [name for name in ("batch_syn", "inner_steps", "batch_real", "steps", "keep") if hasattr(settings, name)]
    sizes = {"images": f"{len(start)} of {tuple(start.images.shape[1:])}", "device": method.task.device}
    less = " or ".join(f"a smaller {name}" for name in names if name.startswith("batch")) or "fewer steps"
    return sizes | {name: getattr(settings, name) for name in names}, less


def run(settings: Run, folder: str | Path, device: torch.device) -> dict[str, dict[str, float]]:
    """Everything: scores, window search, experts, distillation, evaluation, report.

    Returns and writes folder/results.json: {"random": {"mean": %, "std": %}, "window": …, "selmatch": …}. The same call
    after a kill continues. Raises ValueError when `folder` holds a run with other settings."""
    folder = Path(folder)
    preflight.check_choices(settings, device)
    claim(folder, to_dict(settings))
    data, kept = load_data(settings.data, settings.seed)
    _check_run(settings, data, folder, device)
    data = recognize(folder, to_dict(settings), data)
    hardness = training_difficulty(
        settings.scores, settings.data, data, kept, settings.seed, device, folder / "scores.npz"
    )
    beta, betas = settings.window.beta, {}
    if beta is None:
        beta, betas = search_window(
            data, hardness, settings.window, settings.evaluation, settings.seed, device, folder / "window"
        )
    start = starting_set(data, hardness, replace(settings.window, beta=beta))
    if ranks.first():
        start.save(folder / "window.safetensors")
    store = train_experts(data, settings.experts, folder / "experts", settings.seed, device)
    context = {**to_dict(settings), "beta": beta}
    distilled = distil("selmatch", settings.matching, start, data, settings.seed, device, folder, context, store)
    sets = {
        "random": random_set(data, settings.window.ipc, settings.seed),
        "window": replace(start, distilled=torch.zeros_like(start.distilled)),
        "selmatch": distilled,
    }
    results = {
        name: evaluate(
            subset, data, settings.evaluation, settings.seed, device, folder / f"evaluation_{name}.json", name
        )["test"]
        for name, subset in sets.items()
    }
    if ranks.first():
        write_report(folder, data.name, settings, beta, betas, start, distilled, results)
    ranks.barrier()
    return read_json(folder / "results.json")


def _check_run(settings: Run, data: ImageData, folder: Path, device: torch.device) -> None:
    """Errors of every stage that are certain before the first."""
    preflight.check_networks(settings, data)
    preflight.check_window(settings.window, data)
    start = random_set(data, settings.window.ipc, settings.seed)
    start = replace(start, distilled=split(start.indices, settings.window.ipc, settings.window.alpha))
    _check_distillation("selmatch", settings.matching, start, data, folder, device, settings.experts)


def _check_method_run(name: str, settings: MethodRun, data: ImageData, folder: Path, device: torch.device) -> None:
    """`_check_run` for another method."""
    preflight.check_networks(settings, data)
    begin = settings.settings.start
    if begin == "correct" and settings.experts is None:
        raise ValueError("start correct needs expert trajectories, whose first expert classifies the images")
    start = initial_set("real" if begin == "correct" else begin, settings.settings.ipc, data, settings.seed, device)
    _check_distillation(name, settings.settings, start, data, folder, device, settings.experts)


def _check_distillation(
    name: str,
    settings: Any,
    start: DistilledSet,
    data: ImageData,
    folder: Path,
    device: torch.device,
    experts: Experts | None,
) -> None:
    planned = None if experts is None else preflight.PlannedExperts.of(experts, data, folder / "experts")
    method = preflight.rehearse(name, settings, start, data, device, planned)
    preflight.check_disk(folder, settings, start, method.iterations, planned)


def run_method_alone(name: str, settings: MethodRun, folder: str | Path, device: torch.device) -> dict[str, dict]:
    """A method other than SelMatch from data set to evaluated distilled set, against as many random images.

    Returns and writes folder/results.json: {"random": {"mean": %, "std": %}, name: …}; also distilled.png and table.md.
    The same call after a kill continues. Raises ValueError when `folder` holds a run with other settings."""
    folder, seed = Path(folder), settings.seed
    preflight.check_choices(settings, device)
    claim(folder, to_dict(settings))
    data, _ = load_data(settings.data, seed)
    _check_method_run(name, settings, data, folder, device)
    data = recognize(folder, to_dict(settings), data)
    store = settings.experts and train_experts(data, settings.experts, folder / "experts", seed, device)
    start = initial_set(settings.settings.start, settings.settings.ipc, data, seed, device, store)
    distilled = distil(name, settings.settings, start, data, seed, device, folder, to_dict(settings), store)
    random = random_set(data, settings.settings.ipc, seed)
    random = replace(random, distilled=torch.ones(len(random), dtype=torch.bool))  # augmented in the same way
    sets = {"random": random, name: distilled}
    results = {}
    for label, subset in sets.items():
        record = folder / f"evaluation_{label}.json"
        results[label] = evaluate(subset, data, settings.evaluation, seed, device, record, label)["test"]
    if ranks.first():
        title = f"{data.name}, {settings.settings.ipc} images per class, {settings.evaluation.model}"
        write_results(folder, title, results)
        labels, names = distilled.hard_labels, distilled.class_names
        pictures = start.denormalised(), distilled.denormalised()
        attempt(report.before_after, *pictures, start.hard_labels, folder / "distilled.png", names)
        attempt(report.image_grid, pictures[1], folder / "all.png", labels, names, title=name)
    ranks.barrier()
    return read_json(folder / "results.json")


def write_report(
    folder: Path,
    dataset: str,
    settings: Run,
    beta: float,
    betas: dict[float, Accuracy],
    start: DistilledSet,
    distilled: DistilledSet,
    results: dict[str, Accuracy],
) -> None:
    """PNGs, table and results.json of a finished run on the data set of that name. betas: empty where none was
    searched."""
    title = f"{dataset}, {settings.window.ipc} images per class, β = {beta:.2f}, {settings.evaluation.model}"
    write_results(folder, title, results)
    if betas:
        attempt(report.plot_beta, {b: (r.mean, r.std) for b, r in betas.items()}, folder / "beta.png", beta)
    learned = distilled.distilled
    names = distilled.class_names
    before, after, labels = start.denormalised(), distilled.denormalised(), start.labels
    if not learned.all():
        kept = before[~learned], folder / "selected.png", labels[~learned], names
        attempt(report.image_grid, *kept, title="selected: kept as they are")
    attempt(report.before_after, before[learned], after[learned], labels[learned], folder / "distilled.png", names)


def write_results(folder: Path, title: str, results: dict[str, Accuracy]) -> None:
    """results.json, and table.md, which is then printed as well."""
    write_json(folder / "results.json", {name: {"mean": r.mean, "std": r.std} for name, r in results.items()})
    rows = [["training set", "test accuracy", "networks"]]
    rows += [[name, str(r), str(len(r.values))] for name, r in results.items()]
    write_text(folder / "table.md", f"{title}\n\n{report.markdown(rows)}\n")
    say(f"\n{title}\n{report.table(rows)}")
