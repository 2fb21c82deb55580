"""`Dual`, a tensor and its tangent, as they pass through the dual passes of rules.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selmatch_ext.ops.block import DualTensor


class Dual:
    """A tensor and its tangent. The tangent may come in two parts that are yet to be added (`more`), so that the next
    kernel can add them while it reads; None stands for a tangent of zero.

    `both` holds the two in one batch where they were written that way: (value, tangent) on the way forward, (tangent,
    value) on the way back, so that one correlation over both pairs value with tangent and tangent with value."""

    def __init__(self, value: Tensor | None, tangent: Tensor | None, more: Tensor | None = None):
        self._value, self.tangent, self.more = value, tangent, more
        self._both: dict[bool, Tensor] = {}  # by whether the value comes first

    @property
    def value(self) -> Tensor:
        """Of every dual but the gradient of the images, of which only the tangent is computed."""
        assert self._value is not None, "the value of this dual was not computed"
        return self._value

    @classmethod
    def forward(cls, both: Tensor) -> Dual:
        dual = cls(*both.chunk(2))
        dual._both[True] = both
        return dual

    @classmethod
    def backward(cls, both: Tensor, more: Tensor | None = None) -> Dual:
        tangent, value = both.chunk(2)
        dual = cls(value, tangent, more)
        if more is None:
            dual._both[False] = both
        return dual

    def whole_tangent(self) -> Tensor:
        if self.tangent is None:
            self.tangent = torch.zeros_like(self.value)
        if self.more is not None:
            self.tangent, self.more, self._both = self.tangent + self.more, None, {}
        return self.tangent

    def parts(self) -> DualTensor:
        """As the block operators take it: with the part of the tangent that is yet to be added."""
        return DualTensor(self.value, self.whole_tangent() if self.tangent is None else self.tangent, self.more)

    def has_both(self, value_first: bool) -> bool:
        """Whether the two lie in one batch already, so that `both` copies nothing."""
        return value_first in self._both

    def both(self, value_first: bool) -> Tensor:
        tangent = self.whole_tangent()
        if value_first not in self._both:
            self._both[value_first] = torch.cat((self.value, tangent) if value_first else (tangent, self.value))
        return self._both[value_first]

    def map(self, function: Callable[[Tensor], Tensor]) -> Dual:
        """A linear function of each image, applied to both."""
        tangent = None if self.tangent is None else function(self.whole_tangent())
        return Dual(None if self._value is None else function(self._value), tangent)

    def __add__(self, other: Dual) -> Dual:
        value = None if self._value is None or other._value is None else self._value + other._value
        return Dual(value, self.whole_tangent() + other.whole_tangent())
