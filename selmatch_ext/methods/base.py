"""`Method`, the base class of all distillation methods, and `Task`, what a method is given: start, data, experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, weighted
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.trajectories import ExpertSource
from selmatch_ext.experts import expert_network
from selmatch_ext.models.batchnorm import refuses_one_image
from selmatch_ext.ops.dsa import Augmentation
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.ranges import Checked, Count, Number, Seconds
from selmatch_ext.settings import Evaluation, Experts, Start, Training
from selmatch_ext.transfers import steps_to_device
from selmatch_ext.unroll import explain_engine


@dataclass(frozen=True)
class LoopSettings(Checked):
    """Settings that every method has: how often the loop saves its state and the set."""

    checkpoint_seconds: Seconds = 30.0
    """Seconds between two saves of the checkpoint."""
    snapshot_every: Number = 0
    """Also keep the set as it is after every so many updates, in snapshots/, for `selmatch coverage`; 0 = never."""
    log: Literal["tensorboard"] | None = None
    """tensorboard: also write losses, learning rates and, at snapshots, pictures to tensorboard/ (needs the extra log).
    losses.csv is always written."""


@dataclass(frozen=True)
class MethodSettings(LoopSettings):
    """What most methods can be told. A method's own settings are a subclass of this or, where the number of updates
    follows from something else, of `LoopSettings`.

    A field called `model` is the name of a network: it is built before the first stage to see whether it takes the
    images, and a settings file alone may not name a function of yours there. A field called `strategy`, or that ends in
    `_strategy`, is an augmentation, and `precision` and `cuda_graphs` are checked against the device."""

    iterations: Count = 1000
    """Updates of the images."""


CONVNET = Evaluation(
    "ConvNet",
    selected_strategy=None,
    training=Training(epochs=1000, lr=0.01, momentum=0.9, weight_decay=5e-4, batch=256, schedule="step"),
)
"""How the papers before SelMatch evaluate: random images are augmented in the same way as distilled ones."""


@dataclass(frozen=True)
class Defaults:
    """Settings of the other parts of a run that a method begins with; all of them can be changed."""

    start: Start = Start()
    experts: Experts = Experts("ConvNet", training=Training(epochs=50))
    evaluation: Evaluation = CONVNET


@dataclass(frozen=True)
class Task:
    """What a method works with. start: the set that it begins with. context: the real images, normalized in the same
    way, the seed and the device. experts: expert trajectories, for a method that needs them.

    dtype: of images and networks. Everything that is drawn outside the loop's generator comes from streams of the
    context's seed."""

    start: DistilledSet
    context: Context
    experts: ExpertSource | None = None
    dtype: torch.dtype = torch.float32

    @property
    def data(self) -> ImageData:
        """The real images."""
        return self.context.data

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.context.device

    @property
    def store(self) -> ExpertSource:
        """The expert trajectories. Raises ValueError where there are none."""
        if self.experts is None:
            raise ValueError("the method needs expert trajectories; train some with `selmatch experts`")
        return self.experts

    def network(self, name: str, *stream: str | int) -> torch.nn.Module:
        """A new network of that name, in train mode; its weights come from the named random stream."""
        return self.context.network(name, *stream).to(self.dtype)

    def expert_network(self) -> torch.nn.Module:
        """A new network of the kind that the experts are of; raises as `experts.expert_network` does."""
        return expert_network(self.store, self.context).to(self.dtype)

    def real(self, indices: Tensor) -> Tensor:
        """The training images at `indices` (b,), a CPU tensor: (b, C, H, W)."""
        return self.data.normalize(self.data.train.images[indices], self.device, self.dtype)

    def draw(self, batch: int, strategy: str, generator: torch.Generator, siamese: bool = False) -> Augmentation:
        """One operation of `strategy` for a batch of images of the data's size; see `sample_augmentation`."""
        size = self.data.image_size
        return sample_augmentation(
            batch, *size, strategy=strategy, siamese=siamese, generator=generator, device=self.device
        )

    def steps(
        self, batches: list[Tensor], strategy: str, generator: torch.Generator
    ) -> tuple[list[Tensor], list[Augmentation] | None]:
        """The batches of indices (CPU) of unrolled training, and one operation of `strategy` for each, on the device;
        None for the strategy none."""
        if strategy == "none":
            return steps_to_device(batches, [], self.device)[0], None
        size = self.data.image_size
        tables = [sample_augmentation(len(b), *size, strategy=strategy, generator=generator) for b in batches]
        return steps_to_device(batches, tables, self.device)


def check_engine(method: Method, model: torch.nn.Module, engine: str, cuda_graphs: bool | None = None) -> None:
    """ValueError where the settings ask for the fused engine, and it has no rule for an operation of the network."""
    if engine != "fused" and not cuda_graphs:
        return
    if engine == "autograd":
        raise ValueError("cuda_graphs needs the fused engine; engine is autograd")
    found = explain_engine(model, method.combined()[:2].detach())
    if found.name != "fused":
        asked = "engine is fused" if engine == "fused" else "cuda_graphs needs the fused engine"
        raise ValueError(f"{asked}, but {found.reason}")


def check_batches(method: Method, model: torch.nn.Module, batch: int) -> None:
    """ValueError where training on the set by batches of batch_syn would give BatchNorm of the network one image."""
    count = len(method.task.start)
    alone = min(count, batch) == 1 or count % batch == 1
    if alone and refuses_one_image(model, method.combined()[:1].detach()):
        raise ValueError(
            f"batch_syn {batch} leaves a batch of one of the {count} images, from which BatchNorm of this network "
            "cannot take statistics; choose another batch_syn"
        )


