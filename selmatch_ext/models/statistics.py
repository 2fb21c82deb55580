"""BatchNorm's statistics, taken from given images."""

import copy

import torch
from torch import nn


def batchnorms(model):
    """The BatchNorm layers of `model`."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def freeze_statistics(model, x):
    """Makes the statistics of the batch x (B, C, H, W) the running ones of every BatchNorm layer, and puts those layers
    alone into evaluation mode, so that they keep them. Nothing happens to a model without such layers."""
    layers = batchnorms(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    model(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


@torch.no_grad()
def refuses_one_image(model, x):
    """Whether BatchNorm in `model` cannot train on the batch x of one image (1, C, H, W): one of its layers sees a
    single value per channel. The model and torch's generators stay as they are."""
    if not batchnorms(model):
        return False
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            copy.deepcopy(model).train()(x)
        except ValueError as error:
            return "more than 1 value per channel" in str(error)
    return False
