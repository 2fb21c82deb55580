"""`Context`: the data, seed and device of a run, which every stage is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selmatch_ext import models, seeds
from selmatch_ext.data.images import ImageData

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Context:
    """The real images, the seed of every random choice, and the device that computes."""

    data: ImageData
    seed: int = 0
    device: torch.device = CPU

    def generator(self, *stream: str | int) -> torch.Generator:
        """A CPU generator of the named random stream of the seed."""
        return seeds.generator(self.seed, *stream)

    def network(self, model: str, *stream: str | int) -> torch.nn.Module:
        """A new network of that name for the data, in train mode; its weights come from the named random stream."""
        weights = self.generator(*stream, "weights")
        data = self.data
        return models.build(model, data.channels, data.classes, data.image_size, generator=weights).to(self.device)

    def real_images(self, split: str = "train") -> Callable[[Tensor], Tensor]:
        """Indices (b,) -> normalized images (b, C, H, W) of the split, which stays on the device as uint8."""
        images = getattr(self.data, split).images.to(self.device)
        return lambda indices: self.data.normalize(images[indices])
