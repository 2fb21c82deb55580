"""Matching training trajectories (MTT, arXiv 2203.11932), and its difficulty-aligned form (DATM, arXiv 2310.05773)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.methods.base import Method, Task
from selmatch_ext.methods.trajectory import check_experts, expert_logits, matching_loss, start_epochs
from selmatch_ext.models.statistics import refuses_one_image
from selmatch_ext.settings import DATMSettings, Matching, MTTSettings


class MTT(Method):
    """Learned: the images, η (the student's learning rate) and, where the settings say so, the labels' logits.

    The task's experts say of which network they are. Raises ValueError without experts, for experts of another network,
    and for trajectories that are too short."""

    name = "mtt"
    settings_type: type = MTTSettings

    def __init__(self, task: Task, settings: Matching):
        super().__init__(task)
        if task.experts is None:
            raise ValueError(f"{self.name} needs expert trajectories; train some with `selmatch experts`")
        self.settings, self.iterations, self.max_loss = settings, settings.iterations, settings.max_loss
        self.model = task.expert_network()
        check_experts(task.experts, self.model, settings)
        self._check_batches()
        self.lr = torch.tensor(settings.lr_init, device=task.device, dtype=task.dtype, requires_grad=True)
        self.learned["lr"] = self.lr
        if settings.labels != "hard":
            self.logits = expert_logits(task, task.start.images)
        if settings.labels == "learned":
            self.learned["logits"] = self.logits.requires_grad_()

    def _check_batches(self) -> None:
        """ValueError where the student would train on a batch of one image that BatchNorm refuses."""
        count, batch = len(self.task.start), self.settings.batch_syn
        alone = min(count, batch) == 1 or count % batch == 1
        if alone and refuses_one_image(self.model, self.combined()[:1].detach()):
            raise ValueError(
                f"batch_syn {batch} leaves a batch of one of the {count} images, from which BatchNorm of this network "
                "cannot take statistics; choose another batch_syn"
            )

    def optimiser(self) -> torch.optim.Optimizer:
        s = self.settings
        groups = [{"params": [self.images], "lr": s.lr_images}, {"params": [self.lr], "lr": s.lr_lr}]
        if "logits" in self.learned:
            groups.append({"params": [self.logits], "lr": s.lr_labels, "momentum": s.labels_momentum})
        return torch.optim.SGD(groups, momentum=s.momentum)

    def targets(self) -> Tensor:
        """(n,) int64 labels, or (n, K) probabilities."""
        return self.labels if self.settings.labels == "hard" else self.logits.softmax(1)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        return matching_loss(
            self.model,
            self.task.experts,
            self.combined(),
            self.targets(),
            self.lr,
            self.settings,
            generator,
            start_epochs(self.settings, iteration),
        )

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
        labels = self.targets().detach().cpu()
        labels = labels.float() if labels.is_floating_point() else labels
        return replace(super().distilled(), labels=labels, lr=self.lr.item())


class DATM(MTT):
    """MTT with settings of its own: start epochs whose upper end grows, images that expert 0 classifies correctly to
    begin with, and labels learned from that expert's logits."""

    name = "datm"
    settings_type = DATMSettings
