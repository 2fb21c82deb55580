"""Checks of what `unrolled_sgd` and `explain_engine` are given."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selmatch_ext.models.flat import parameter_count
from selmatch_ext.ops.dsa import Augmentation
from selmatch_ext.unroll.tesla import GRADIENTS

ENGINES = ("auto", "fused", "autograd")
KEEP = ("nothing", "activations", "all")
PRECISION = ("float32", "tf32", "bfloat16")


def check_options(engine: str, keep: str, gradient: str, precision: str) -> None:
    """ValueError for an option that is none of the allowed words."""
    choices = (
        ("engine", engine, ENGINES),
        ("keep", keep, KEEP),
        ("gradient", gradient, GRADIENTS),
        ("precision", precision, PRECISION),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_types(**tensors: Any) -> None:
    """TypeError for what is no ordinary tensor of float32 or float64."""
    for name, tensor in tensors.items():
        _check_ordinary(name, tensor)
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}")


def _check_ordinary(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}; use {name}.to_dense()")


def check_values(name: str, tensor: Tensor) -> None:
    """ValueError for a tensor without values."""
    if tensor.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")


def check_tensors(model: nn.Module, start: Tensor, images: Tensor) -> None:
    """TypeError or ValueError where model, start and images do not fit each other."""
    check_types(start=start, images=images)
    check_values("start", start)
    count = parameter_count(model)
    if start.dim() != 1 or start.numel() != count:
        raise ValueError(
            f"start must have shape ({count},), the number of parameters of the model, got {tuple(start.shape)}"
        )
    if images.dtype != start.dtype:
        raise TypeError(f"images must have the dtype of start, {start.dtype}, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must have shape (n, C, H, W), got {tuple(images.shape)}")
    if images.device != start.device:
        raise ValueError(f"images are on {images.device}, start is on {start.device}; put them on one device")
    for name, parameter in model.named_parameters():
        if parameter.device != start.device:
            raise ValueError(f"parameter {name} of the model is on {parameter.device}, start is on {start.device}")


def check_label_tensor(labels: Tensor, start: Tensor, images: Tensor) -> tuple[int, int] | None:
    """(smallest, largest) of integer labels, None for probabilities. Their upper end is checked once K is known."""
    _check_ordinary("labels", labels)
    if labels.device != start.device:
        raise ValueError(f"labels are on {labels.device}, start is on {start.device}; put them on one device")
    if labels.dim() == 0 or labels.shape[0] != images.shape[0]:
        raise ValueError(f"labels must have one entry per image ({images.shape[0]}), got shape {tuple(labels.shape)}")
    if labels.is_floating_point():
        if labels.dtype != start.dtype:
            raise TypeError(f"float labels must have the dtype of start, {start.dtype}, got {labels.dtype}")
        if labels.dim() != 2:
            raise ValueError(f"float labels are probabilities of shape (n, K), got shape {tuple(labels.shape)}")
        return None
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels must be integers or probabilities, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"integer labels must have shape (n,), got {tuple(labels.shape)}")
    if labels.numel() == 0 or torch._C._functorch.is_batchedtensor(labels):
        return None  # within vmap nothing looks at values
    smallest, largest = torch.stack(labels.aminmax()).tolist()
    if smallest < 0:
        raise ValueError(f"labels must not be negative, the smallest is {smallest}")
    return smallest, largest


def _listed(name: str, values: Any, of_what: str) -> list[Any]:
    """`values` as a list; TypeError for what has no elements, and for tuples with names, which are one thing."""
    single = isinstance(values, (str, bytes, dict, set)) or hasattr(values, "_fields")
    if single or not isinstance(values, Iterable) or (isinstance(values, torch.Tensor) and values.dim() == 0):
        raise TypeError(f"{name} must be a list of {of_what}, got {_what(values)}")
    return list(values)


def _what(value: Any) -> str:
    """A value in an error: short, and in one line."""
    shown = isinstance(value, (int, float, complex)) and len(f"{value!r}") < 30
    return f"{type(value).__name__}{f' {value!r}' * shown}"


def check_batches(batches: Any, images: Tensor) -> list[Tensor]:
    """The batches as int64 tensors on the images' device."""
    batches = _listed("batches", batches, "index tensors, one a step")
    if not batches:
        raise ValueError("batches is empty: give at least one index tensor")
    for i, batch in enumerate(batches):
        if not isinstance(batch, torch.Tensor) or batch.dtype not in (torch.int64, torch.int32):
            what = batch.dtype if isinstance(batch, torch.Tensor) else _what(batch)
            raise TypeError(f"batches[{i}] must be an int64 or int32 tensor of indices, got {what}")
        _check_ordinary(f"batches[{i}]", batch)
        check_values(f"batches[{i}]", batch)
        if batch.dim() != 1 or batch.numel() == 0:
            raise ValueError(f"batches[{i}] must have shape (B,) with B of at least 1, got {tuple(batch.shape)}")
    batches = [batch.to(images.device, torch.int64) for batch in batches]
    smallest, largest = torch.stack(torch.cat(batches).aminmax()).tolist()
    if smallest < 0 or largest >= images.shape[0]:
        raise ValueError(
            f"batches must hold indices of the {images.shape[0]} images, from 0 to {images.shape[0] - 1}, "
            f"got {smallest} to {largest}"
        )
    return batches


