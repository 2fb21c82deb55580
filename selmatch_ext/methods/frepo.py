"""Neural feature regression with pooling (FRePo, arXiv 2206.00719): kernel ridge regression on a network's features."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from selmatch_ext.data.soft_labels import Regression, centered
from selmatch_ext.methods.base import Defaults, MethodSettings, Task
from selmatch_ext.methods.kernels import coefficients
from selmatch_ext.methods.scores import ScoreMethod
from selmatch_ext.models import embed, flat
from selmatch_ext.ranges import Count, Decay, Positive, Rate
from selmatch_ext.settings import Evaluation, Training


@dataclass(frozen=True)
class FRePoSettings(MethodSettings):
    """Neural feature regression with pooling (FRePo, arXiv 2206.00719)."""

    model: str = "FRePoNetBN"
    """The network in whose features images are compared; named as in experts.model."""
    iterations: Count = 500000
    batch_real: Count = 1024
    """Real images per update."""
    batch_train: Count = 1000
    """Images of the set, at most, in a step of a network."""
    optimizer: Literal["lamb", "adam"] = "lamb"
    """lamb: timm's Lamb, which the extra timm installs; adam: torch's Adam."""
    lr_images: Positive = 3e-4
    """Learning rate of the images; it falls along a cosine to a tenth."""
    lr_labels: Rate = 3e-4
    """Learning rate of the labels; it falls likewise."""
    ridge: Decay = 1e-6
    """λ, the penalty, times the mean of the kernel's diagonal."""
    flip: bool = True
    """Regression from the images and their mirror images; False where a mirror image may be of another class
    (digits)."""
    networks: Count = 10
    """Networks in the pool."""
    max_age: Count = 100
    """Steps on the set after which a network of the pool is replaced by a fresh one."""
    lr_network: Positive = 3e-4
    """Adam's learning rate of the networks."""


