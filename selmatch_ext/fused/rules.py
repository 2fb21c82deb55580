"""What the fused engine can compute: each kind of operation with its four rules, forward, backward, and both again
carrying tangents ("dual").

In a dual pass everything is the derivative, along one direction in parameter space, of what the plain pass computes:
where the plain pass has x and parameters p, the dual one has (x, tangent of x) and (p, tangent of p). The mathematics
is that of forward-mode differentiation of the backward pass; csrc/block/block.h has the formulas of `Block`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext.fused.dual import Dual
from selmatch_ext.ops.block import (
    BATCH_NORM,
    Affine,
    BlockKind,
    DualTensor,
    block_backward,
    block_dual_backward,
    block_dual_forward,
    block_forward,
)
from selmatch_ext.ops.conv3x3 import (
    FEW,
    conv3x3,
    conv3x3_dual,
    conv3x3_input_gradient,
    conv3x3_suits,
    conv3x3_weight_gradient,
)

Parameters = dict[str, Tensor]
Gradients = tuple[Tensor | None, ...]
Duals = tuple[Dual, ...]
DualGradients = tuple[Dual | None, ...]
Known = tuple[Tensor, Tensor | None]
"""Of an operation in an earlier pass: its result, and the gradient of its input where that is known."""


class Rule(Protocol):
    """How one operation is computed. What `forward` and `dual_forward` save goes to the pass back unchanged.

    p: the parameters by name; t: their tangents. inputs: the results that go in, each (B, ...). g: the gradient with
    respect to the result. need_x, need_p: whether gradients with respect to the inputs and the parameters are asked
    for; where they are not, the gradient may be None and the parameters may be left out. The passes back return the
    gradient with respect to each input, in their order, and those of the parameters by name."""

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        """(result, what `backward` needs)."""

    def backward(self, p: Parameters, saved: Any, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        """(gradients of the inputs, gradients of the parameters)."""

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, Any]:
        """(result and tangent, what `dual_backward` needs). kept: what an earlier pass kept."""

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: Any, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        """(gradients of the inputs and their tangents, tangents of the parameters' gradients)."""


def channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W) in channels-last memory. An image of one channel lies the same way in both formats, and torch then
    takes it for contiguous: its convolution would return a contiguous result, which the next block would have to copy.
    So its strides are set to those of channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    return x.as_strided(x.shape, (height * width, 1, width, 1)) if channels == 1 else x


