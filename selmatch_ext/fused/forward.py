"""A network's forward pass on the fused kernels, through torch's autograd."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from selmatch_ext.fused.first_layer import FirstLayer
from selmatch_ext.fused.operations import Operation
from selmatch_ext.fused.rules import Block, Conv
from selmatch_ext.ops.block import BATCH_NORM
from selmatch_ext.ops.conv_block import Saved


class Forward:
    """The network's forward pass by its steps, differentiable once: images (B, C, H, W) -> logits (B, K).

    model: the module that the steps were read from, whose BatchNorms keep their running statistics. parameters: by
    name. dtype: of convolutions and activations; the rest is in that of the parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], steps: list[Operation], dtype: torch.dtype):
        self.model, self.parameters, self.dtype = model, parameters, dtype
        self.steps = [_with_bias(step) for step in steps]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """The results of all steps of the network for images x (B, C, H, W), in order; the last one is the logits."""
        filters = {rule.weight for rule in map(_convolution, self.steps) if rule is not None}
        p = {name: t.to(self.dtype) if name in filters else t for name, t in self.parameters.items()}
        values: list[Tensor] = []
        for step in self.steps:
            inputs = [x.to(self.dtype) if j < 0 else values[j] for j in step.inputs]
            value, saved = step.rule.forward(p, tuple(inputs))
            block, saved = (step.rule.block, saved[1]) if isinstance(step.rule, FirstLayer) else (step.rule, saved)
            if isinstance(block, Block) and block.kind.norm == BATCH_NORM and block.norm is not None:
                norm = self.model.get_submodule(block.norm)
                assert isinstance(norm, nn.BatchNorm2d)
                z, stats = (x, saved.stats) if isinstance(saved, Saved) else saved
                assert stats is not None  # of a pass forward
                _update(norm, z[:, 0].numel(), *stats[0].detach())
            values.append(value)
        return values


def _with_bias(step: Operation) -> Operation:
    """The step with its bias, although the next norm cancels it: BatchNorm's running mean contains it, and weight decay
    changes it."""
    conv = _convolution(step)
    if conv is None:
        return step
    conv = replace(conv, canceled=False)
    return replace(step, rule=replace(step.rule, conv=conv) if isinstance(step.rule, FirstLayer) else conv)


def _convolution(step: Operation) -> Conv | None:
    if isinstance(step.rule, FirstLayer):
        return step.rule.conv
    return step.rule if isinstance(step.rule, Conv) else None


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, count: int, mean: Tensor, scale: Tensor) -> None:
    """Running mean and unbiased variance, as nn.BatchNorm2d keeps them. count: of values a channel; mean, scale: (C,),
    their mean and 1 / deviation."""
    batches, running_mean, running_var = norm.num_batches_tracked, norm.running_mean, norm.running_var
    if not norm.track_running_stats or batches is None or running_mean is None or running_var is None:
        return
    batches += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / batches.item()
    variance = (scale**-2 - norm.eps) * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(variance.to(running_var.dtype), momentum)
