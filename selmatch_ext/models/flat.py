"""A network's parameters as one vector, in `model.parameters()` order, and back."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_count(model: nn.Module) -> int:
    """Number of scalars P in the parameters of `model`."""
    return sum(p.numel() for p in model.parameters())


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """One new (P,) vector from tensors in the given order (for example `model.parameters()`). Differentiable."""
    tensors = list(tensors)
    if not tensors:
        raise ValueError("flatten: nothing to flatten, the list of tensors is empty")
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Views of `vector` (P,) with the names, order and shapes of `model.named_parameters()`: dict name -> tensor."""
    count = parameter_count(model)
    if vector.dim() != 1 or vector.numel() != count:
        raise ValueError(
            f"vector must have shape ({count},), the number of parameters of {type(model).__name__}, "
            f"got {tuple(vector.shape)}"
        )
    named = list(model.named_parameters())
    parts = vector.split([p.numel() for _, p in named])
    return {name: part.view(p.shape) for (name, p), part in zip(named, parts, strict=True)}


@torch.no_grad()
def load_parameters(model: nn.Module, vector: Tensor) -> None:
    """Copies `vector` (P,) into the parameters of `model`, in place (dtype and device of the model are kept)."""
    for parameter, part in zip(model.parameters(), unflatten(vector, model).values(), strict=True):
        parameter.copy_(part)