@dataclass(frozen=True)
class Conv:
    """Convolution.

    Its weights are in the dtype of the images and in the preferred memory format; `FusedStepper` converts them.

    canceled: the next norm subtracts every channel's mean, so the bias has no effect: it is left out, and its gradient,
    which is exactly 0, is not returned."""

    weight: str
    bias: str | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    canceled: bool = False

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        x = channels_last(x)
        return self._convolve(x, p[self.weight], self.bias_of(p, x)), x

    def backward(self, p: Parameters, x: Tensor, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        back, gradient = self._gradients(g, x, p[self.weight], need_x)
        return (back,), {self.weight: gradient, **self._bias_gradient(p, g)}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, tuple]:
        (x,) = inputs
        result, known = kept or (None, None)
        if x.tangent is None:
            x = Dual(channels_last(x.value), None)
        weight, bias = p[self.weight], self.bias_of(p, x.value)
        if self.by_conv3x3(weight):
            tangent = None if x.tangent is None else x.whole_tangent()
            biases = bias, self.bias_of(t, x.value)
            both = conv3x3_dual(x.value, tangent, weight, t[self.weight], biases, value=result is None)
            return (Dual.forward(both) if result is None else Dual(result, both)), (x, known)
        moved = self._convolve(x.value, t[self.weight], self.bias_of(t, x.value))
        if result is None and bias is None and x.has_both(value_first=True):
            value, tangent = self._convolve(x.both(value_first=True), weight, None).chunk(2)
            return Dual(value, tangent, moved), (x, known)
        value = self._convolve(x.value, weight, bias) if result is None else result
        if x.tangent is None:
            return Dual(value, moved), (x, known)
        return Dual(value, self._convolve(x.whole_tangent(), weight, None), moved), (x, known)

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: tuple, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        x, known = saved
        weight, of_images = p[self.weight], x.tangent is None  # of their gradient only the tangent is asked for
        ours, unknown = self.by_conv3x3(weight), need_x and known is None
        back: Any = None
        gradients: Parameters = {}
        if need_p or (unknown and not ours):
            pair = (g.whole_tangent(), x.value) if of_images else (g.both(value_first=False), x.both(value_first=True))
            back, gradient = self._gradients(*pair, weight, unknown and not ours, need_p)
            gradients = {self.weight: gradient, **self._bias_gradient(p, g.whole_tangent())} if need_p else {}
        if not need_x:
            return (None,), gradients
        more = None
        if ours:
            value = unknown and not of_images
            back = conv3x3_dual(g.value, g.whole_tangent(), weight, t[self.weight], transposed=True, value=value)
        else:
            more = self._gradients(g.value, x.value, t[self.weight], True, False)[0]
            if known is not None:
                back = self._gradients(g.whole_tangent(), x.value, weight, True, False)[0]
        if of_images or known is not None:
            return (Dual(known, back, more),), gradients
        return (Dual.backward(back, more),), gradients

    def bias_of(self, p: Parameters, like: Tensor) -> Tensor | None:
        return None if self.bias is None or self.canceled else p[self.bias].to(like.dtype)

    def _settings(self) -> tuple:
        """What aten.convolution_backward takes after bias_sizes: stride, padding, dilation, transposed, output_padding,
        groups."""
        return self.stride, self.padding, self.dilation, False, (0, 0), self.groups

    def by_conv3x3(self, weight: Tensor) -> bool:
        return self._settings() == ((1, 1), (1, 1), (1, 1), False, (0, 0), 1) and conv3x3_suits(weight)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.by_conv3x3(weight):
            return conv3x3(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _bias_gradient(self, p: Parameters, g: Tensor) -> Parameters:
        if self.bias is None or self.canceled:
            return {}
        return {self.bias: g.sum((0, 2, 3), dtype=p[self.bias].dtype)}

    def _gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool = True
    ) -> tuple[Any, Any]:
        """The gradients of the convolution's input x and of its weight, computed from g, the gradient of its result.
        None in place of one that is not needed."""
        if self.by_conv3x3(weight):
            of_x = conv3x3_input_gradient(g, weight) if need_x else None
            return of_x, conv3x3_weight_gradient(x, g) if need_weight else None
        few = self.groups == 1 and x.shape[1] <= FEW and g.device.type == "cpu" and g.dtype != torch.bfloat16
        if not need_x or not few:
            return self._torch_gradients(g, x, weight, need_x, need_weight)
        # torch's own is several times slower where so few channels come out
        columns = weight.flatten(1).T @ g.flatten(2)
        of_x = F.fold(columns, x.shape[2:], weight.shape[2:], self.dilation, self.padding, self.stride)
        return of_x, self._torch_gradients(g, x, weight, False, True)[1] if need_weight else None

    def _torch_gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Any, Any]:
        mask = (need_x, need_weight, False)
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(g, x, weight, None, *self._settings(), mask)
        return of_x, of_weight


@dataclass(frozen=True)
class Block:
    """Norm, activation and pooling, each of which may be missing, in one pass over memory (ops/block.py).

    centers: whether the norm subtracts the mean of every channel. norm: the path of the norm's module in the model."""

    kind: BlockKind
    weight: str | None = None
    bias: str | None = None
    centers: bool = False
    norm: str | None = None

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple]:
        (x,) = inputs
        z = _four(x)
        self.check(z)
        y, stats = block_forward(z, *self.pick(p), self.kind)
        return y.flatten(1) if x.dim() == 2 else y, (z, stats)

    def backward(
        self, p: Parameters, saved: tuple[Tensor, Tensor], g: Tensor, need_x: bool
    ) -> tuple[Gradients, Parameters]:
        z, stats = saved
        gz, *gradients = block_backward(_four(g), z, stats, *self.pick(p), self.kind)
        return (gz.flatten(1) if g.dim() == 2 else gz,), self.named(gradients)

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, tuple]:
        (x,) = inputs
        z = _four_each(x.parts())
        both, stats = block_dual_forward(z, self.pick(p), self.pick(t), self.kind)
        return Dual.forward(both.flatten(1) if x.value.dim() == 2 else both), (z, stats)

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: tuple, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        z, stats = saved
        both, *gradients = block_dual_backward(_four_each(g.parts()), z, stats, self.pick(p), self.pick(t), self.kind)
        return (Dual.backward(both.flatten(1) if g.value.dim() == 2 else both),), self.named(gradients)

    def check(self, z: Tensor) -> None:
        if self.kind.norm == BATCH_NORM and z.numel() == z.shape[1]:  # torch's error, in its words
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {z.shape}")

    def pick(self, p: Parameters) -> Affine:
        return (None if self.weight is None else p[self.weight]), (None if self.bias is None else p[self.bias])

    def named(self, gradients: list[Tensor]) -> Parameters:
        named = zip((self.weight, self.bias), gradients, strict=True)
        return {name: gradient for name, gradient in named if name is not None}