class Method:
    """Base of all methods. A subclass gives `name`, `optimizer` and `loss`, adds what else it learns to `learned`, and
    has settings and defaults of its own where it needs them.

    Of the task's starting set the images marked `distilled` are learned; the others stay as they are. The weights of
    images stay as they are, of learned images too; a loss on the set takes them into account by `weighted`."""

    name: ClassVar[str]
    settings_type: ClassVar[type] = MethodSettings
    defaults: ClassVar[Defaults] = Defaults()
    max_loss: float = math.inf
    """A loss above this stops the run."""
    losses_per_iteration: int = 1
    """Losses that are averaged in each iteration; several processes share them."""
    learned: dict[str, Tensor]
    """What is optimized, by name: leaf tensors that require a gradient."""
    state: dict[str, Tensor]
    """What else goes from one iteration to the next, by name: tensors that `loss` or `updated` changes in place."""

    def __init__(self, task: Task, settings: Any):
        start = task.start
        if not start.distilled.any():
            raise ValueError("no image of the set is to be distilled; start.alpha times ipc must be at least 1")
        self.task, self.settings = task, settings
        self._fixed = start.images.to(task.device, task.dtype)
        self._where = start.distilled.nonzero().squeeze(1).to(task.device)
        self.labels = start.labels.to(task.device)
        if self.labels.is_floating_point():
            self.labels = self.labels.to(task.dtype)
        self.weights = None if start.weights is None else start.weights.to(task.device, task.dtype)
        self.images = self._fixed[self._where].clone().requires_grad_()
        self.learned = {"images": self.images}
        self.state = {}

    @classmethod
    def needs_experts(cls, settings: Any) -> bool:
        """Whether the method, with these settings, needs expert trajectories; a run then trains them first."""
        return False

    @classmethod
    def without_experts(cls, settings: Any) -> Any:
        """The settings for preflight, which builds the method before experts exist: options that need one are reset."""
        return settings

    @property
    def iterations(self) -> int:
        """Updates of the images that the settings ask for."""
        return self.settings.iterations

    @property
    def losses_change_state(self) -> bool:
        """Whether `loss` changes `state`; then an iteration cannot average several losses."""
        return bool(self.state)

    @property
    def experts_from_other_data(self) -> bool:
        """Whether the experts must come from another data set than the images that are distilled (DD's adapt)."""
        return False

    def check_network(self) -> None:
        """Raises ValueError for an error that would only appear later; preflight calls it before the first stage."""

    def largest_batch(self) -> tuple[torch.nn.Module, int] | None:
        """The network, and how many images pass it at once: the loop uses one thread where that is little work. None,
        where that is not known: all threads."""
        return None

    def combined(self) -> Tensor:
        """(n, C, H, W): the whole set, learned images as they are now; differentiable in them."""
        return self.merged(self._fixed, self.images)

    def merged(self, fixed: Tensor, learned: Tensor) -> Tensor:
        """(n, …): `fixed`, with `learned` (m, …) in the rows of the images that are learned; differentiable in both."""
        return fixed.index_copy(0, self._where, learned)

    def soft_labels(self) -> Tensor:
        """(n, K): the labels of the start as probabilities, of the type of the images."""
        if self.labels.is_floating_point():
            return self.labels
        return F.one_hot(self.labels, self.task.data.classes).to(self.task.dtype)

    def of_class(self, label: int) -> Tensor:
        """(m,) indices into `combined()` of a class, in order, on the device."""
        return (self.task.start.hard_labels == label).nonzero().squeeze(1).to(self.task.device)

    def weighted(self, labels: Tensor) -> Tensor:
        """Targets with which the mean cross-entropy counts each image by its weight in the set: `labels` (n,) int64 or
        (n, K) themselves where the set has no weights, else (n, K), see `data.distilled.weighted`."""
        return labels if self.weights is None else weighted(labels, self.weights, len(self.task.start.class_names))

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer over `learned`, each tensor once."""
        raise NotImplementedError

    def decay(self, iteration: int) -> float:
        """What the optimizer's step sizes are multiplied by in this iteration."""
        return 1.0

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        """The 0-d loss of one iteration, differentiable in `learned`. Every random choice comes from `generator` (CPU),
        `iteration` and the context's seed."""
        raise NotImplementedError

    def learned_rates(self) -> dict[str, float]:
        """The learning rates that are learned, as they are now, by the names that losses.csv gives them; always the
        same names."""
        return {}

    def updated(self) -> None:
        """Called after each update of what is learned, by every process that makes it: the place to project it, or to
        average it."""

    def check(self) -> None:
        """Raises FloatingPointError when `learned` is no longer usable, e.g. a learning rate that is not positive."""

    def advice(self) -> str:
        """The settings to look at when the loss explodes, with their values."""
        return "Try smaller step sizes."

    def distilled(self) -> DistilledSet:
        """The set as it is now, on the CPU."""
        return replace(self.task.start, images=self.combined().detach().cpu().float(), method=self.name)

    def further_sets(self) -> dict[str, DistilledSet]:
        """Sets that are written beside the distilled one, by the names of their files."""
        return {}

    def further_results(self, sets: dict[str, DistilledSet]) -> dict[str, Any]:
        """What results.json says beside accuracies. sets: those that are compared, by name (random, start, and the
        method's), normalized alike."""
        return {}
