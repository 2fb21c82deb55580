"""`FirstLayer`, the convolution of the images and the block that takes its result, as one operation of rules.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selmatch_ext.fused.dual import Dual
from selmatch_ext.fused.rules import Block, Conv, DualGradients, Duals, Gradients, Known, Parameters, channels_last
from selmatch_ext.ops.conv_block import (
    Saved,
    conv_block,
    conv_block_backward,
    conv_block_dual_backward,
    conv_block_dual_forward,
    conv_block_suits,
)

_PIXELS = 256  # of an image; with fewer, the matrices of an image cost more than its pixels


@dataclass(frozen=True)
class FirstLayer:
    """Where `conv3x3` computes the convolution, `conv_block_suits` and the images are not small, convolution and block
    are the operation of ops/conv_block.py: then the convolution's result, the largest tensor of a step, is never
    there. Else they run one after the other.

    conv: of images of 1 to 4 channels, without a bias, or with one that the block's norm cancels."""

    conv: Conv
    block: Block

    def forward(self, p: Parameters, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
        if self._is_one(p, inputs[0]) and not inputs[0].requires_grad:
            x = channels_last(inputs[0])
            y, saved = conv_block(x, p[self.conv.weight], self.conv.bias_of(p, x), self.block.pick(p), self.block.kind)
            return y, (x, saved)
        z, x = self.conv.forward(p, inputs)
        y, of_block = self.block.forward(p, (z,))
        return y, (x, of_block)

    def backward(self, p: Parameters, saved: Any, g: Tensor, need_x: bool) -> tuple[Gradients, Parameters]:
        x, of_block = saved
        assert not need_x  # that of the images is asked for in dual passes alone
        if not isinstance(of_block, Saved):
            (gz,), gradients = self.block.backward(p, of_block, g, True)
            assert gz is not None
            back, of_filter = self.conv.backward(p, x, gz, need_x)
            return back, gradients | of_filter
        weight = self.conv.weight
        found, *affine = conv_block_backward(g, x, p[weight], of_block, self.block.pick(p), self.block.kind)
        return (None,), {weight: found, **self.block.named(affine)}

    def dual_forward(self, p: Parameters, t: Parameters, inputs: Duals, kept: Known | None) -> tuple[Dual, Any]:
        if self._is_one(p, inputs[0].value):
            x, weight = channels_last(inputs[0].value), self.conv.weight
            affines = self.block.pick(p), self.block.pick(t)
            y_both, saved = conv_block_dual_forward(x, (p[weight], t[weight]), affines, self.block.kind)
            return Dual.forward(y_both), (x, saved)
        z, of_conv = self.conv.dual_forward(p, t, inputs, None)
        y, of_block = self.block.dual_forward(p, t, (z,), None)
        return y, (of_conv, of_block)

    def dual_backward(
        self, p: Parameters, t: Parameters, saved: Any, g: Dual, need_x: bool, need_p: bool
    ) -> tuple[DualGradients, Parameters]:
        of_conv, of_block = saved
        if not isinstance(of_block, Saved):
            (gz,), gradients = self.block.dual_backward(p, t, of_block, g, True, need_p)
            assert gz is not None
            back, of_filter = self.conv.dual_backward(p, t, of_conv, gz, need_x, need_p)
            return back, gradients | of_filter
        weight = self.conv.weight
        found, *affine, of_x = conv_block_dual_backward(
            (g.value, g.whole_tangent()),
            of_conv,
            (p[weight], t[weight]),
            of_block,
            (self.block.pick(p), self.block.pick(t)),
            self.block.kind,
            x_wanted=need_x,
        )
        return (Dual(None, of_x) if need_x else None,), {weight: found, **self.block.named(affine)}

    def _is_one(self, p: Parameters, x: Tensor) -> bool:
        suits = conv_block_suits(self.block.pick(p), self.block.kind)
        return suits and x.shape[2] * x.shape[3] >= _PIXELS and self.conv.by_conv3x3(p[self.conv.weight])
