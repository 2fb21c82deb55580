"""The fused engine: one step's gradient, and its derivative along a direction, by the rules of rules.py.

No graph is kept and no second backward pass is made: the derivative of the gradient along a direction in parameter
space is one dual pass, forward and backward, whose parameter part is the Hessian-vector product and whose image part is
the mixed term (adjoint.py says what they are for)."""

import torch
from torch import Tensor

from selmatch_ext.ops.conv3x3 import FEW
from selmatch_ext.unroll.adjoint import Derivative, Plan, Wanted, check_logits
from selmatch_ext.unroll.private import PrivateModel
from selmatch_ext.unroll.program import Step
from selmatch_ext.unroll.rules import Add, Conv, Dual, Parameters


class FusedStepper:
    """A `Stepper` for a network that `program.read` has read; model is the copy that it was read from. A kept step is
    the results of its convolutions."""

    def __init__(self, model: PrivateModel, steps: list[Step], plan: Plan):
        self.model, self.steps, self.plan = model, steps, plan
        self.shapes = dict(zip(model.names, model.shapes, strict=True))
        self.convolutions = [step.rule for step in steps if isinstance(step.rule, Conv)]

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, wanted: Wanted | None, keep: bool):
        p = self._named(theta)
        values, saved = self._run(p, self._images(x))
        logits = values[-1].to(theta.dtype)
        check_logits(logits, x, y, self.plan.label_range)
        gradients = self._run_back(p, saved, _logits_gradient(logits, y))
        kept = [v if self._is_kept(step) else None for step, v in zip(self.steps, values, strict=True)]
        return self._flat(gradients, theta), kept if keep else None

    def derivative(self, theta: Tensor, x: Tensor, y: Tensor, kept, direction: Tensor, wanted: Wanted) -> Derivative:
        p, t = self._named(theta), self._named(direction)
        logits, saved = self._run_dual(p, t, self._images(x), kept or [None] * len(self.steps))
        logits = logits.map(lambda v: v.to(theta.dtype))
        g = _logits_gradient(logits.value, y)
        shares = logits.value.softmax(1)
        centred = logits.tangent - (shares * logits.tangent).sum(1, keepdim=True)
        of_labels = -centred / len(x)
        gt = shares * centred * (_weights(y) / len(x))
        gradients, u = {}, None
        if wanted.parameters or wanted.images:
            gradients, u = self._run_dual_back(p, t, saved, Dual(g, gt), wanted)
        return Derivative(
            (g * logits.tangent).sum(),
            self._flat(gradients, theta) if wanted.parameters else None,
            u.whole_tangent().to(theta.dtype) if wanted.images else None,
            of_labels if wanted.labels else None,
        )

    def freed(self, kept) -> None:
        return None

    def _is_kept(self, step: Step) -> bool:
        """The results of convolutions, but for those of a few channels, such as the images': they are quick to redo,
        and large (in a ConvNet three quarters of it all)."""
        return isinstance(step.rule, Conv) and self.shapes[step.rule.weight][1] > FEW

    def _named(self, vector: Tensor) -> Parameters:
        named = dict(zip(self.model.names, self.model.split(vector), strict=True))
        for rule in self.convolutions:
            weight = self._images(named[rule.weight])
            if not rule.by_conv3x3(weight):
                weight = weight.contiguous(memory_format=torch.channels_last)
            named[rule.weight] = weight
        return named

    def _flat(self, gradients: Parameters, like: Tensor) -> Tensor:
        """(P,); zeros where the loss does not reach a parameter."""
        shaped = zip(self.model.names, self.model.shapes, strict=True)
        parts = [gradients[n].reshape(-1) if n in gradients else like.new_zeros(s.numel()) for n, s in shaped]
        return torch.cat([part.to(like.dtype) for part in parts])

    def _images(self, x: Tensor) -> Tensor:
        """Images or weights in the dtype of the convolutions."""
        return x.bfloat16() if self.plan.precision == "bfloat16" else x

    def _run(self, p: Parameters, x: Tensor):
        """Every step's result, and what each needs for the way back."""
        values, saved = [], []
        for step in self.steps:
            inputs = [x if j < 0 else values[j] for j in step.inputs]
            if isinstance(step.rule, Add):
                value, keep = inputs[0] + inputs[1], None
            else:
                value, keep = step.rule.forward(p, inputs[0])
            values.append(value)
            saved.append(keep)
        return values, saved

    def _run_back(self, p: Parameters, saved: list, g: Tensor) -> Parameters:
        cotangents: list[Tensor | None] = [None] * len(self.steps)
        cotangents[-1] = g
        gradients: Parameters = {}
        for i in reversed(range(len(self.steps))):
            step, g = self.steps[i], cotangents[i]
            cotangents[i] = None
            back, found = g, {}
            if not isinstance(step.rule, Add):
                back, found = step.rule.backward(p, saved[i], g, max(step.inputs) >= 0)
            saved[i] = None
            _accumulate(gradients, found)
            for j in step.inputs:
                if j >= 0:
                    cotangents[j] = back if cotangents[j] is None else cotangents[j] + back
        return gradients

    def _run_dual(self, p: Parameters, t: Parameters, x: Tensor, kept: list) -> tuple[Dual, list]:
        values: list[Dual | None] = []
        saved = []
        waiting = [step.users for step in self.steps]
        for step, known in zip(self.steps, kept, strict=True):
            inputs = [Dual(x, None) if j < 0 else values[j] for j in step.inputs]
            if isinstance(step.rule, Add):
                value, keep = inputs[0] + inputs[1], None
            else:
                value, keep = step.rule.dual_forward(p, t, inputs[0], known)
            values.append(value)
            saved.append(keep)
            for j in step.inputs:
                if j >= 0:
                    waiting[j] -= 1
                    if waiting[j] == 0:
                        values[j] = None
        return values[-1], saved

    def _run_dual_back(self, p: Parameters, t: Parameters, saved: list, g: Dual, wanted: Wanted):
        """The tangents of the parameters' gradients, and the dual gradient of the images."""
        cotangents: list[Dual | None] = [None] * len(self.steps)
        cotangents[-1] = g
        gradients: Parameters = {}
        images = None
        for i in reversed(range(len(self.steps))):
            step, g = self.steps[i], cotangents[i]
            cotangents[i] = None
            back, found = g, {}
            if not isinstance(step.rule, Add):
                need_x = wanted.images or max(step.inputs) >= 0
                back, found = step.rule.dual_backward(p, t, saved[i], g, need_x, wanted.parameters)
            saved[i] = None
            _accumulate(gradients, found)
            for j in step.inputs:
                if j >= 0:
                    cotangents[j] = back if cotangents[j] is None else cotangents[j] + back
                elif wanted.images:
                    images = back if images is None else images + back
        return gradients, images


def _accumulate(total: Parameters, found: Parameters) -> None:
    for name, gradient in found.items():
        total[name] = total[name] + gradient if name in total else gradient


def _weights(y: Tensor) -> Tensor | float:
    """The sum of each image's labels: 1, or (B, 1) where they are given as probabilities."""
    return y.sum(1, keepdim=True) if y.is_floating_point() else 1.0


def _logits_gradient(logits: Tensor, y: Tensor) -> Tensor:
    """Of the mean cross-entropy."""
    g = logits.softmax(1) * _weights(y)
    if y.is_floating_point():
        g = g - y
    else:
        g[torch.arange(len(y), device=y.device), y] -= 1
    return g / len(y)
