"""SelMatch (arXiv 2406.18561): start from a window of real images of the right difficulty, distil its easier part by
trajectory matching, keep its harder part as it is."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.methods.trajectory import check_experts, matching_loss
from selmatch_ext.settings import Matching


class SelMatch:
    """Partial update of a selected set (section 3.2 of the paper). A `Method` of the loop.

    subset: the window, whose `distilled` mask says which images are learned; store: expert trajectories of `model`.
    Learned: those images, and η, the student's learning rate. Raises ValueError for trajectories of another network or
    that are too short, and for a set in which nothing is to be distilled."""

    name = "selmatch"

    def __init__(
        self, subset: DistilledSet, store: ExpertStore, model: torch.nn.Module, settings: Matching, device: torch.device
    ):
        check_experts(store, model, settings)
        if not subset.distilled.any():
            raise ValueError("no image of the set is to be distilled; alpha times ipc must be at least 1")
        self.subset, self.store, self.settings = subset, store, settings
        self.model = model.to(device)
        self.all = subset.images.to(device)
        self.labels = subset.labels.to(device)
        self.where = subset.distilled.nonzero().squeeze(1).to(device)
        self.images = self.all[self.where].clone().requires_grad_()
        self.lr = torch.tensor(settings.lr_init, device=device, requires_grad=True)
        self.learned = {"images": self.images, "lr": self.lr}

    def optimiser(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [self.images], "lr": self.settings.lr_images},
            {"params": [self.lr], "lr": self.settings.lr_lr},
        ]
        return torch.optim.SGD(groups, momentum=self.settings.momentum)

    def combined(self) -> Tensor:
        """(n, C, H, W): selected images as they are, distilled ones as learned so far."""
        return self.all.index_copy(0, self.where, self.images)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        return matching_loss(self.model, self.store, self.combined(), self.labels, self.lr, self.settings, generator)

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
        return replace(self.subset, images=self.combined().detach().cpu(), lr=self.lr.item(), method=self.name)
