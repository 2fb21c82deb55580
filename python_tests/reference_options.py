"""Learned labels and the options of trajectory matching, written out from their papers in plain PyTorch."""

import reference
import torch
from torch.func import functional_call
from torch.nn import functional as F


def outputs(model, theta, images):
    parts = theta.split([p.numel() for p in model.parameters()])
    named = {n: t.view_as(p) for (n, p), t in zip(model.named_parameters(), parts, strict=True)}
    return functional_call(model, named, (images,))


def label_distillation(model, start, images, labels, batches, lr, real, wanted, tables):
    """LD (arXiv 2006.08572, algorithm 1): the real loss after steps on images with soft labels."""
    rate = torch.tensor(lr, dtype=start.dtype)
    theta = reference.unrolled_sgd_full_graph(
        model, start.clone().requires_grad_(), images, labels, batches, rate, tables
    )
    return F.cross_entropy(outputs(model, theta, real), wanted)


def first_adam_step(model, theta, images, labels, lr):
    """The parameters after the first step of Adam on the mean of −Σ y log p."""
    theta = theta.clone().requires_grad_()
    loss = -(labels * outputs(model, theta, images).log_softmax(1)).sum(1).mean()
    (g,) = torch.autograd.grad(loss, theta)
    return theta.detach() - lr * g / (g.abs() + 1e-8)


def partial_distance(student, start, target, first, smallest):
    """The distance of trajectories without the first parameters (PAD), and without those of the others whose squared
    error is smallest (EDF, arXiv 2410.17193): the student's errors and the expert's path are summed over the same."""
    errors = (student - target) ** 2
    rest = range(int(first * len(errors) + 1e-9), len(errors))
    ordered = sorted(rest, key=lambda j: errors[j].item())
    kept = ordered[int(smallest * len(ordered) + 1e-9) :]
    return errors[kept].sum() / ((start - target)[kept] ** 2).sum()


def sharpness_aware_gradient(loss, theta, rho, alpha, adaptive):
    """GSAM (arXiv 2203.08065) of a function of one vector: the gradient at the end of a step uphill, without `alpha`
    times the part of the plain gradient that is orthogonal to it."""
    (g,) = torch.autograd.grad(loss(theta), theta)
    up = theta**2 * g / (theta.abs() * g).norm() if adaptive else g / g.norm()
    there = (theta + rho * up).detach().requires_grad_()
    (uphill,) = torch.autograd.grad(loss(there), there)
    direction = uphill / uphill.norm()
    return uphill - alpha * (g - (g @ direction) * direction)
