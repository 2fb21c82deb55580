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
