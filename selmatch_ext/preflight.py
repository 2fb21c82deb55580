"""Checks before any training: names and choices against the device, sizes against the data, the stages of a run against
each other, and the space on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selmatch_ext import models
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, seen_as
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.trajectories import ExpertSource
from selmatch_ext.methods import Method, Task, find_method
from selmatch_ext.methods.log import check_log
from selmatch_ext.methods.loop import check_shares
from selmatch_ext.models.batchnorm import refuses_one_image
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.precision import check_precision
from selmatch_ext.seeds import generator
from selmatch_ext.selection import coreset
from selmatch_ext.selection.difficulty import COMPUTED
from selmatch_ext.selection.start import prototype
from selmatch_ext.settings import Evaluation, Experts, Start

if TYPE_CHECKING:
    from selmatch_ext.runner import Run


def settings_of(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name as on the command line, value) of every field of settings classes inside each other, or of a dictionary of
    them."""
    items = value.items() if isinstance(value, dict) else ((f.name, getattr(value, f.name)) for f in fields(value))
    for name, inner in items:
        full = f"{prefix}{name}"
        if is_dataclass(inner) or isinstance(inner, dict):
            yield from settings_of(inner, "" if name == "settings" else f"{full}.")
        else:
            yield full, inner


def check_choices(settings: Any, device: torch.device) -> None:
    """ValueError naming the setting where a strategy is none, or `device` cannot do what is asked of it; ImportError
    where a log needs a package that is not there. Looks at no image."""
    for name, value in settings_of(settings):
        field = name.rpartition(".")[2]
        if value is not None and (field == "strategy" or field.endswith("_strategy")):
            _named(name, sample_augmentation, 1, 8, 8, strategy=value, generator=torch.Generator())
        elif field == "precision":
            check_precision(name, value, device)
        elif field == "cuda_graphs" and value and device.type != "cuda":
            raise ValueError(f"{name} needs a CUDA device; the device is {device}")
        elif field == "log":
            check_log(name, value)


def check_networks(settings: Any, data: ImageData) -> None:
    """ValueError naming the setting where a network is unknown or does not take `data`'s images, or where its training
    would give BatchNorm one image at a time."""
    given = list(settings_of(settings))
    built: dict[str, torch.nn.Module] = {}
    for name, model in given:
        if name.rpartition(".")[2] == "model":
            sizes = data.channels, data.classes, data.image_size
            if model not in built:
                built[model] = _named(name, models.build, model, *sizes, generator=generator(0, "preflight"))
    batches = {name.removesuffix("training.batch"): (name, b) for name, b in given if name.endswith("training.batch")}
    for name, model in given:
        prefix, _, field = name.rpartition(".")
        batch = batches.get(f"{prefix}.")
        if field == "model" and batch is not None and batch[1] == 1:
            if refuses_one_image(built[model], data.normalize(data.train.images[:1])):
                raise ValueError(
                    f"{batch[0]} is 1, and BatchNorm of {model} needs two images at a time; allowed is 2 and above"
                )


def _named(name: str, function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def check_start(settings: Start, evaluation: Evaluation, context: Context) -> DistilledSet:
    """ValueError naming the setting where the choice of the start is certain to fail. Returns a set like the start."""
    parts, used = dict[str, Any](), dict[str, Any]()
    if settings.select in coreset.BY_DIFFICULTY and settings.scores.source in COMPUTED:
        parts["scores"] = settings.scores
    if settings.select in coreset.BY_NETWORK:
        parts["features"] = settings.features
    if parts:
        used["start"] = parts
    if settings.select == "window" and settings.window.beta is None:
        used["evaluation"] = evaluation
    check_networks(used, context.data)
    return prototype(settings, context)


def check_run(settings: Run, context: Context, folder: Path, experts: Path) -> None:
    """Raises the error of any stage that is certain to fail, before the first one starts."""
    used: dict[str, Any] = {"evaluation": settings.evaluation}
    planned = None
    if settings.needs_experts():
        used["experts"] = settings.experts
    check_networks(used, context.data)
    if "experts" in used:
        planned = PlannedExperts.of(settings.experts, context.data, experts)
    check_distillation(settings, context, folder, planned)


def check_distillation(settings: Run, context: Context, folder: Path, experts: ExpertSource | None) -> None:
    """Errors of the start and of the method that are certain before their work. experts: those that are there, or are
    going to be trained."""
    check_networks({"settings": settings.settings}, context.data)
    if settings.start.select == "gradmatch" and not settings.start.gradmatch.fill:
        raise ValueError(
            "start.gradmatch.fill is off, so that a class may get fewer images than start.ipc; how many is known after "
            "the selection only: run `selmatch select` with these settings, and give its file as start.select"
        )
    start = check_start(settings.start, settings.evaluation, context)
    task = Task(start, replace(context, data=seen_as(start, context.data)), experts)
    kind = find_method(settings.method)
    method = kind(task, kind.without_experts(settings.settings))
    check_shares(method)
    method.check_network()
    check_disk(folder, method)


@dataclass
class PlannedExperts:
    """Stands for the experts that a run is going to train, in checks of what comes after them."""

    folder: Path
    model: str
    count: int
    epochs: int
    parameters: int
    metadata: dict[str, Any]

    @classmethod
    def of(cls, settings: Experts, data: ImageData, folder: Path) -> PlannedExperts:
        model = models.build(
            settings.model, data.channels, data.classes, data.image_size, generator=generator(0, "preflight")
        )
        about = {"model": settings.model, "dataset": data.name}
        return cls(folder, settings.model, settings.count, settings.training.epochs, parameter_count(model), about)

    @property
    def model_name(self) -> str:
        """As `ExpertStore.model_name`."""
        return self.model

    def check_model_size(self, channels: int, classes: int, image_size: tuple[int, int]) -> None:
        """Nothing to check: the parameters are counted in the network itself."""

    def check_alike(self) -> None:
        """Nothing to check: all of them are trained with the same settings."""

    def row(self, expert: int, epoch: int) -> Tensor:
        """RuntimeError: there is none yet."""
        raise RuntimeError(f"the experts in {self.folder} are yet to be trained")

    def bytes_missing(self) -> int:
        """What the experts that `folder` lacks will take there."""
        there = sum(path.stem[7:].isdecimal() for path in self.folder.glob("expert_*.safetensors"))
        return max(0, self.count - there) * (self.epochs + 1) * self.parameters * 4


def check_experts(settings: Experts, data: ImageData, folder: Path) -> None:
    """Errors of training experts into `folder` that are certain before it."""
    check_networks({"experts": settings}, data)
    check_room({"experts": PlannedExperts.of(settings, data, folder).bytes_missing()}, folder)


def check_disk(folder: Path, method: Method) -> None:
    """OSError where the disk of `folder` has less room than the run is going to take there."""
    one, every, experts = method.task.start.images.numel() * 4, method.settings.snapshot_every, method.task.experts
    state = sum(t.numel() * t.element_size() for t in method.state.values())
    needs = {
        "experts": experts.bytes_missing() if isinstance(experts, PlannedExperts) else 0,
        "snapshots": 0 if every == 0 else (method.iterations // every + 2) * one,
        "set and checkpoint": 6 * one + 2 * state,
    }
    check_room(needs, folder)


def check_room(needs: dict[str, int], folder: Path) -> None:
    """OSError where the disk of `folder` has less room than the bytes that are needed there, by what they are for."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, sum(needs.values())
    if needed > free:
        shares = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in needs.items() if size)
        raise OSError(
            f"{folder} will take about {needed / 1e9:.2f} GB ({shares}), and {free / 1e9:.2f} GB are free there"
        )
