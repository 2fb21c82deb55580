"""Gradients that lead to flat minima: SAM (arXiv 2010.01412) and GSAM (arXiv 2203.08065), as FTD trains its experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from selmatch_ext.settings import Training


@contextlib.contextmanager
def sharpness_aware(parameters: Iterable[Tensor], settings: Training) -> Iterator[None]:
    """Begins with the gradient g of a loss in the parameters θ. Within, they are θ + ε, without gradients: the caller
    computes there the gradient g′ of the same loss. Afterwards they are θ again, with the gradient g′ − α g⊥.

    ε = ρ g / ‖g‖, or with settings.sharpness_adaptive ρ θ² g / ‖|θ| g‖; g⊥ is the part of g that is orthogonal to g′.
    Norms are over all parameters; those without a gradient do not count. Where g is zero, ε is."""
    found = [(p, p.detach().clone(), p.grad) for p in parameters if p.grad is not None]
    moved, before, gradients = map(list, zip(*found, strict=True))
    with torch.no_grad():
        scales = [p.abs() if settings.sharpness_adaptive else torch.ones_like(p) for p in before]
        scaled = [s * g for s, g in zip(scales, gradients, strict=True)]
        factor = settings.sharpness_rho / _norm(scaled).clamp(min=torch.finfo(scaled[0].dtype).tiny)
        for p, s, g in zip(moved, scales, scaled, strict=True):
            p.add_(factor * s * g)
            p.grad = None
    yield
    with torch.no_grad():
        uphill = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        square = _norm(uphill).square()
        along = sum((g * u).sum() for g, u in zip(gradients, uphill, strict=True))
        share = torch.where(square > 0, along / square, 0)
        for p, old, g, u in zip(moved, before, gradients, uphill, strict=True):
            p.copy_(old)
            p.grad = u - settings.sharpness_alpha * (g - share * u)


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()
