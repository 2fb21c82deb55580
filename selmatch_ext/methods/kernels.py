"""Kernels of infinitely wide, fully connected ReLU networks in closed form, and ridge regression with any kernel.

Convolutional kernels need the covariance of every pair of pixels of every pair of images, (H·W)² numbers for each pair
of images, which takes many GPUs and a library of its own; they are left out (see docs/methods.md).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["ntk", "nngp"]
VARIANCE = 2.0
"""σ_w², the variance of the weights times their number of inputs."""
BIAS = 0.01
"""σ_b², the variance of the biases."""
SAME = 1e-14
"""Where the squared sine of the angle of two inputs is below this, they count as parallel: float64 cannot tell."""


def relu_kernel(x: Tensor, y: Tensor, depth: int, kernel: Kernel) -> Tensor:
    """(n, m): the kernel of images x (n, …) and y (m, …), float64, for a network of `depth` hidden layers (dense, ReLU)
    and a last dense one, in the NTK parametrization: an input of D numbers, weights √2/√fan_in and biases 0.1 times
    normal ones. nngp: the covariance of the outputs at the start; ntk: the inner product of their gradients.

    Differentiable in both; the root of 0, at x = y, has the derivative 0. Source: Jacot et al., arXiv 1806.07572, and
    Cho and Saul, 2009, for the ReLU."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    size = x.shape[1]
    k, x_own, y_own = x @ y.T / size, x.square().sum(1, keepdim=True) / size, y.square().sum(1) / size
    k, x_own, y_own = (VARIANCE * t + BIAS for t in (k, x_own, y_own))
    tangent = k
    for _ in range(depth):
        product = x_own * y_own
        squared_sine = product - k.square()
        parallel = squared_sine <= SAME * product
        root = torch.where(parallel, 1.0, squared_sine).sqrt().where(~parallel, 0.0)
        turn = math.pi - torch.atan2(root, k)
        k = VARIANCE * (root + turn * k) / (2 * math.pi) + BIAS
        x_own, y_own = (VARIANCE * t / 2 + BIAS for t in (x_own, y_own))
        tangent = k + VARIANCE * tangent * turn / (2 * math.pi)
    return tangent if kernel == "ntk" else k


def coefficients(k: Tensor, scores: Tensor, ridge: float, weights: Tensor | None = None) -> Tensor:
    """(n, K) c of kernel ridge regression, which predicts K_TS c at inputs T: those that minimize
    Σ wᵢ ‖(k c)ᵢ − scoresᵢ‖² + λ tr(cᵀ k c) with λ = ridge·mean(w·diag k).

    k: (n, n) float64, of the set with itself. scores: (n, K). weights: (n,), None = all 1. Where k is 0 or not finite
    the result is not finite. Differentiable in k and scores."""
    scores = scores.to(k)
    root = torch.ones_like(k[0]) if weights is None else weights.to(k).sqrt()
    weighted = root.unsqueeze(1) * k * root
    penalty = ridge * weighted.diagonal().mean() * torch.eye(len(k), dtype=k.dtype, device=k.device)
    solved, _ = torch.linalg.solve_ex(weighted + penalty, root.unsqueeze(1) * scores)
    return root.unsqueeze(1) * solved
