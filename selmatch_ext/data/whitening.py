"""ZCA whitening of images (as in MTT, arXiv 2203.11932): pixels without correlation, images that still look like
themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 0.1
ASYMMETRY = 1e-4  # of the largest entry; float32 rounds a symmetric matrix to 1e-7 of it
SINGULAR = 1e-6  # of the Cholesky factor's largest diagonal entry, the smallest


@dataclass
class Whitening:
    """x -> (x - mean) @ transform, for flattened images x.

    mean: (d,) and transform: (d, d) float32, symmetric and positive definite, so that it can be undone; d = C * H * W
    of normalized images. Raises ValueError for anything else.
    """

    mean: Tensor
    transform: Tensor

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.shape != (d,) or self.transform.shape != (d, d):
            raise ValueError(
                f"whitening has a mean of shape {tuple(self.mean.shape)} and a transform of shape "
                f"{tuple(self.transform.shape)}; they must be (d,) and (d, d)"
            )

        if self.mean.dtype != torch.float32 or self.transform.dtype != torch.float32:
            raise ValueError(
                f"whitening is of {self.mean.dtype} and {self.transform.dtype}; both must be torch.float32"
            )
        if not (self.mean.isfinite().all() and self.transform.isfinite().all()):
            raise ValueError("whitening holds NaN or infinite values")
        largest = self.transform.abs().max()
        if (self.transform - self.transform.T).abs().max() > ASYMMETRY * largest:
            raise ValueError("whitening's transform is not symmetric")
        factor, failed = torch.linalg.cholesky_ex(self.transform.double())
        diagonal = factor.diagonal()
        if failed or diagonal.min() < SINGULAR * diagonal.max():
            raise ValueError("whitening's transform is singular or not positive: it cannot be undone")

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened images; images: (…, C, H, W) float, normalized."""
        self._to(images)
        flat = images.flatten(-3) - self.mean.to(images.dtype)
        return (flat @ self.transform.to(images.dtype)).view(images.shape)

    def undo(self, images: Tensor) -> Tensor:
        """The normalized images that `self(…)` makes these whitened ones of. images: (…, C, H, W) float."""
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
    """ZCA of the images (n, C, H, W) float, normalized, n >= 2: transform = U (S + eps)^-1/2 U^T with U S U^T their
    covariance (divided by n - 1), computed in float64."""
    if len(images) < 2:
        raise ValueError(f"whitening needs at least 2 images, got {len(images)}")
    flat = images.flatten(1).double()
    mean = flat.mean(0)
    centered = flat - mean
    values, vectors = torch.linalg.eigh(centered.T @ centered / (len(flat) - 1))
    transform = vectors * (values.clamp(min=0) + eps).rsqrt() @ vectors.T
    return Whitening(mean.float(), transform.float())
