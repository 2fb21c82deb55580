"""Gradient matching: dataset condensation (DC, arXiv 2006.05929), and with siamese augmentation (DSA, 2102.08259)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext.methods.base import CONVNET, Defaults, Method, MethodSettings, Task
from selmatch_ext.models import flat
from selmatch_ext.models.batchnorm import batchnorms, freeze_statistics
from selmatch_ext.ops.dsa import augment
from selmatch_ext.ops.gradient_distance import gradient_distance
from selmatch_ext.ranges import Count, Momentum, Positive, Weight
from selmatch_ext.second_order import check_differentiable_again
from selmatch_ext.settings import DSA as DSA_STRATEGY
from selmatch_ext.settings import Start, Training
from selmatch_ext.training import batch_augmenter, train


@dataclass(frozen=True)
class DCSettings(MethodSettings):
    """Gradient matching (dataset condensation, arXiv 2006.05929)."""

    model: str = "ConvNet"
    """The network whose gradients are matched; named as in experts.model."""
    iterations: Count = 1000
    """Outer iterations, each with a newly initialized network."""
    outer_loop: Count | None = None
    """Updates of the images per network; None: the paper's for this ipc."""
    inner_loop: Count | None = None
    """Epochs that the network is trained on the images between two updates; None: the paper's for this ipc."""
    batch_real: Count = 256
    """Real images of a class per update."""
    batch_train: Count = 256
    """Images per update of the network."""
    lr_images: Positive = 0.1
    """Step size of the images."""
    momentum: Momentum = 0.5
    """Momentum of the images."""
    lr_network: Positive = 0.01
    """Learning rate of the network."""
    bn_momentum: Weight = 1.0
    """BatchNorm is frozen for matching, with statistics from 16 real images per class: 1 = exactly theirs; 0.1 = as the
    public code, which moves mean 0 and variance 1 a tenth of the way, so that its features are hardly normalized."""
    metric: Literal["layerwise", "mse", "cos"] = "layerwise"
    """Distance of two gradients: 1 − cosine of each output row of each layer, summed; squared difference of the whole;
    1 − cosine of the whole."""
    strategy: str = "none"
    """Augmentation: one of the names is drawn for each class and update, with one set of parameters for its real and
    its synthetic batch (siamese); the network's training draws its own."""
    siamese: bool = True
    """False: the real and the synthetic batch of a class each draw their own operation, an ablation of DSA."""


@dataclass(frozen=True)
class DSASettings(DCSettings):
    """Gradient matching with differentiable siamese augmentation (arXiv 2102.08259)."""

    strategy: str = DSA_STRATEGY


LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Images per class -> (updates of the images per network, epochs of its training between two of them)."""
STATISTICS = 16
"""Real images of each class that BatchNorm's frozen statistics are taken from."""


def loops(ipc: int, settings: DCSettings) -> tuple[int, int]:
    """outer_loop and inner_loop, from the settings or the paper's table. ValueError where neither has them."""
    outer, inner = settings.outer_loop, settings.inner_loop
    if outer is None or inner is None:
        if ipc not in LOOPS:
            known = ", ".join(map(str, LOOPS))
            raise ValueError(f"the paper has loops for ipc {known}, not {ipc}: give outer_loop and inner_loop")
        outer, inner = (paper if mine is None else mine for mine, paper in zip((outer, inner), LOOPS[ipc], strict=True))
    if outer < 1 or inner < 1:
        raise ValueError(f"outer_loop and inner_loop must be at least 1, got {outer} and {inner}")
    return outer, inner


class DC(Method):
    """Matches a network's gradients on the synthetic images of a class to those on real ones, while the network trains
    on the synthetic set; after outer_loop updates it is reinitialized. Learned: the images. State: the network.

    An iteration of the loop is one update of the images."""

    name = "dc"
    settings_type = DCSettings
    defaults = Defaults(start=Start("noise"), evaluation=replace(CONVNET, distilled_strategy="none"))

    def __init__(self, task: Task, settings: DCSettings):
        super().__init__(task, settings)
        self.classes = [self.of_class(c) for c in range(task.data.classes)]
        self.outer, inner = loops(max(map(len, self.classes)), settings)
        self.training = Training(inner, settings.lr_network, batch=settings.batch_train)
        self.model = task.network(settings.model, "network", 0)
        self.state["network"] = flat.flatten(self.model.parameters()).detach()

    @property
    def iterations(self) -> int:
        return self.settings.iterations * self.outer

    def largest_batch(self) -> tuple[torch.nn.Module, int]:
        return self.model, max(self.settings.batch_real, self.settings.batch_train, *map(len, self.classes))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.images], lr=self.settings.lr_images, momentum=self.settings.momentum)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        self._advance_network(iteration, generator)
        self.model.train()
        if batchnorms(self.model):
            real = self.task.real(self.task.data.sample_each(STATISTICS, generator))
            freeze_statistics(self.model, real, self.settings.bn_momentum)
        images = self.combined()
        matched = range(len(self.classes))
        return torch.stack([self.class_distance(c, images, generator) for c in matched if len(self.classes[c])]).sum()

    def _advance_network(self, iteration: int, generator: torch.Generator) -> None:
        """A fresh network after every `outer` updates of the images; between two the one there is trains on them."""
        number, turn = divmod(iteration, self.outer)
        if turn == 0:
            fresh = self.task.network(self.settings.model, "network", number)
            flat.load_parameters(self.model, flat.flatten(fresh.parameters()))
        else:
            flat.load_parameters(self.model, self.state["network"])
            images = self.combined().detach()
            augmenter = batch_augmenter(self.settings.strategy, self.task.data.image_size)
            train(self.model, images.__getitem__, self.weighted(self.labels), self.training, augmenter, generator)
        self.state["network"].copy_(flat.flatten(self.model.parameters()).detach())

    def class_distance(self, label: int, images: Tensor, generator: torch.Generator) -> Tensor:
        """Distance between the gradients on a real batch of a class and on all of its synthetic images."""
        indices = self.task.data.sample(label, self.settings.batch_real, generator)
        real, syn = self.task.real(indices), images[self.classes[label]]
        p = self.task.draw(1, self.settings.strategy, generator, siamese=True)
        labels = self.task.data.train.labels[indices].to(self.task.device)
        wanted = self._gradient(augment(real, p), labels, create_graph=False)
        if not self.settings.siamese:
            p = self.task.draw(1, self.settings.strategy, generator, siamese=True)
        got = self._gradient(augment(syn, p), self.weighted(self.labels)[self.classes[label]], create_graph=True)
        return gradient_distance(got, wanted, self.settings.metric)

    def _gradient(self, x: Tensor, labels: Tensor, create_graph: bool) -> list[Tensor]:
        loss = F.cross_entropy(self.model(x), labels)
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)
        if create_graph:
            check_differentiable_again(gradients)
        return list(gradients)

    def advice(self) -> str:
        s = self.settings
        return f"Try a smaller lr_images ({s.lr_images:g}) or lr_network ({s.lr_network:g})."


class DSA(DC):
    """DC with one DSA operation per class and update, shared by its real and synthetic batch, and real images to begin
    with."""

    name = "dsa"
    settings_type = DSASettings
    defaults = Defaults()
