"""Ordinary training on the fused kernels: a network's forward pass through torch's autograd, with blocks and 3 x 3
convolutions of ours in the places of torch's layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selmatch_ext.ops.block import BATCH_NORM
from selmatch_ext.unroll.program import Step, Unsupported, read
from selmatch_ext.unroll.rules import Add, Block, Conv


def fast(model: nn.Module, x: Tensor, precision: str = "float32"):
    """A function x -> logits that computes what `model` does in training mode, differentiable once in its parameters,
    faster: or `model` itself where x is not on the CPU or the fused engine has no rule for one of its operations.

    x: (B, C, H, W) float32, as it will be called with. precision: "bfloat16" has convolutions and activations in
    bfloat16, and statistics, sums, parameters and the last layer in float32, whatever autocast is around the call.
    BatchNorm keeps its running statistics; a network with an InstanceNorm that keeps some is not for this.
    """
    modules = list(model.modules())
    if x.device.type != "cpu" or x.dtype != torch.float32 or not all(m.training for m in modules):
        return model
    if any(isinstance(m, nn.InstanceNorm2d) and m.track_running_stats for m in modules):
        return model
    try:
        steps = read(model)
    except Unsupported:
        return model
    return _Fast(model, steps, torch.bfloat16 if precision == "bfloat16" else torch.float32)


class _Fast:
    def __init__(self, model: nn.Module, steps: list[Step], dtype: torch.dtype):
        self.steps, self.dtype = steps, dtype
        self.parameters = dict(model.named_parameters())

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        filters = {step.rule.weight for step in self.steps if isinstance(step.rule, Conv)}
        p = {name: t.to(self.dtype) if name in filters else t for name, t in self.parameters.items()}
        values: list[Tensor] = []
        for step in self.steps:
            inputs = [x.to(self.dtype) if j < 0 else values[j] for j in step.inputs]
            if isinstance(step.rule, Add):
                values.append(inputs[0] + inputs[1])
                continue
            value, saved = step.rule.forward(p, inputs[0])
            if isinstance(step.rule, Block) and step.rule.kind.norm == BATCH_NORM:
                _update(step.rule.norm, saved[0], saved[1].detach())
            values.append(value)
        return values[-1]


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, z: Tensor, stats: Tensor) -> None:
    """Running mean and unbiased variance, as nn.BatchNorm2d keeps them. stats: (1, 2, C), mean and 1 / deviation."""
    if not norm.track_running_stats:
        return
    norm.num_batches_tracked += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.item()
    count = z.numel() // z.shape[1]
    mean, scale = stats[0]
    variance = (scale**-2 - norm.eps) * (count / (count - 1))
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance, momentum)
