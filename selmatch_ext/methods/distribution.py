"""Distribution matching (DM, arXiv 2110.04181): in the features of randomly initialized networks, the mean of each
class's synthetic images is matched to that of its real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selmatch_ext.methods.base import Method, MethodSettings, Task
from selmatch_ext.models import embed
from selmatch_ext.models.batchnorm import batchnorms
from selmatch_ext.ops.dsa import augment
from selmatch_ext.ranges import Count, Momentum, Positive
from selmatch_ext.settings import DSA


@dataclass(frozen=True)
class DMSettings(MethodSettings):
    """Distribution matching (arXiv 2110.04181)."""

    model: str = "ConvNet"
    """The network in whose features images are compared; named as in experts.model."""
    iterations: Count = 20000
    batch_real: Count = 256
    """Real images of a class per update."""
    lr_images: Positive = 1.0
    """Step size of the images."""
    momentum: Momentum = 0.5
    """Momentum of the images."""
    strategy: str = DSA
    """Augmentation: one of the names is drawn for each class and update, with one set of parameters for its real and
    its synthetic batch (siamese)."""
    siamese: bool = True
    """False: the real and the synthetic batch of a class each draw their own operation, an ablation of DSA."""


class DM(Method):
    """Loss: Σ_classes ‖mean f(A(real)) − mean f(A(syn))‖², f the features before the classifier of a network drawn
    anew each iteration, A one siamese DSA operation a class. Learned: the images.

    A network with BatchNorm sees all classes in one batch, others one after the other, which is the same and takes less
    memory. Where images of the set have weights, mean f(A(syn)) is the mean by these weights; raises ValueError where
    those of a class are all 0."""

    name = "dm"
    settings_type = DMSettings

    def __init__(self, task: Task, settings: DMSettings):
        super().__init__(task, settings)
        rows = [self.of_class(c) for c in range(task.data.classes)]
        self.classes = {c: row for c, row in enumerate(rows) if len(row)}
        for c, row in self.classes.items():
            if self.weights is not None and not self.weights[row].any():
                raise ValueError(f"the weights of class {task.data.class_names[c]} are all 0: it has no mean to match")

    def largest_batch(self) -> tuple[torch.nn.Module, int]:
        model = self.task.network(self.settings.model, "network", 0)
        largest = max(self.settings.batch_real, *map(len, self.classes.values()))
        return model, largest * (len(self.classes) if batchnorms(model) else 1)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.images], lr=self.settings.lr_images, momentum=self.settings.momentum)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        model = self.task.network(self.settings.model, "network", iteration)
        images = self.combined()
        together = bool(batchnorms(model))
        groups = [list(self.classes)] if together else [[c] for c in self.classes]
        return torch.stack([self.group_distance(model, group, images, generator) for group in groups]).sum()

    def group_distance(
        self, model: torch.nn.Module, group: list[int], images: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The loss of some classes, whose images pass the network in one batch."""
        real, syn = [], []
        for label in group:
            indices = self.task.data.sample(label, self.settings.batch_real, generator)
            p = self.task.draw(1, self.settings.strategy, generator, siamese=True)
            real.append(augment(self.task.real(indices), p))
            if not self.settings.siamese:
                p = self.task.draw(1, self.settings.strategy, generator, siamese=True)
            syn.append(augment(images[self.classes[label]], p))
        with torch.no_grad():
            wanted = self._means(model, real)
        weights = None if self.weights is None else [self.weights[self.classes[label]] for label in group]
        return (self._means(model, syn, weights) - wanted).square().sum()

    def _means(self, model: torch.nn.Module, batches: list[Tensor], weights: list[Tensor] | None = None) -> Tensor:
        """(classes, features). weights: of each class's images, (m,), if there are any."""
        features = embed(model, torch.cat(batches)).split([len(b) for b in batches])
        if weights is None:
            return torch.stack([f.mean(0) for f in features])
        return torch.stack([w @ f / w.sum() for f, w in zip(features, weights, strict=True)])

    def advice(self) -> str:
        return f"Try a smaller lr_images ({self.settings.lr_images:g})."