def _four(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


def _four_each(x: DualTensor) -> DualTensor:
    return DualTensor(_four(x.value), _four(x.tangent), None if x.more is None else _four(x.more))


@dataclass(frozen=True)
class Linear:
    """Matrix product with (out, in) weights, in the parameters' dtype."""

    weight: str
    bias: str | None

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        x = x.to(p[self.weight].dtype)
        return F.linear(x, p[self.weight], self._bias(p)), x

    def backward(self, p: Parameters, x: Tensor, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        gradients = {self.weight: g.T @ x}
        if self.bias is not None:
            gradients[self.bias] = g.sum(0)
        return (g @ p[self.weight] if need_x else None,), gradients

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, Dual]:
        (x,) = inputs
        x = x.map(lambda v: v.to(p[self.weight].dtype))
        moved = F.linear(x.value, t[self.weight], self._bias(t))
        if x.tangent is not None:
            moved = torch.addmm(moved, x.tangent, p[self.weight].T)
        return Dual(F.linear(x.value, p[self.weight], self._bias(p)), moved), x

    def dual_backward(
        self, p: Parameters, t: Parameters, x: Dual, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        gt = g.whole_tangent()
        gradients = {}
        if need_p:
            gradients[self.weight] = gt.T @ x.value
            if x.tangent is not None:
                gradients[self.weight] = torch.addmm(gradients[self.weight], g.value.T, x.tangent)
            if self.bias is not None:
                gradients[self.bias] = gt.sum(0)
        if not need_x:
            return (None,), gradients
        value = None if x.tangent is None else g.value @ p[self.weight]
        return (Dual(value, torch.addmm(gt @ p[self.weight], g.value, t[self.weight])),), gradients

    def _bias(self, p: Parameters) -> Tensor | None:
        return None if self.bias is None else p[self.bias]


@dataclass(frozen=True)
class Flatten:
    """(B, C, H, W) to (B, C H W)."""

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple]:
        (x,) = inputs
        return x.flatten(1), (x.shape[1:], x.dtype)

    def backward(self, p: Parameters, saved: tuple, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        return (self._back(g, saved),), {}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, tuple]:
        (x,) = inputs
        return x.map(lambda v: v.flatten(1)), (x.value.shape[1:], x.value.dtype)

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: tuple, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        return (g.map(lambda v: self._back(v, saved)),), {}

    @staticmethod
    def _back(g: Tensor, saved: tuple) -> Tensor:
        shape, dtype = saved
        return g.to(dtype).view(len(g), *shape)


class LinearPooling:
    """Base class of pooling that is a linear function of the map x, such as average pooling. A subclass defines
    `_pool`, which computes the result, and `_back`, which computes the gradient of x from that of the result. The
    tangent of a linear function's result is the function of the tangent, so both also serve the dual passes."""

    def _pool(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _back(self, g: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        (x,) = inputs
        return self._pool(x), x

    def backward(self, p: Parameters, x: Tensor, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        return (self._back(g, x),), {}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, Tensor]:
        (x,) = inputs
        return x.map(self._pool), x.value

    def dual_backward(
        self, p: Parameters, t: Parameters, x: Tensor, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        return (g.map(lambda v: self._back(v, x)),), {}


@dataclass(frozen=True)
class Average(LinearPooling):
    """Average pooling other than the 2 x 2 that a block does; size None: over the whole map."""

    size: tuple[int, int] | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    ceil: bool = False
    count_padding: bool = True
    divisor: int | None = None

    def _settings(self, x: Tensor) -> tuple:
        size = tuple(x.shape[2:]) if self.size is None else self.size
        stride = size if self.size is None else self.stride
        return size, stride, self.padding, self.ceil, self.count_padding, self.divisor

    def _pool(self, x: Tensor) -> Tensor:
        return torch.ops.aten.avg_pool2d(x, *self._settings(x))

    def _back(self, g: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.avg_pool2d_backward(g.contiguous(), x, *self._settings(x))


@dataclass(frozen=True)
class Add:
    """The sum of two maps, as in residual networks."""

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, None]:
        return inputs[0] + inputs[1], None

    def backward(self, p: Parameters, saved: None, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        return (g, g), {}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, None]:
        return inputs[0] + inputs[1], None

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: None, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        return (g, g), {}
