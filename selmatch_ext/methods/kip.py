"""Kernel regression with the kernel of an infinitely wide network: kernel inducing points (KIP) and Label Solve
(LS)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.soft_labels import centered
from selmatch_ext.methods.base import CONVNET, Defaults, LoopSettings, MethodSettings, Task
from selmatch_ext.methods.kernels import Kernel, coefficients, relu_kernel
from selmatch_ext.methods.scores import ScoreMethod
from selmatch_ext.ops.dsa import augment
from selmatch_ext.ranges import Count, Decay, Depth, Positive, Rate

CHUNK = 1000
"""Real images whose kernel is computed at once, where all of them are needed."""
RANK = 1e-9
"""Directions of y_S with a singular value below this share of the largest one are taken for rounding errors, which are
about the precision of float64 over the ridge: equal images get equal scores."""
REGRESSION = Defaults(evaluation=replace(CONVNET, model="MLP", distilled_strategy="none", loss="mse"))


@dataclass(frozen=True)
class LabelSolveSettings(LoopSettings):
    """Label Solve: real images, whose labels are solved for in closed form (arXiv 2011.00050)."""

    kernel: Kernel = "ntk"
    """Kernel of a fully connected ReLU network of infinite width: ntk that of training by gradient descent, nngp that
    of training the last layer alone."""
    depth: Depth = 1
    """Hidden layers of that network."""
    ridge: Decay = 1e-6
    """λ, the penalty, times the mean of the kernel's diagonal."""


@dataclass(frozen=True)
class KIPSettings(MethodSettings):
    """Kernel inducing points (arXiv 2011.00050)."""

    kernel: Kernel = "ntk"
    """Kernel of a fully connected ReLU network of infinite width: ntk that of training by gradient descent, nngp that
    of training the last layer alone."""
    depth: Depth = 1
    """Hidden layers of that network."""
    iterations: Count = 50000
    batch_real: Count = 5000
    """Real images per update, equally many of each class."""
    lr_images: Positive = 0.04
    """Adam's learning rate for the images."""
    lr_labels: Rate = 0.04
    """Adam's learning rate for the labels."""
    labels: Literal["hard", "learned"] = "learned"
    """hard: they stay one-hot minus 1/K."""
    ridge: Decay = 1e-6
    """λ, the penalty, times the mean of the kernel's diagonal."""
    strategy: str = "none"
    """Augmentation of the real images: one of the names, drawn per update, with parameters of its own for each
    image."""


