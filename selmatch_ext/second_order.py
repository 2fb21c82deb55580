"""Second derivatives of networks where torch's usual operations have none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

_REASONS = (
    (r"derivative for '?(?:aten::)?(\w+?)'? is not implemented", "torch has no second derivative of {}"),
    (r"[Dd]ouble backwards on (\w+) not supported", "torchvision has no second derivative of {}"),
    (r"use_reentrant=True", "it uses torch.utils.checkpoint with use_reentrant=True; use_reentrant=False works"),
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
                raise _no_second_derivative(what) from error
        raise


def _no_second_derivative(reason: str) -> NotImplementedError:
    return NotImplementedError(f"model has no gradient of its gradient: {reason}")


def check_differentiable_again(gradients: Iterable[Tensor]) -> None:
    """NotImplementedError where the graph of `gradients` ends at a torch.autograd.Function that is marked with
    once_differentiable: torch.autograd.grad takes what comes before it for constant, without a word."""
    waiting, seen = [g.grad_fn for g in gradients], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("Error"):
            raise _no_second_derivative("a torch.autograd.Function in it is marked with once_differentiable")
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]


def _hard_sigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of hard sigmoid, min(max(x + 3, 0), 6) / 6: g times a slope that is constant almost everywhere."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return torch.ops.aten.hardsigmoid_backward(g, x)
        slope = torch.ops.aten.hardsigmoid_backward(torch.ones_like(g), x)
    return g * slope.detach()


# torch raises an error for the second derivative of hard sigmoid. With this package imported it has one, in all code.
_LIBRARY = torch.library.Library("aten", "IMPL")
for _key in ("AutogradCPU", "AutogradCUDA"):
    _LIBRARY.impl("hardsigmoid_backward", _hard_sigmoid_backward, _key)
