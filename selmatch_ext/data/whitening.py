"""ZCA whitening of images (as in MTT, arXiv 2203.11932): pixels without correlation, images that still look like
themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 0.1


@dataclass
class Whitening:
    """x -> (x - mean) @ transform, for flattened images x.

    mean: (d,) and transform: (d, d) float32, symmetric, d = C * H * W of normalised images."""

    mean: Tensor
    transform: Tensor

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.transform.shape != (d, d):
            raise ValueError(
                f"whitening has a mean of shape {tuple(self.mean.shape)} and a transform of shape "
                f"{tuple(self.transform.shape)}; they must be (d,) and (d, d)"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images; images: (…, C, H, W) float, normalised."""
        self._to(images)
        flat = images.flatten(-3) - self.mean.to(images.dtype)
        return (flat @ self.transform.to(images.dtype)).view(images.shape)

    def undo(self, images: Tensor) -> Tensor:
        """The normalised images that `self(…)` makes these whitened ones of. images: (…, C, H, W) float."""
        self._to(images)
        inverse = torch.linalg.inv(self.transform.double()).to(images.dtype)
        return (images.flatten(-3) @ inverse + self.mean.to(images.dtype)).view(images.shape)

    def _to(self, images: Tensor) -> None:
        if images.shape[-3:].numel() != self.mean.numel():
            raise ValueError(
                f"images of shape {tuple(images.shape[-3:])} do not fit a whitening of {self.mean.numel()} pixels"
            )
        self.mean, self.transform = self.mean.to(images.device), self.transform.to(images.device)


def fit_whitening(images: Tensor, eps: float = EPS) -> Whitening:
    """ZCA of the images (n, C, H, W) float, normalised, n >= 2: transform = U (S + eps)^-1/2 U^T with U S U^T their
    covariance (divided by n - 1), computed in float64."""
    if len(images) < 2:
        raise ValueError(f"whitening needs at least 2 images, got {len(images)}")
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    centred = flat - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(flat) - 1))
    transform = vectors * (values.clamp(min=0) + eps).rsqrt() @ vectors.T
    return Whitening(mean.float(), transform.float())
