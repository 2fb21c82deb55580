"""Ordinary training on the fused kernels: a network's forward pass through torch's autograd, with blocks and 3 x 3
convolutions of ours in the places of torch's layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from selmatch_ext._C import build_info
from selmatch_ext.fused.comparing import operations_of
from selmatch_ext.fused.forward import Forward
from selmatch_ext.fused.fusion import with_first_layer
from selmatch_ext.fused.operations import Unsupported


def fast(model: nn.Module, x: Tensor, precision: str = "float32") -> Callable[[Tensor], Tensor]:
    """A faster function x -> logits that computes what `model` does in training mode, differentiable once in its
    parameters; or `model` itself, where the fused engine has no kernels for x's device or cannot run the model: on the
    CPU and, where the extension was built with CUDA, on CUDA devices it runs a network that was read and compared with
    what was read of it. On a GPU it has not been measured (`python -m bench training --device cuda` does that).

    x: (B, C, H, W) float32, as it will be called with. precision: "bfloat16" has convolutions and activations in
    bfloat16, and statistics, sums, parameters and the last layer in float32, whatever autocast is around the call; else
    everything is float32, in TF32 where the caller's `precision_scope` around the call and around the backward pass
    says so. BatchNorm updates its running statistics. A network whose InstanceNorm tracks running statistics is
    returned as is."""
    modules = list(model.modules())
    if not _has_kernels(x.device) or x.dtype != torch.float32 or not all(m.training for m in modules):
        return model
    if any(isinstance(m, nn.InstanceNorm2d) and m.track_running_stats for m in modules):
        return model
    try:
        with torch.autocast(x.device.type, enabled=False):
            steps = operations_of(model, x, training=True)
    except Unsupported:
        return model
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    steps = with_first_layer(steps, {name: p.shape for name, p in parameters.items()})
    return Forward(model, parameters, steps, dtype)


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and build_info()["cuda"] is not None)
