"""Which statistics BatchNorm uses: in each use of a network the one that its paper has.

- Students, whose training is unrolled: those of each batch. `unrolled_sgd` runs them in train mode, in both engines.
- Networks of gradient matching (DC, DSA): those of some real images, frozen (`freeze_statistics`).
- Networks with parameters of a trajectory, or trained as a schedule says: those of some real images, since neither has
  running statistics.
- Networks that are trained and then tested: torch's running ones.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selmatch_ext.modules.copying import copied
from selmatch_ext.seeds import RandomState


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of `model`."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@torch.no_grad()
def freeze_statistics(model: nn.Module, x: Tensor, momentum: float = 1.0) -> None:
    """Takes the running statistics of every BatchNorm layer from the batch x (B, C, H, W), and puts those layers alone
    into evaluation mode, so that they keep them. Nothing happens to a model without such layers.

    momentum: the weight of the batch's statistics against mean 0 and variance 1. With 1 they are exactly the batch's;
    the public code of DC and DSA has 0.1."""
    layers = batchnorms(model)
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = momentum
        layer.train()
    try:
        model(x)
    finally:
        for layer, before in zip(layers, momenta, strict=True):
            layer.momentum = before
            layer.eval()


@torch.no_grad()
def refuses_one_image(model: nn.Module, x: Tensor) -> bool:
    """Whether BatchNorm in `model` cannot train on the batch x of one image (1, C, H, W): one of its layers sees a
    single value per channel. The model and the generators of torch, Python and numpy stay as they are.

    Raises TypeError where the module cannot be copied."""
    if not batchnorms(model):
        return False
    before = RandomState(x.device)
    try:
        copied(model, lambda p: nn.Parameter(p.detach().clone(), p.requires_grad)).train()(x)
    except ValueError as error:
        return "more than 1 value per channel" in str(error)
    finally:
        before.restore()
    return False