class FRePo(ScoreMethod):
    """Loss: ½ Σ_k mean over a real batch of (K_TS (K_SS + λ̃I)⁻¹ y_S − y_T)², K the inner products of the features,
    before the classifier, of a network of the pool in evaluation mode; plus the mean over S of −min(margin, 1/K), the
    margin of an image the difference of its two largest scores. Learned: the images and y_S, from (one-hot −
    1/K)/√(K/10) on.

    State: the pool. The network of an iteration then takes one step of Adam on the set, and is replaced when it has
    taken more than max_age. At the beginning they have taken different numbers of steps on the starting set."""

    name = "frepo"
    settings_type = FRePoSettings
    defaults = Defaults(
        evaluation=Evaluation(
            "FRePoNet",
            draw_per="batch",
            selected_strategy=None,
            loss="mse",
            training=Training(epochs=2000, lr=3e-4, batch=500, optimizer="adam", warmup=500, schedule="cosine"),
        )
    )

    def __init__(self, task: Task, settings: FRePoSettings):
        super().__init__(task, settings, learns=True, scale=math.sqrt(10 / task.data.classes))
        self.model = task.network(settings.model, "network", 0).requires_grad_(False)
        parameters, count = flat.flatten(self.model.parameters()), settings.networks
        for name in ("parameters", "exp_avg", "exp_avg_sq"):
            self.state[name] = parameters.new_zeros(count, len(parameters))
        for name, buffer in self.model.named_buffers():
            self.state[f"buffer.{name}"] = torch.stack([buffer] * count)
        self.state["steps"] = torch.zeros(count)
        """(networks,) how many steps each network has taken; Adam counts them here."""
        self.state["drawn"] = torch.zeros((), dtype=torch.int64)
        """How many networks were drawn so far."""
        self.state["last"] = torch.zeros((), dtype=torch.int64)
        """The network of the last iteration."""

    def check_network(self) -> None:
        self.optimizer()

    def largest_batch(self) -> tuple[torch.nn.Module, int]:
        return self.model, max(self.settings.batch_real, 2 * len(self.task.start))

    def optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        groups = [{"params": [self.images], "lr": s.lr_images}, {"params": [self.scores], "lr": s.lr_labels}]
        if s.optimizer == "adam":
            return torch.optim.Adam(groups)
        try:
            lamb = importlib.import_module("timm.optim").Lamb
        except ImportError as error:
            raise ValueError(
                "optimizer lamb is timm's Lamb, and timm is not installed: install selmatch_ext[timm], or give adam"
            ) from error
        return lamb(groups, weight_decay=0.0, max_grad_norm=None, always_adapt=True)

    def decay(self, iteration: int) -> float:
        return 0.1 + 0.9 * (1 + math.cos(math.pi * iteration / self.settings.iterations)) / 2

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        self._advance(iteration, generator)
        number = int(torch.randint(self.settings.networks, (), generator=generator))
        self.state["last"].fill_(number)
        flat.load_parameters(self.model, self.state["parameters"][number])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.state[f"buffer.{name}"][number])
        self.model.eval()
        data, scores = self.task.data, self.all_scores()
        indices = torch.randperm(len(data.train), generator=generator)[: self.settings.batch_real]
        wanted = centered(data.train.labels[indices], data.classes, torch.float64)
        top = scores.topk(2).values
        margin = (top[:, 0] - top[:, 1]).clamp(max=1 / data.classes)
        return self._distance(self.task.real(indices), wanted, scores) - margin.mean()

    def _distance(self, real: Tensor, wanted: Tensor, scores: Tensor) -> Tensor:
        images, weights = self.combined(), self.weights
        if self.settings.flip:
            images, scores = torch.cat([images, images.flip(3)]), torch.cat([scores, scores])
            weights = None if weights is None else torch.cat([weights, weights])
        with torch.no_grad():
            given = embed(self.model, real).double()
        seen = embed(self.model, images).double()
        guess = given @ (seen.T @ coefficients(seen @ seen.T, scores, self.settings.ridge, weights))
        return (guess - wanted.to(guess)).square().sum(1).mean() / 2

    def _advance(self, iteration: int, generator: torch.Generator) -> None:
        """Draws the pool, or trains the network of the last iteration, on the images as they are after that."""
        count, most = self.settings.networks, self.settings.max_age
        if iteration == 0:
            for number in range(count):
                self._draw(number)
                self._train(number, number * most // count, generator)
            return
        last = int(self.state["last"])
        self._train(last, 1, generator)
        if self.state["steps"][last] > most:
            self._draw(last)

    def _draw(self, number: int) -> None:
        """Puts a fresh network in that place of the pool."""
        fresh = self.task.network(self.settings.model, "network", int(self.state["drawn"]))
        self.state["drawn"].add_(1)
        self.state["parameters"][number] = flat.flatten(fresh.parameters()).detach()
        for name, buffer in fresh.named_buffers():
            self.state[f"buffer.{name}"][number] = buffer
        for name in ("exp_avg", "exp_avg_sq", "steps"):
            self.state[name][number] = 0

    def _train(self, number: int, steps: int, generator: torch.Generator) -> None:
        """Steps of Adam of a network of the pool on random images of the set; its place in the pool is changed."""
        theta = self.state["parameters"][number].requires_grad_()
        adam = torch.optim.Adam([theta], lr=self.settings.lr_network)
        adam.state[theta] = {name: self.state[name][number] for name in ("exp_avg", "exp_avg_sq")}
        adam.state[theta]["step"] = self.state["steps"][number]
        buffers = {name: self.state[f"buffer.{name}"][number] for name, _ in self.model.named_buffers()}
        images, targets = self.combined().detach(), Regression(self.all_scores().detach(), self.weights)
        self.model.train()
        for _ in range(steps):
            indices = torch.randperm(len(images), generator=generator)[: self.settings.batch_train].to(images.device)
            named = {**flat.unflatten(theta, self.model), **buffers}
            (theta.grad,) = torch.autograd.grad(
                targets.loss(functional_call(self.model, named, (images[indices],)), indices), theta
            )
            adam.step()

    def advice(self) -> str:
        s = self.settings
        rates = f"a smaller lr_images ({s.lr_images:g}) or lr_labels ({s.lr_labels:g})"
        return f"Try {rates}, or a larger ridge ({s.ridge:g})."
