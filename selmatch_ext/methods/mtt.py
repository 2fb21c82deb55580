"""Matching training trajectories (MTT, arXiv 2203.11932)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.trajectories import ExpertSource
from selmatch_ext.experts import expert_logits
from selmatch_ext.methods.average import MovingAverage
from selmatch_ext.methods.base import Method, MethodSettings, Task, check_batches, check_engine
from selmatch_ext.methods.end_step import nearest_step
from selmatch_ext.methods.inner_sgd import InnerSGD
from selmatch_ext.methods.partial_distance import compared
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.ops.distance import trajectory_distance
from selmatch_ext.ranges import Count, Momentum, Number, Positive, Rate, SettingError, Skipped
from selmatch_ext.settings import DSA, Precision
from selmatch_ext.unroll import UnrolledSGD, explain_engine


@dataclass(frozen=True)
class MTTSettings(InnerSGD, MethodSettings):
    """Matching training trajectories (arXiv 2203.11932); defaults for CIFAR-10 with 10 images per class."""

    iterations: Count = 5000
    inner_steps: Count = 20
    """N: student updates per iteration."""
    expert_epochs: Count = 3
    """M: how many epochs ahead of the start the target lies."""
    max_start_epoch: Count = 25
    """Start epochs are drawn from [min_start_epoch, max_start_epoch)."""
    min_start_epoch: Number = 0
    """The first of the start epochs."""
    first_max_start_epoch: Count | None = None
    """The upper end of the start epochs in the first iteration; it grows to max_start_epoch over the run (sequential
    generation, DATM). None: it is max_start_epoch in all iterations."""
    batch_syn: Count = 500
    """Synthetic images per student update."""
    lr_images: Positive = 1000.0
    """Step size of the images."""
    lr_lr: Rate = 1e-5
    """Step size of η, the student's learned learning rate."""
    momentum: Momentum = 0.5
    """Momentum of the images and of η."""
    lr_init: Positive = 0.01
    """η₀, the student's learning rate at the start; it is learned."""
    labels: Literal["hard", "soft", "learned"] = "hard"
    """soft: those of learned images are the softmax of the logits that expert 0 gives them; learned: these logits are
    learned too. Labels of images that are not learned stay as they are."""
    lr_labels: Rate = 1.0
    """Step size of learned logits."""
    labels_momentum: Momentum = 0.9
    """Momentum of learned logits."""
    ema: Momentum = 0.0
    """Above 0 (FTD, arXiv 2211.11004): the set is the moving average, with this decay, of all that is learned; the last
    state is written beside it, to last.safetensors."""
    end_step: Literal["last", "nearest"] = "last"
    """nearest (ATT, arXiv 2407.14245): the student takes as many of the N steps as bring it nearest to the target; all
    are taken first to find how many. It does not go with inner_momentum."""
    skip_first: Skipped = 0.0
    """Share of the network's parameters, those of its first layers, that is left out of the distance (PAD, arXiv
    2408.03360)."""
    skip_smallest: Skipped = 0.0
    """Share of the remaining parameters, those with the smallest squared error, that is left out of the distance (EDF,
    arXiv 2410.17193, and the code of PAD)."""
    strategy: str = DSA
    """Augmentation of each student update: one of the names, drawn per batch."""
    gradient: Literal["exact", "tesla"] = "exact"
    """tesla: the estimate of TESLA (arXiv 2211.10586), for comparison."""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """fused is faster and runs networks of known operations; autograd runs any; auto: fused where it can."""
    keep: Literal["nothing", "activations", "all"] = "nothing"
    """activations is faster, and its memory grows with inner_steps; all is a little faster still and takes
    about twice that memory."""
    precision: Precision = "float32"
    """tf32 (GPU only): TF32 in convolutions and matrix products; bfloat16: convolutions and activations in bfloat16."""
    cuda_graphs: bool | None = None
    """Replay each student update from a CUDA graph; GPU with the fused engine only. None: where that is so."""
    max_loss: Positive = 100.0
    """A matching loss above this stops the run: 1 is the distance between the expert's start and target."""
    experts_per_iteration: Count = 1
    """Experts whose losses are averaged in each iteration; several processes (torchrun) share them, so it must be 1 or
    a multiple of their number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end_step == "nearest" and self.inner_momentum:  # the steps are taken one by one, without velocity
            raise SettingError("end_step", self.end_step, "last where inner_momentum is above 0")


class MTT(Method):
    """Learned: the images, η (the student's learning rate) and, where the settings say so, the labels' logits.

    The task's experts say of which network they are. Raises ValueError without experts, for experts of another network,
    and for trajectories that are too short."""

    name = "mtt"
    settings_type = MTTSettings

    def __init__(self, task: Task, settings: MTTSettings):
        super().__init__(task, settings)
        if task.experts is None:
            raise ValueError(
                f"{self.name} needs expert trajectories; train some with `selmatch experts`, and give their "
                "folder by --experts"
            )
        self.max_loss, self.losses_per_iteration = settings.max_loss, settings.experts_per_iteration
        self.model = task.expert_network()
        check_trajectories(task.experts, self.model, settings)
        self.unrolled = self._unrolled()
        check_batches(self, self.model, settings.batch_syn)
        self.lr = torch.tensor(settings.lr_init, device=task.device, dtype=task.dtype, requires_grad=True)
        self.learned["lr"] = self.lr
        self.fixed = self.soft_labels()
        if settings.labels != "hard":
            self.logits = expert_logits(task.experts, task.context, task.start.images.to(task.dtype))[self._where]
        if settings.labels == "learned":
            self.learned["logits"] = self.logits.requires_grad_()
        self.average = MovingAverage(self, settings.ema) if settings.ema else None

    def _unrolled(self) -> UnrolledSGD:
        s, graphs = self.settings, self.settings.cuda_graphs
        if graphs is None:
            on_gpu = self.task.device.type == "cuda" and s.engine != "autograd"
            graphs = on_gpu and explain_engine(self.model, self.combined()[:2].detach()).name == "fused"
        return UnrolledSGD(self.model, s.engine, s.keep, s.gradient, s.precision, graphs)

    @classmethod
    def needs_experts(cls, settings: MTTSettings) -> bool:
        return True

    @classmethod
    def without_experts(cls, settings: MTTSettings) -> MTTSettings:
        return replace(settings, labels="hard")  # others are the logits of an expert

    def check_network(self) -> None:
        check_engine(self, self.model, self.settings.engine, self.settings.cuda_graphs)

    def largest_batch(self) -> tuple[torch.nn.Module, int]:
        return self.model, min(self.settings.batch_syn, len(self.task.start))

    def optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        groups = [{"params": [self.images], "lr": s.lr_images}, {"params": [self.lr], "lr": s.lr_lr}]
        if "logits" in self.learned:
            groups.append({"params": [self.logits], "lr": s.lr_labels, "momentum": s.labels_momentum})
        return torch.optim.SGD(groups, momentum=s.momentum)

    def targets(self) -> Tensor:
        """What the student trains on: (n,) int64 classes where `labels` is hard, else (n, K) probabilities."""
        return self.labels if self.settings.labels == "hard" else self.merged(self.fixed, self.logits.softmax(1))

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        """‖θ̂_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖² for a random expert and start epoch t (SelMatch, equation 2).

        Draws the expert, t, the batches, and one DSA operation a step."""
        s, store = self.settings, self.task.store
        expert = int(torch.randint(store.count, (), generator=generator))
        epoch = int(torch.randint(*start_epochs(s, iteration), (), generator=generator))
        images = self.combined()
        start = store.row(expert, epoch).to(images)
        target = store.row(expert, epoch + s.expert_epochs).to(images)
        batches = chunks(len(images), s.batch_syn, s.inner_steps, generator)
        batches, augmentations = self.task.steps(batches, s.strategy, generator)
        targets, optimizer = self.weighted(self.targets()), s.inner_optimizer()

        def steps(theta: Tensor, first: int, end: int) -> Tensor:
            tables = None if augmentations is None else augmentations[first:end]
            return self.unrolled(theta, images, targets, batches[first:end], self.lr, tables, **optimizer)

        end = len(batches)
        if s.end_step == "nearest":
            end = nearest_step(lambda theta, i: steps(theta, i, i + 1), start, target, end)
        student = steps(start, 0, end)
        if s.skip_first or s.skip_smallest:
            kept = compared(student, target, s.skip_first, s.skip_smallest)
            student, start, target = (t.index_select(0, kept) for t in (student, start, target))
        return trajectory_distance(student, start, target)

    def learned_rates(self) -> dict[str, float]:
        return {"lr": self.lr.item()}

    @property
    def losses_change_state(self) -> bool:
        return False

    def updated(self) -> None:
        if self.average is not None:
            self.average.update()

    def check(self) -> None:
        if not self.lr.item() > 0:
            raise FloatingPointError(f"the learned learning rate η became {self.lr.item():.6g}; it must stay positive")

    def advice(self) -> str:
        s = self.settings
        return (
            f"η is {self.lr.item():.6g} (lr_init {s.lr_init:g}, lr_lr {s.lr_lr:g}) and lr_images {s.lr_images:g}: "
            "try a smaller lr_images or lr_lr, a smaller lr_init, or fewer inner_steps."
        )

    def distilled(self) -> DistilledSet:
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            return self.last()

    def further_sets(self) -> dict[str, DistilledSet]:
        return {} if self.average is None else {"last": self.last()}

    def last(self) -> DistilledSet:
        """The set with what is learned as it is now, whether or not `distilled` is an average."""
        labels = self.targets().detach().cpu()
        labels = labels.float() if labels.is_floating_point() else labels
        return replace(super().distilled(), labels=labels, lr=self.lr.item())


def chunks(count: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """`steps` index tensors: consecutive chunks of at most `batch` of a random permutation of `count`, and of a new one
    whenever it has run out (algorithm 1 of the paper)."""
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += torch.randperm(count, generator=generator).split(batch)
    return batches[:steps]


def start_epochs(settings: MTTSettings, iteration: int) -> tuple[int, int]:
    """The range of start epochs in an iteration, its end excluded: with first_max_start_epoch it grows in equal steps
    from there to max_start_epoch over the run (sequential generation; DATM, arXiv 2310.05773, section 3.3)."""
    first, end = settings.first_max_start_epoch, settings.max_start_epoch
    if first is not None:
        end = first + (end + 1 - first) * iteration // settings.iterations
    return settings.min_start_epoch, min(end, settings.max_start_epoch)


def check_trajectories(store: ExpertSource, model: torch.nn.Module, settings: MTTSettings) -> None:
    """ValueError when there are no trajectories, they are not of `model`, or too short for the start epochs and M."""
    if store.count == 0:
        raise ValueError(f"no expert trajectories in {store.folder}; train some with `selmatch experts`")
    if store.parameters != parameter_count(model):
        raise ValueError(
            f"the experts in {store.folder} have {store.parameters} parameters, {type(model).__name__} has "
            f"{parameter_count(model)}"
        )
    store.check_alike()
    if not 0 <= settings.min_start_epoch < settings.max_start_epoch:
        raise ValueError(
            f"min_start_epoch must be at least 0 and below max_start_epoch {settings.max_start_epoch}, got "
            f"{settings.min_start_epoch}"
        )
    first = settings.first_max_start_epoch
    if first is not None and not settings.min_start_epoch < first <= settings.max_start_epoch:
        raise ValueError(
            f"first_max_start_epoch must be above min_start_epoch {settings.min_start_epoch} and at most "
            f"max_start_epoch {settings.max_start_epoch}, got {first}"
        )
    last = settings.max_start_epoch - 1 + settings.expert_epochs
    if last > store.epochs:
        raise ValueError(
            f"max_start_epoch {settings.max_start_epoch} and expert_epochs {settings.expert_epochs} need trajectories "
            f"of {last} epochs; those in {store.folder} have {store.epochs} (experts.training.epochs)"
        )
