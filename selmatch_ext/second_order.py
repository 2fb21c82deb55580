"""Second derivatives of networks where torch's usual operations have none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_REASONS = (
    (r"derivative for aten::(\w+) is not implemented", "torch has no second derivative of {}"),
    (r"marked with @once_differentiable", "one of its autograd.Functions is marked with once_differentiable"),
    (r"use_reentrant=True", "it uses torch.utils.checkpoint with use_reentrant=True; use_reentrant=False works"),
    (r"([\w:]*deform_conv2d) not supported", "torch has no second derivative of {}"),
    (r"[Dd]ouble backwards? .*not (?:supported|implemented)", "one of its operations has no second derivative"),
)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within, attention is computed by its formula in place of a fused kernel, of whose backward pass torch has no
    derivative; and a network that has other operations without one raises NotImplementedError, which names the
    operation. Put it around the forward pass and all derivatives."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        for pattern, reason in _REASONS:
            found = re.search(pattern, str(error))
            if found:
                what = reason.format(*(re.sub("_backward.*$", "", name) for name in found.groups()))
                raise NotImplementedError(f"model has no gradient of its gradient: {what}") from error
        raise


def _hard_sigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of hard sigmoid, min(max(x + 3, 0), 6) / 6, by operations that can be differentiated again."""
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.aten.hardsigmoid_backward(g, x)
    return torch.where((x > -3) & (x < 3), g * (1 / 6), 0.0)


# torch raises an error for the second derivative of hard sigmoid. With this package imported it has one, in all code.
_LIBRARY = torch.library.Library("aten", "IMPL")
for _key in ("AutogradCPU", "AutogradCUDA"):
    _LIBRARY.impl("hardsigmoid_backward", _hard_sigmoid_backward, _key)
