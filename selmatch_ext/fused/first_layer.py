"""`FirstLayer`, the convolution of the images and the block that takes its result, as one operation of rules.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selmatch_ext.fused.dual import Dual
from selmatch_ext.fused.rules import Block, Conv, DualGradients, Duals, Gradients, Known, Parameters, channels_last
from selmatch_ext.ops.block import DualTensor
from selmatch_ext.ops.conv_block import (
    conv_block,
    conv_block_backward,
    conv_block_dual_backward,
    conv_block_dual_forward,
)

_PIXELS = 256  # of an image; with fewer, pieces are too small to be fast


@dataclass(frozen=True)
class FirstLayer:
    """Where `conv3x3` computes the convolution and the images are not small, convolution and block are the operations
    of ops/conv_block.py: then the gradient of the convolution's result, the largest tensor of a step, is not stored.
    Else, and in a dual pass back in which no gradient of the images is wanted, they run one after the other.

    conv: of images of 1 to 4 channels, without a bias, or with one that the block's norm cancels."""

    conv: Conv
    block: Block

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        if self._in_pieces(p, inputs[0]) and not inputs[0].requires_grad:
            x, name = channels_last(inputs[0]), self.conv.weight
            y, z, stats = conv_block(x, p[name], self.conv.bias_of(p, x), self.block.pick(p), self.block.kind)
            self.block.check(z)
            return y, (x, (z, stats))
        z, x = self.conv.forward(p, inputs)
        y, saved = self.block.forward(p, (z,))
        return y, (x, saved)

    def backward(self, p: Parameters, saved: Any, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        x, (z, stats) = saved
        assert not need_x  # that of the images is asked for in dual passes alone
        if not self._in_pieces(p, x):
            (gz,), gradients = self.block.backward(p, (z, stats), g, True)
            assert gz is not None
            back, of_filter = self.conv.backward(p, x, gz, need_x)
            return back, gradients | of_filter
        found, *affine = conv_block_backward(g, (x, z, stats), self.block.pick(p), self.block.kind)
        return (None,), {self.conv.weight: found, **self.block.named(affine)}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, Any]:
        if self._in_pieces(p, inputs[0].value):
            x, name = channels_last(inputs[0].value), self.conv.weight
            affines = self.block.pick(p), self.block.pick(t)
            y_both, z_both, stats = conv_block_dual_forward(x, (p[name], t[name]), affines, self.block.kind)
            return Dual.forward(y_both), ((Dual(x, None), None), (DualTensor(*z_both.chunk(2)), stats))
        z, of_conv = self.conv.dual_forward(p, t, inputs, None)
        y, of_block = self.block.dual_forward(p, t, (z,), None)
        return y, (of_conv, of_block)

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: Any, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        of_conv, of_block = saved
        if not need_x or not self._in_pieces(p, of_conv[0].value):
            (gz,), gradients = self.block.dual_backward(p, t, of_block, g, True, need_p)
            assert gz is not None
            back, of_filter = self.conv.dual_backward(p, t, of_conv, gz, need_x, need_p)
            return back, gradients | of_filter
        (x, _), (z, stats), name = of_conv, of_block, self.conv.weight
        of_x, of_weight, *affine = conv_block_dual_backward(
            DualTensor(g.value, g.whole_tangent()),
            (x.value, z, stats),
            (p[name], t[name]),
            (self.block.pick(p), self.block.pick(t)),
            self.block.kind,
            weight_wanted=need_p,
        )
        return (Dual(None, of_x),), self.block.named(affine) | ({name: of_weight} if need_p else {})

    def _in_pieces(self, p: Parameters, x: Tensor) -> bool:
        return x.shape[2] * x.shape[3] >= _PIXELS and self.conv.by_conv3x3(p[self.conv.weight])
