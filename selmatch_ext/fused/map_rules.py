"""Rules for what networks do to maps between the operations of rules.py: pooling of any kind, activations that a block
does not have, products and concatenation. They run on torch's operators on every device.

As in rules.py, the dual passes give the derivative of what the plain passes compute along one direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext.fused.dual import Dual
from selmatch_ext.fused.rules import DualGradients, Duals, Gradients, Known, LinearPooling, Parameters, channels_last

aten = torch.ops.aten


@dataclass(frozen=True)
class MaxPool:
    """Max pooling other than the 2 x 2 that a block does. Of equal values in a window, the one that torch's operator
    names is the maximum: its tangent is the result's, and the gradient goes to it."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil: bool

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        (x,) = inputs
        x = channels_last(x)
        y, indices = aten.max_pool2d_with_indices(x, *self._settings())
        return y, (x, indices)

    def backward(
        self, p: Parameters, saved: tuple[Tensor, Tensor], g: Tensor, need_x: bool
    ) -> tuple[Gradients, Parameters]:
        return (self._back(g, *saved),), {}

    def dual_forward(
        self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None
    ) -> tuple[Dual, tuple[Tensor, Tensor]]:
        (x,) = inputs
        y, saved = self.forward(p, (x.value,))
        return Dual(y, None if x.tangent is None else _gathered(x.whole_tangent(), saved[1])), saved

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: tuple[Tensor, Tensor], g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        return (g.map(lambda v: self._back(v, *saved)),), {}

    def _settings(self) -> tuple:
        return self.size, self.stride, self.padding, self.dilation, self.ceil

    def _back(self, g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        return aten.max_pool2d_with_indices_backward(channels_last(g), x, *self._settings(), indices)


def _gathered(x: Tensor, indices: Tensor) -> Tensor:
    """The pixels of x (B, C, H, W) at indices (B, C, h, w) into its H W pixels: (B, C, h, w), channels-last."""
    batch, channels, height, width = indices.shape
    pixels, places = (v.permute(0, 2, 3, 1).flatten(1, 2) for v in (x, indices))
    return pixels.gather(1, places).view(batch, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class AdaptiveAverage(LinearPooling):
    """Average pooling to a map of a given size; None: the size that the map has. Windows may overlap."""

    size: tuple[int | None, int | None]

    def _pool(self, x: Tensor) -> Tensor:
        sides = zip(self.size, x.shape[2:], strict=True)
        return aten._adaptive_avg_pool2d(x, [side if size is None else size for size, side in sides])

    def _back(self, g: Tensor, x: Tensor) -> Tensor:
        return aten._adaptive_avg_pool2d_backward(g, x)


class Function(NamedTuple):
    """A function of single values, with what the rule's settings give it after x.

    first: (v, x) -> f'(x) v, by torch's operator for the backward pass, which decides at kinks. second: f''(x) from x
    in float32 or float64; None where it is 0."""

    value: Callable[..., Tensor]
    first: Callable[..., Tensor]
    second: Callable[..., Tensor] | None = None


def _gelu_second(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":  # f = x Phi(x), f' = Phi + x phi, f'' = (2 - x^2) phi
        return (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715  # f = x (1 + tanh u) / 2 with u = scale (x + cubic x^3)
    tanh = torch.tanh(scale * (x + cubic * x**3))
    slope, curve = scale * (1 + 3 * cubic * x * x), 6 * scale * cubic * x  # u' and u''
    return (1 - tanh * tanh) * (slope + 0.5 * x * (curve - 2 * tanh * slope * slope))


def _tanh_second(x: Tensor) -> Tensor:
    y = x.tanh()
    return -2 * y * (1 - y * y)


def _hardswish_second(x: Tensor) -> Tensor:
    return (x.abs() < 3).to(x.dtype) / 3


FUNCTIONS = {
    "gelu": Function(
        lambda x, approximate: F.gelu(x, approximate=approximate),
        lambda v, x, approximate: aten.gelu_backward(v, x, approximate=approximate),
        _gelu_second,
    ),
    "hardsigmoid": Function(F.hardsigmoid, aten.hardsigmoid_backward),
    "hardswish": Function(F.hardswish, aten.hardswish_backward, _hardswish_second),
    "hardtanh": Function(F.hardtanh, aten.hardtanh_backward),
    "tanh": Function(torch.tanh, lambda v, x: aten.tanh_backward(v, x.tanh()), _tanh_second),
}


@dataclass(frozen=True)
class Elementwise:
    """A function of every value, by its name in FUNCTIONS. With y = f(x): dy = f'(x) dx, the gradient is f'(x) g, and
    its tangent f'(x) dg + f''(x) dx g."""

    name: str
    settings: tuple = ()

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        return FUNCTIONS[self.name].value(x, *self.settings), x

    def backward(self, p: Parameters, x: Tensor, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        return (self._first(g, x),), {}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, Dual]:
        (x,) = inputs
        y, _ = self.forward(p, (x.value,))
        return Dual(y, self._first(x.whole_tangent(), x.value)), x

    def dual_backward(
        self, p: Parameters, t: Parameters, x: Dual, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        tangent, second = self._first(g.whole_tangent(), x.value), FUNCTIONS[self.name].second
        if second is not None:
            wide = x.value.float() if x.value.dtype == torch.bfloat16 else x.value
            tangent = tangent + second(wide, *self.settings).to(tangent.dtype) * x.whole_tangent() * g.value
        return (Dual(self._first(g.value, x.value), tangent),), {}

    def _first(self, v: Tensor, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name].first(v, x, *self.settings)


@dataclass(frozen=True)
class Multiply:
    """The product of two maps, such as a map and its gate (B, C, 1, 1): a side of length 1 is repeated."""

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return inputs[0] * inputs[1], inputs

    def backward(
        self, p: Parameters, saved: tuple[Tensor, ...], g: Tensor, need_x: bool
    ) -> tuple[Gradients, Parameters]:
        a, b = saved
        return (_summed(g * b, a), _summed(g * a, b)), {}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, Duals]:
        a, b = inputs
        return Dual(a.value * b.value, a.whole_tangent() * b.value + a.value * b.whole_tangent()), inputs

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: Duals, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        a, b = saved
        return (self._back(g, b, a.value), self._back(g, a, b.value)), {}

    @staticmethod
    def _back(g: Dual, other: Dual, like: Tensor) -> Dual:
        tangent = g.whole_tangent() * other.value + g.value * other.whole_tangent()
        return Dual(_summed(g.value * other.value, like), _summed(tangent, like))


def _summed(g: Tensor, like: Tensor) -> Tensor:
    """The gradient of what was repeated: g summed to the shape of `like`."""
    return g.sum_to_size(like.shape).to(like.dtype)


@dataclass(frozen=True)
class Concatenate:
    """Maps or vectors put one behind the other along the channels."""

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list]:
        return torch.cat(inputs, 1), _parts(inputs)

    def backward(self, p: Parameters, saved: list, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        return tuple(_split(g, saved)), {}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, list]:
        values = tuple(x.value for x in inputs)
        return Dual(torch.cat(values, 1), torch.cat([x.whole_tangent() for x in inputs], 1)), _parts(values)

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: list, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        pairs = zip(_split(g.value, saved), _split(g.whole_tangent(), saved), strict=True)
        return tuple(Dual(value, tangent) for value, tangent in pairs), {}


def _parts(inputs: tuple[Tensor, ...]) -> list[tuple[int, torch.dtype]]:
    return [(x.shape[1], x.dtype) for x in inputs]


def _split(g: Tensor, parts: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    pieces = g.split([count for count, _ in parts], 1)
    return [piece.to(dtype) for piece, (_, dtype) in zip(pieces, parts, strict=True)]
