"""Xavier's initial weights, which dataset distillation (DD, arXiv 1811.10959) starts from."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def xavier(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Initial parameters (P,) for `model`, on the CPU, in `model.parameters()` order: weights of convolutions and
    linear layers from Xavier's normal distribution and biases 0, drawn from `generator` (CPU); the rest as `model` has
    it. A shared parameter counts once."""
    drawn, seen = [], set()
    for module in model.modules():
        weighted = isinstance(module, (nn.Conv2d, nn.Linear))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            value = parameter.detach().cpu().clone()
            if weighted and name == "weight":
                nn.init.xavier_normal_(value, generator=generator)
            elif weighted:
                value.zero_()
            drawn.append(value.reshape(-1))
    return torch.cat(drawn)