def check_augmentations(augmentations: Any, batches: list[Tensor]) -> list[Augmentation] | None:
    """The augmentations as a list, or None; TypeError or ValueError where they are none, or do not fit the batches."""
    if augmentations is None:
        return None
    augmentations = _listed("augmentations", augmentations, "results of sample_augmentation, one a step, or None")
    if len(augmentations) != len(batches):
        raise ValueError(f"augmentations: {len(augmentations)} given for {len(batches)} batches; give one a batch")
    for i, (p, batch) in enumerate(zip(augmentations, batches, strict=True)):
        if not isinstance(p, Augmentation):
            raise TypeError(f"augmentations[{i}] must be a result of sample_augmentation, got {_what(p)}")
        if p.ops.shape[0] not in (1, len(batch)):
            raise ValueError(f"augmentations[{i}] must have 1 row or {len(batch)}, as batches[{i}], got {len(p.ops)}")
    return augmentations


def _is_finite(number: Any) -> bool:
    try:
        return bool(np.isfinite(np.asarray(number, dtype=np.float64)).all())
    except OverflowError:  # of a whole number beyond 64 bits
        return False


def one_a_step(name: str, value: Any, count: int, start: Tensor) -> Tensor:
    """A learning rate, momentum or weight decay as a (count,) tensor like start, differentiable in what was given."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.ndarray, torch.Tensor)):
        raise TypeError(f"{name} must be a floating tensor or a number, got {_what(value)}")
    if not isinstance(value, torch.Tensor):
        if isinstance(value, np.ndarray) and value.dtype.kind not in "fiu":
            raise TypeError(f"{name} must be an array of floating numbers, got {value.dtype}")
        if not _is_finite(value):
            raise ValueError(f"{name} must be finite in 64 bits, got {_what(value)}")
        value = torch.as_tensor(value, dtype=torch.float64, device=start.device)
    _check_ordinary(name, value)
    check_values(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor or a number, got a tensor of {value.dtype}")
    if value.shape not in ((), (count,)):
        raise ValueError(f"{name} must be 0-d or have shape ({count},), one for each batch, got {tuple(value.shape)}")
    return value.to(start.device, start.dtype).expand(count)


def momentum_and_decay(
    count: int, start: Tensor, momentum: Any = 0.0, nesterov: Any = False, weight_decay: Any = 0.0
) -> tuple[Tensor | None, Tensor | None]:
    """momentum and weight_decay as (count,) tensors like start; None and None where both are the number 0."""
    if not isinstance(nesterov, bool):
        raise TypeError(f"nesterov must be True or False, got {_what(nesterov)}")
    if not nesterov and _is_zero(momentum) and _is_zero(weight_decay):
        return None, None
    values = one_a_step("momentum", momentum, count, start), one_a_step("weight_decay", weight_decay, count, start)
    for name, value in zip(("momentum", "weight_decay"), values, strict=True):
        smallest, largest = _extremes(value)
        if not 0 <= smallest <= largest < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got values from {smallest:g} to {largest:g}")
        if name == "momentum" and nesterov and smallest == 0:
            raise ValueError("nesterov=True needs a momentum above 0 in every step")
    return values


def _is_zero(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0


def _extremes(values: Tensor) -> tuple[float, float]:
    """(smallest, largest); ones within vmap, where nothing looks at values. NaN where one is."""
    values = values.detach()
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        if torch._C._functorch.is_batchedtensor(values):
            return 1.0, 1.0
        values = torch._C._functorch.get_unwrapped(values)
    smallest, largest = torch.stack(values.aminmax()).tolist()
    return smallest, largest
