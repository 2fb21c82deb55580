"""Label distillation (LD, arXiv 2006.08572): real images that stay as they are, with labels that are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from selmatch_ext.data.distilled import DistilledSet, normalized_labels
from selmatch_ext.methods.base import CONVNET, Defaults, Method, MethodSettings, Task, check_batches, check_engine
from selmatch_ext.methods.mtt import chunks
from selmatch_ext.models import flat
from selmatch_ext.ops.dsa import augment
from selmatch_ext.ranges import Count, Positive, Rate
from selmatch_ext.unroll import UnrolledSGD


@dataclass(frozen=True)
class LDSettings(MethodSettings):
    """Label distillation (arXiv 2006.08572); defaults for CIFAR-10."""

    iterations: Count = 20000
    """Updates of the labels."""
    model: str = "AlexNet"
    """The network that is trained on the set while labels are learned; named as in experts.model."""
    inner_steps: Count = 1
    """N: steps of SGD on the set, from that network's present parameters, after which the loss on real images is taken.
    Its gradient goes exactly through all of them. The paper takes 1."""
    lr_inner: Positive = 0.01
    """Learning rate of these steps."""
    batch_syn: Count = 50
    """Images of the set per step of training."""
    batch_real: Count = 1024
    """Real images in the loss."""
    lr_labels: Rate = 0.001
    """Adam's learning rate for the labels."""
    lr_network: Positive = 0.001
    """Adam's learning rate for the network, which takes one step on the set after each update of the labels."""
    patience: Count = 50
    """The network starts anew when the mean loss of the last `patience` iterations has not fallen for as many."""
    strategy: str = "none"
    """Augmentation of each step on the set: one of the names, drawn per batch."""
    engine: Literal["auto", "fused", "autograd"] = "auto"
    """fused is faster and runs networks of known operations; autograd runs any; auto: fused where it can."""


class LD(Method):
    """Loss: ℓ, on real images, of a network after N steps on the set, θ_{i+1} = θ_i − lr_inner·∇ℓ(θ_i; x_i, y_i).
    Learned: the labels y of the images marked `distilled`. They start uniform; after each update they are clamped to
    [0, 1] and divided by their sum. All images stay as they are. State: the network that the steps begin from, its
    optimizer, and the losses since it was new."""

    name = "ld"
    settings_type = LDSettings
    defaults = Defaults(evaluation=replace(CONVNET, model="AlexNet", distilled_strategy="none"))

    def __init__(self, task: Task, settings: LDSettings):
        super().__init__(task, settings)
        self.images.requires_grad_(False)
        self.fixed = self.soft_labels()
        self.soft = torch.full_like(self.fixed[self._where], 1 / task.data.classes).requires_grad_()
        self.learned = {"labels": self.soft}
        self.model = task.network(settings.model, "network", 0)
        check_batches(self, self.model, settings.batch_syn)
        self.unrolled = UnrolledSGD(self.model, settings.engine)
        network = flat.flatten(self.model.parameters()).detach()
        moments = {"exp_avg": torch.zeros_like(network), "exp_avg_sq": torch.zeros_like(network)}
        self.network_optimizer = torch.optim.Adam([network], lr=settings.lr_network)
        self.network_optimizer.state[network] = {"step": torch.zeros(()), **moments}
        self.state = {
            **{"network": network, **self.network_optimizer.state[network]},
            # of the present network: its number, its updates, the update at which the mean loss was lowest, that mean
            **{"number": torch.zeros(()), "age": torch.zeros(()), "lowest_at": torch.zeros(())},
            **{"lowest": torch.tensor(math.inf), "recent": torch.zeros(settings.patience)},
        }

    def check_network(self) -> None:
        check_engine(self, self.model, self.settings.engine)

    def largest_batch(self) -> tuple[torch.nn.Module, int]:
        return self.model, max(self.settings.batch_real, min(self.settings.batch_syn, len(self.task.start)))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.soft], lr=self.settings.lr_labels)

    def updated(self) -> None:
        with torch.no_grad():
            self.soft.copy_(normalized_labels(self.soft))

    def targets(self) -> Tensor:
        """(n, K) probabilities, differentiable in the learned ones."""
        return self.merged(self.fixed, self.soft)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        s, data = self.settings, self.task.data
        images, network = self.combined(), self.state["network"]
        self._advance_network(images, generator)
        batches = chunks(len(images), s.batch_syn, s.inner_steps, generator)
        batches, augmentations = self.task.steps(batches, s.strategy, generator)
        targets = self.weighted(self.targets())
        theta = self.unrolled(network.clone(), images, targets, batches, s.lr_inner, augmentations)
        indices = torch.randperm(len(data.train), generator=generator)[: s.batch_real]
        found = self._cross_entropy(theta, self.task.real(indices), data.train.labels[indices].to(self.task.device))
        self._watch(found.item())
        return found

    def _cross_entropy(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.model, flat.unflatten(theta, self.model), (images,)), labels)

    def _advance_network(self, images: Tensor, generator: torch.Generator) -> None:
        """One step of the network on the set; or a new network where `_watch` found that its loss no longer falls."""
        state, s = self.state, self.settings
        if state["age"] == 0:
            fresh = self.task.network(s.model, "network", int(state["number"]))
            state["network"].copy_(flat.flatten(fresh.parameters()).detach())
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name].zero_()
            return
        batches = chunks(len(images), s.batch_syn, 1, generator)
        (batch,), augmentations = self.task.steps(batches, s.strategy, generator)
        x = images[batch] if augmentations is None else augment(images[batch], augmentations[0])
        theta = state["network"].clone().requires_grad_()
        loss = self._cross_entropy(theta, x, self.weighted(self.targets().detach())[batch])
        (state["network"].grad,) = torch.autograd.grad(loss, theta)
        self.network_optimizer.step()

    def _watch(self, loss: float) -> None:
        """Counts an iteration; the next one begins with a new network where the mean of the last losses is not lower
        than `patience` iterations ago."""
        state, patience = self.state, self.settings.patience
        state["recent"][int(state["age"]) % patience] = loss
        state["age"] += 1
        mean = state["recent"].mean()
        if state["age"] >= patience and mean < state["lowest"]:
            state["lowest"].copy_(mean)
            state["lowest_at"].copy_(state["age"])
        elif state["age"] - state["lowest_at"] >= patience:
            state["number"] += 1
            for name in ("age", "lowest_at"):
                state[name].zero_()
            state["lowest"].fill_(math.inf)

    def advice(self) -> str:
        s = self.settings
        return f"Try a smaller lr_inner ({s.lr_inner:g}), lr_network ({s.lr_network:g}) or lr_labels ({s.lr_labels:g})."

    def distilled(self) -> DistilledSet:
        return replace(super().distilled(), labels=self.targets().detach().cpu().float())
