"""The fused engine: one step's gradient, and its derivative along a direction, by the rules of rules.py.

No graph is kept and no second backward pass is made: the derivative of the gradient along a direction in parameter
space is one dual pass, forward and backward, whose parameter part is the Hessian-vector product and whose image part is
the mixed term (adjoint.py says what they are for)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selmatch_ext.fused.dual import Dual
from selmatch_ext.fused.fusion import with_first_layer
from selmatch_ext.fused.operations import Operation
from selmatch_ext.fused.rules import Conv, Known, Linear, Parameters
from selmatch_ext.modules.private import PrivateModel
from selmatch_ext.ops.conv3x3 import FEW
from selmatch_ext.unroll.adjoint import Derivative, check_logits
from selmatch_ext.unroll.tesla import Wanted


class FusedStepper:
    """A `Stepper` for a network that fused/reader.py has read. model: the copy that it was read from. What is kept of a
    step are the results of its convolutions and, where all is kept, the gradients of their inputs."""

    keeps_last = True

    def __init__(self, model: PrivateModel, operations: list[Operation], precision: str):
        self.model, self.precision = model, precision
        self.shapes = dict(zip(model.names, model.shapes, strict=True))
        self.operations = with_first_layer(operations, self.shapes)
        self.parameters = sum(model.sizes)
        self.numbers: Tensor | None = None  # (K,), of the classes
        self.convolutions = [operation.rule for operation in operations if isinstance(operation.rule, Conv)]

    def classes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The number of classes K: the network makes logits (B, K) of images of `shape` (B, C, H, W). ValueError where
        its result is of another shape."""
        last = self.operations[-1].rule
        if isinstance(last, Linear):
            return self.shapes[last.weight][0]
        # Not on tensors without memory: torch loads its compiler for those.
        like, images = (torch.zeros(size, dtype=dtype, device=self.model.device) for size in (self.parameters, shape))
        return check_logits(self._run(self._named(like), self._images(images))[0][-1], images)

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, wanted: Wanted | None, keep: str) -> tuple[Tensor, Any]:
        p = self._named(theta)
        values, saved = self._run(p, self._images(x))
        logits = values[-1].to(theta.dtype)
        check_logits(logits, x)
        both = zip(self.operations, values, strict=True)
        kept: list[Known | None] = [(v, None) if self._is_kept(operation) else None for operation, v in both]
        gradients = self._run_back(p, saved, self._shares_and_gradient(logits, y)[1], kept if keep == "all" else None)
        return self._flat(gradients, theta), None if keep == "nothing" else kept

    def derivative(
        self, theta: Tensor, x: Tensor, y: Tensor, kept: Any, direction: Tensor, wanted: Wanted
    ) -> Derivative:
        p, t = self._named(theta), self._named(direction)
        logits, saved = self._run_dual(p, t, self._images(x), kept or [None] * len(self.operations))
        logits = logits.map(lambda v: v.to(theta.dtype))
        shares, g = self._shares_and_gradient(logits.value, y)
        moved = logits.whole_tangent()
        scale = y.sum(1, keepdim=True) / len(x) if y.is_floating_point() else 1 / len(x)
        gt = _softmax_tangent(shares, moved) * scale
        gradients: Parameters = {}
        u: Dual | None = None
        if wanted.parameters or wanted.images:
            gradients, u = self._run_dual_back(p, t, saved, Dual(g, gt), wanted)
        return Derivative(
            (g * moved).sum(),
            self._flat(gradients, theta) if wanted.parameters else None,
            None if u is None else u.whole_tangent().to(theta.dtype),
            ((shares * moved).sum(1, keepdim=True) - moved) / len(x) if wanted.labels else None,
        )

    def freed(self, kept: Any) -> None:
        return None

    def _is_kept(self, operation: Operation) -> bool:
        """What belongs to convolutions, but for those of a few channels, such as the images': they are quick to redo,
        and large (in a ConvNet three quarters of it all)."""
        return isinstance(operation.rule, Conv) and self.shapes[operation.rule.weight][1] > FEW

    def _named(self, vector: Tensor) -> Parameters:
        named = dict(zip(self.model.names, self.model.split(vector), strict=True))
        for rule in self.convolutions:
            weight = self._images(named[rule.weight])
            if not rule.by_conv3x3(weight):
                weight = weight.contiguous(memory_format=torch.channels_last)
            named[rule.weight] = weight
        return named

    def _shares_and_gradient(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(logits), and the gradient of the mean cross-entropy with respect to the logits, both (B, K). y: (B,)
        classes or (B, K) probabilities."""
        shares = logits.softmax(1)
        if y.is_floating_point():
            return shares, (shares * y.sum(1, keepdim=True) - y) / len(y)
        if self.numbers is None:
            self.numbers = torch.arange(logits.shape[1], device=logits.device)
        return shares, (shares - (y.unsqueeze(1) == self.numbers).to(shares.dtype)) / len(y)

    def _flat(self, gradients: Parameters, like: Tensor) -> Tensor:
        """(P,); zeros where the loss does not reach a parameter."""
        zero = like.new_zeros(1)
        shaped = zip(self.model.names, self.model.shapes, strict=True)
        parts = [gradients[n].reshape(-1) if n in gradients else zero.expand(s.numel()) for n, s in shaped]
        return torch.cat([part.to(like.dtype) for part in parts])

    def _images(self, x: Tensor) -> Tensor:
        """Images or weights in the dtype of the convolutions."""
        return x.bfloat16() if self.precision == "bfloat16" else x

    def _run(self, p: Parameters, x: Tensor) -> tuple[list[Tensor], list[Any]]:
        """The result of every operation, and what each saves for its backward pass."""
        values: list[Tensor] = []
        saved: list[Any] = []
        for operation in self.operations:
            value, keep = operation.rule.forward(p, tuple(x if j < 0 else values[j] for j in operation.inputs))
            values.append(value)
            saved.append(keep)
        return values, saved

    def _run_back(self, p: Parameters, saved: list, g: Tensor, kept: list[Known | None] | None) -> Parameters:
        """The gradients of the parameters. kept: gets the gradient of the input beside each result that it has."""
        cotangents = {len(self.operations) - 1: g}
        gradients: Parameters = {}
        for i in reversed(range(len(self.operations))):
            operation, g = self.operations[i], cotangents.pop(i)
            backs, found = operation.rule.backward(p, saved[i], g, max(operation.inputs) >= 0)
            saved[i] = None
            if kept is not None and (known := kept[i]) is not None:
                kept[i] = known[0], backs[0]
            _accumulate(gradients, found)
            for j, back in zip(operation.inputs, backs, strict=True):
                if j >= 0 and back is not None:
                    cotangents[j] = cotangents[j] + back if j in cotangents else back
        return gradients

    def _run_dual(self, p: Parameters, t: Parameters, x: Tensor, kept: list) -> tuple[Dual, list]:
        values: dict[int, Dual] = {}  # of the steps whose result is still needed
        saved: list[Any] = []
        waiting = [operation.users for operation in self.operations]
        for i, (operation, known) in enumerate(zip(self.operations, kept, strict=True)):
            inputs = tuple(Dual(x, None) if j < 0 else values[j] for j in operation.inputs)
            values[i], keep = operation.rule.dual_forward(p, t, inputs, known)
            saved.append(keep)
            for j in operation.inputs:
                if j >= 0:
                    waiting[j] -= 1
                    if waiting[j] == 0:
                        del values[j]
        return values[len(self.operations) - 1], saved

    def _run_dual_back(
        self, p: Parameters, t: Parameters, saved: list, g: Dual, wanted: Wanted
    ) -> tuple[Parameters, Dual | None]:
        """The tangents of the parameters' gradients, and the dual gradient of the images, where it is wanted."""
        cotangents = {len(self.operations) - 1: g}  # that of the images is number -1
        gradients: Parameters = {}
        for i in reversed(range(len(self.operations))):
            operation, g = self.operations[i], cotangents.pop(i)
            need_x = wanted.images or max(operation.inputs) >= 0
            backs, found = operation.rule.dual_backward(p, t, saved[i], g, need_x, wanted.parameters)
            saved[i] = None
            _accumulate(gradients, found)
            for j, back in zip(operation.inputs, backs, strict=True):
                if back is not None and (j >= 0 or wanted.images):
                    cotangents[j] = cotangents[j] + back if j in cotangents else back
        return gradients, cotangents.get(-1)


def _accumulate(total: Parameters, found: Parameters) -> None:
    for name, gradient in found.items():
        total[name] = total[name] + gradient if name in total else gradient


def _softmax_tangent(shares: Tensor, moved: Tensor) -> Tensor:
    """How softmax's result `shares` (B, K) moves with its argument: shares * (moved - sum(shares * moved)), the same as
    its backward pass, since its Jacobian is symmetric."""
    return torch.ops.aten._softmax_backward_data(moved, shares, 1, shares.dtype)
