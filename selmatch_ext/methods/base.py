"""What a distillation method is given, and what it has to have: a class of its own with little more than its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.experts import network
from selmatch_ext.ops.dsa import Augmentation
from selmatch_ext.ops.sampling import sample_augmentation


@dataclass(frozen=True)
class Task:
    """What every method is given: the set to begin with, real data normalised in the same way, and where to compute.

    dtype: of images and networks. Everything drawn outside the loop's generator comes from streams of `seed`."""

    start: DistilledSet
    data: ImageData
    seed: int
    device: torch.device
    experts: ExpertStore | None = None
    dtype: torch.dtype = torch.float32

    def network(self, name: str, *stream: str | int) -> torch.nn.Module:
        """A fresh network of that name, in train mode; its weights come from the named random stream."""
        return network(self.data, name, self.seed, self.device, *stream).to(self.dtype)

    def expert_network(self) -> torch.nn.Module:
        """A fresh network of the kind that the experts are of. Raises ValueError where their files name a function that
        the store does not trust, or a network with other parameters than they hold."""
        self.experts.check_model_size(self.data.channels, self.data.classes, self.data.image_size)
        return self.network(self.experts.model, "student")

    def real(self, indices: Tensor) -> Tensor:
        """The training images at `indices` (b,), a CPU tensor: (b, C, H, W)."""
        return self.data.normalise(self.data.train.images[indices], self.device, self.dtype)

    @cached_property
    def members(self) -> list[Tensor]:
        """Of each class, the indices of its training images."""
        return [(self.data.train.labels == c).nonzero().squeeze(1) for c in range(self.data.classes)]

    def sample(self, label: int, count: int, generator: torch.Generator) -> Tensor:
        """Indices of `count` random training images of a class, all of them where it has no more."""
        members = self.members[label]
        return members[torch.randperm(len(members), generator=generator)[:count]]

    def sample_each(self, count: int, generator: torch.Generator) -> Tensor:
        """`sample` of every class, one after the other."""
        return torch.cat([self.sample(c, count, generator) for c in range(self.data.classes)])

    def draw(self, batch: int, strategy: str, generator: torch.Generator, siamese: bool = False) -> Augmentation:
        """One operation of `strategy` for a batch of images of the data's size; see `sample_augmentation`."""
        size = self.data.image_size
        return sample_augmentation(
            batch, *size, strategy=strategy, siamese=siamese, generator=generator, device=self.device
        )


class Method:
    """Base of all methods. A subclass gives `name`, `optimiser` and `loss`, and adds what else it learns to `learned`.

    Of the task's starting set the images marked `distilled` are learned; the others stay as they are."""

    name: str
    iterations: int
    """Updates that its settings ask for."""
    max_loss: float = math.inf
    """A loss above this stops the run."""
    learned: dict[str, Tensor]
    """What is optimised, by name: leaf tensors that require a gradient."""
    state: dict[str, Tensor]
    """What else goes from one iteration to the next, by name: tensors that `loss` changes in place."""

    def __init__(self, task: Task):
        start = task.start
        if not start.distilled.any():
            raise ValueError("no image of the set is to be distilled; alpha times ipc must be at least 1")
        self.task = task
        self._fixed = start.images.to(task.device, task.dtype)
        self._where = start.distilled.nonzero().squeeze(1).to(task.device)
        self.labels = start.labels.to(task.device)
        if self.labels.is_floating_point():
            self.labels = self.labels.to(task.dtype)
        self.images = self._fixed[self._where].clone().requires_grad_()
        self.learned = {"images": self.images}
        self.state = {}

    def combined(self) -> Tensor:
        """(n, C, H, W): the whole set, learned images as they are now; differentiable in them."""
        return self._fixed.index_copy(0, self._where, self.images)

    def of_class(self, label: int) -> Tensor:
        """(m,) indices into `combined()` of a class, in order, on the device."""
        return (self.task.start.hard_labels == label).nonzero().squeeze(1).to(self.task.device)

    def optimiser(self) -> torch.optim.Optimizer:
        """A new optimiser over `learned`, each tensor once."""
        raise NotImplementedError

    def decay(self, iteration: int) -> float:
        """What the optimiser's step sizes are multiplied by in this iteration."""
        return 1.0

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        """The 0-d loss of one iteration, differentiable in `learned`. Every random choice comes from `generator` (CPU),
        `iteration` and the task's seed."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises FloatingPointError when `learned` is no longer usable, e.g. a learning rate that is not positive."""

    def advice(self) -> str:
        """The settings to look at when the loss explodes, with their values."""
        return "Try smaller step sizes."

    def distilled(self) -> DistilledSet:
        """The set as it is now, on the CPU."""
        return replace(self.task.start, images=self.combined().detach().cpu().float(), method=self.name)