class KernelMethod(ScoreMethod):
    """Base of KIP and LS: predictions K_TS (K_SS + λ̃I)⁻¹ y of kernel ridge regression from the set S, λ̃ the ridge times
    the mean of K_SS's diagonal. All of it is computed in float64."""

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, m) float64, of images (n, C, H, W) and (m, C, H, W)."""
        return relu_kernel(x, y, self.settings.depth, self.settings.kernel)

    def coefficients(self, images: Tensor, scores: Tensor, weights: Tensor | None) -> Tensor:
        """(n, K) float64: predictions at x are `kernel(x, images) @ coefficients`."""
        return coefficients(self.kernel(images, images), scores, self.settings.ridge, weights)

    @torch.no_grad()
    def further_results(self, sets: dict[str, DistilledSet]) -> dict[str, Any]:
        """The test accuracy in % of kernel regression itself from each of `sets`, by which the papers compare."""
        data, found = self.task.data, {}
        for name, subset in sets.items():
            images, held = subset.images.to(self.task.device), subset.regression().to(self.task.device)
            solved, right = self.coefficients(images, held.scores, held.weights), 0
            for indices in torch.arange(len(data.test)).split(CHUNK):
                seen = data.normalize(data.test.images[indices], self.task.device)
                guess = (self.kernel(seen, images) @ solved).argmax(1).cpu()
                right += int((guess == data.test.labels[indices]).sum())
            found[name] = 100 * right / len(data.test)
        return {"kernel": {"kernel regression": found}}


class KIP(KernelMethod):
    """Loss: ½ mean over a real batch of ‖y_T − K_TS (K_SS + λ̃I)⁻¹ y_S‖². Learned: the images and, unless `labels` is
    hard, y_S."""

    name = "kip"
    settings_type = KIPSettings
    defaults = REGRESSION

    def __init__(self, task: Task, settings: KIPSettings):
        super().__init__(task, settings, settings.labels == "learned")
        self.per_class = settings.batch_real // task.data.classes
        if self.per_class < 1:
            raise ValueError(
                f"batch_real is {settings.batch_real}; allowed is {task.data.classes}, the number of classes, and above"
            )

    def optimizer(self) -> torch.optim.Optimizer:
        groups = [{"params": [self.images], "lr": self.settings.lr_images}]
        if "scores" in self.learned:
            groups.append({"params": [self.scores], "lr": self.settings.lr_labels})
        return torch.optim.Adam(groups)

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        data, images = self.task.data, self.combined()
        indices = data.sample_each(self.per_class, generator)
        p = self.task.draw(len(indices), self.settings.strategy, generator)
        real = augment(self.task.real(indices), p)
        wanted = centered(data.train.labels[indices], data.classes, torch.float64)
        guess = self.kernel(real, images) @ self.coefficients(images, self.all_scores(), self.weights)
        return (guess - wanted.to(guess)).square().sum(1).mean() / 2

    def advice(self) -> str:
        s = self.settings
        rates = f"a smaller lr_images ({s.lr_images:g}) or lr_labels ({s.lr_labels:g})"
        return f"Try {rates}, or a larger ridge ({s.ridge:g})."


class LabelSolve(KernelMethod):
    """y_S = A⁺ (y_T − A_F y_F) over all real images T: A and A_F are the columns of K_TS (K_SS + λ̃I)⁻¹ of the images
    whose labels are solved for and of the others. Of several solutions it is the shortest. The images stay as they are.

    It takes one iteration: a Newton step, which reaches the minimum of this quadratic loss at once."""

    name = "label-solve"
    settings_type = LabelSolveSettings
    defaults = REGRESSION

    def __init__(self, task: Task, settings: LabelSolveSettings):
        super().__init__(task, settings, learns=True)
        self.images.requires_grad_(False)
        del self.learned["images"]

    @property
    def iterations(self) -> int:
        return 1

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.scores], lr=1.0)  # of the gradient y − y*, see `loss`

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        """½ mean over all real images of ‖y_T − prediction‖² at the solution y*; its gradient is y_S − y*."""
        triangle = self._triangle()
        unknowns = len(self.scores)
        a, b = triangle[:, :unknowns].cpu(), triangle[:, unknowns:].cpu()
        solved = torch.linalg.lstsq(a, b, rcond=RANK, driver="gelsd").solution
        least = (a @ solved - b).square().sum() / (2 * len(self.task.data.train))
        distance = (self.scores - solved.to(self.scores.device)).square().sum() / 2
        return distance - distance.detach() + least.to(distance)

    @torch.no_grad()
    def _triangle(self) -> Tensor:
        """(r, n + K) float64, the triangle R of A and y_T − A_F y_F side by side, which has the same least squares
        problem: QR, part by part, so that memory does not grow with the data."""
        data, images, learned = self.task.data, self.combined(), self.task.start.distilled.to(self.task.device)
        identity = torch.eye(len(images), dtype=torch.float64, device=images.device)
        solved, given = self.coefficients(images, identity, self.weights), self.all_scores()[~learned]
        rows = identity.new_empty(0, len(self.scores) + data.classes)
        for indices in torch.arange(len(data.train)).split(CHUNK):
            a = self.kernel(self.task.real(indices), images) @ solved
            wanted = centered(data.train.labels[indices], data.classes, torch.float64).to(a)
            rest = wanted - a[:, ~learned] @ given.to(a)
            rows = torch.linalg.qr(torch.cat([rows, torch.cat([a[:, learned], rest], 1)]), mode="r").R
        return rows
