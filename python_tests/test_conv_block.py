"""The first layer in one operation, against torch's convolution and layers, differentiated by torch.func in float64."""

import os
import subprocess
import sys

import pytest
import reference
import test_block
import torch
from torch.func import jvp
from torch.nn import functional as F

from selmatch_ext.ops import block as blocks
from selmatch_ext.ops import conv_block as ops
from selmatch_ext.ops.block import DualTensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}
# (batch, channels, outputs, height, width): an image in one piece, and in several, the last of them smaller
SHAPES = [(3, 1, 32, 5, 7), (2, 3, 64, 13, 20), (2, 4, 96, 9, 16)]
OPERATORS = torch.ops.selmatch_ext


class Case:
    def __init__(self, norm, activation, pool, shape, dtype):
        batch, channels, outputs, *sides = shape
        self.block = test_block.Case(norm, activation, pool, (batch, outputs, *sides), dtype)
        draw, self.dtype, self.kind = torch.Generator().manual_seed(2), dtype, self.block.kind
        self.x, self.weight, self.weight_t, self.bias = (
            torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)
            for size in ((batch, channels, *sides), (outputs, channels, 3, 3), (outputs, channels, 3, 3), (outputs,))
        )
        self.weights = self.weight, self.weight_t
        self.affines = self.block.given(self.block.parameters), self.block.given(self.block.parameters_t)

    def passes(self):
        """What the four passes give, without statistics."""
        g = DualTensor(self.block.g, self.block.gt)
        y, z, stats = ops.conv_block(self.x, self.weight, self.bias, self.affines[0], self.kind)
        back = ops.conv_block_backward(self.block.g, (self.x, z, stats), self.affines[0], self.kind)
        y_both, z_both, stats = ops.conv_block_dual_forward(self.x, self.weights, self.affines, self.kind)
        saved = self.x, DualTensor(*z_both.chunk(2)), stats
        rest = self.weights, self.affines, self.kind
        dual = ops.conv_block_dual_backward(g, saved, *rest, weight_wanted=True)
        less = ops.conv_block_dual_backward(g, saved, *rest, weight_wanted=False)
        assert less[1].shape == (0,) and all(torch.equal(less[i], dual[i]) for i in (0, 2, 3))
        return (y, z), back, (y_both, z_both), dual

    def expected(self):
        """The same in float64."""
        x, bias = self.x.double(), self.bias.double()
        values = [t.double() for t in (self.weight, *self.block.parameters, self.block.g)]
        tangents = [t.double() for t in (self.weight_t, *self.block.parameters_t, self.block.gt)]

        def forward(weight, gamma, beta, bias=None):
            z = F.conv2d(x, weight, bias, padding=1)
            return reference.block(z, gamma, beta, self.kind), z

        def backward(weight, gamma, beta, g, bias=None):
            z = F.conv2d(x, weight, bias, padding=1)
            gz, *found = reference.block_gradients(z, gamma, beta, g, self.kind)
            return (
                F.conv_transpose2d(gz, weight, padding=1),
                torch.nn.grad.conv2d_weight(x, weight.shape, gz, padding=1),
                *found,
            )

        (y, z), (y_t, z_t) = jvp(forward, tuple(values[:3]), tuple(tangents[:3]))
        dual = jvp(backward, tuple(values), tuple(tangents))[1]
        return forward(*values[:3], bias), backward(*values, bias)[1:], (torch.cat((y, y_t)), torch.cat((z, z_t))), dual

    def check(self):
        for found, expected in zip(self.passes(), self.expected(), strict=True):
            for a, b in zip(found, expected, strict=True):
                if not self.block.affine and a.shape == (0,):
                    continue  # without a norm gamma and beta get no gradients
                assert a.dtype == self.dtype and a.shape == b.shape
                error = (a.double() - b).abs().max() / b.abs().max()
                assert error <= TOLERANCE[self.dtype], f"{error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", test_block.NORMS)
def test_all_four_passes(norm, shape, dtype):
    for activation, pool in [("relu", "average"), ("swish", "max"), ("leaky", "none")]:
        Case(norm, activation, pool, shape, dtype).check()


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_vector_instructions(level):
    here = os.path.dirname(__file__)
    code = f"""
import sys; sys.path.insert(0, {here!r})
import torch, test_conv_block
for dtype in test_conv_block.TOLERANCE:
    for norm in test_conv_block.test_block.NORMS:
        test_conv_block.Case(norm, "swish", "average", (2, 3, 64, 13, 20), dtype).check()
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "SELMATCH_CPU": level}, check=True)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_same_bits_for_any_number_of_threads(norm):
    case = Case(norm, "relu", "average", (9, 3, 64, 26, 20), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append([t for found in case.passes() for t in found])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_differentiable_once(norm):
    case = Case(norm, "swish", "average", (2, 2, 32, 3, 4), torch.float64)
    inputs = [t.requires_grad_() for t in (case.weight, *(case.block.parameters if case.block.affine else ()))]

    def function(weight, gamma=None, beta=None):
        return ops.conv_block(case.x, weight, None, (gamma, beta), case.kind)[0]

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    gradient = torch.autograd.grad(function(*inputs).sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
    case.x.requires_grad_()
    with pytest.raises(RuntimeError, match="x, the images, gets no gradient"):
        function(*inputs).sum().backward()


def test_only_a_bias_that_the_norm_cancels_gets_a_gradient():
    for norm in ("none", "group", "layer"):
        case = Case(norm, "relu", "average", (2, 3, 32, 4, 4), torch.float64)
        y = ops.conv_block(case.x, case.weight, case.bias.requires_grad_(), case.affines[0], case.kind)[0]
        with pytest.raises(RuntimeError, match="bias gets a gradient only before batch norm or instance norm"):
            y.sum().backward()
    case = Case("batch", "relu", "average", (2, 3, 32, 4, 4), torch.float64)
    bias = case.bias.requires_grad_()
    ops.conv_block(case.x, case.weight.requires_grad_(), bias, case.affines[0], case.kind)[0].square().sum().backward()
    assert torch.equal(bias.grad, torch.zeros(32, dtype=torch.float64)) and case.weight.grad.abs().max() > 0


def test_operators_are_registered_completely():
    case = Case("instance", "relu", "max", (2, 3, 32, 4, 5), torch.float32)
    affine, both = case.affines[0], (*case.affines[0], *case.affines[1])
    check = torch.library.opcheck
    check(OPERATORS.conv_block_forward.default, (case.x, case.weight, case.bias, *affine, *case.kind))
    _, z, stats = ops.conv_block(case.x, case.weight, None, affine, case.kind)
    check(OPERATORS.conv_block_backward.default, (case.block.g, case.x, z, stats, *affine, *case.kind))
    check(OPERATORS.conv_block_dual_forward.default, (case.x, *case.weights, *both, *case.kind))
    _, z_both, stats = ops.conv_block_dual_forward(case.x, case.weights, case.affines, case.kind)
    for wanted in (True, False):
        inside = (case.block.g, case.block.gt, case.x, *case.weights, *z_both.chunk(2), stats)
        check(OPERATORS.conv_block_dual_backward.default, (*inside, *both, wanted, *case.kind))


def test_empty_batch_and_bad_input():
    case = Case("batch", "relu", "average", (2, 3, 32, 4, 4), torch.float32)
    x, g, affine = case.x, case.block.g, case.affines[0]
    y, z, stats = ops.conv_block(x[:0], case.weight, None, affine, case.kind)
    assert y.shape == (0, 32, 2, 2) and z.shape == (0, 32, 4, 4)
    found = ops.conv_block_backward(g[:0], (x[:0], z, stats), affine, case.kind)
    assert found[0].shape == (32, 3, 3, 3) and all((t == 0).all() for t in found)

    for sides in ((0, 5), (5, 0)):
        kind = case.kind._replace(pool=blocks.NO_POOL)
        flat, none = torch.zeros(2, 3, *sides), torch.zeros(2, 32, *sides)
        _, z, stats = ops.conv_block(flat, case.weight, None, affine, kind)
        assert all((t == 0).all() for t in ops.conv_block_backward(none, (flat, z, stats), affine, kind))
        _, z_both, stats = ops.conv_block_dual_forward(flat, case.weights, case.affines, kind)
        saved = flat, DualTensor(*z_both.chunk(2)), stats
        rest = case.weights, case.affines, kind
        dual = ops.conv_block_dual_backward(DualTensor(none, none), saved, *rest, weight_wanted=True)
        assert dual[0].shape == flat.shape and all((t == 0).all() for t in dual[1:])

    _, z, stats = ops.conv_block(x, case.weight, None, affine, case.kind)
    wide = torch.zeros(2, 32, 4, 4)
    for error, message, image, result in [
        (ValueError, "x must have 1 to 4 channels, got 32", wide, z),
        (ValueError, "multiples of 32 up to 2.20 .of the input also 1 to 4., got 3 and 31", x, z[:, :31]),
        (ValueError, r"x must have shape \[2, 3, 4, 4\]", x[:1], z),
        (TypeError, "x must be float32, got float64", x.double(), z),
    ]:
        with pytest.raises(error, match=message):
            ops.conv_block_backward(g, (image, result, stats), affine, case.kind)
    with pytest.raises(ValueError, match="1 to 4 channels"):
        ops.conv_block(wide, torch.zeros(32, 32, 3, 3), None, affine, case.kind)
    dual = DualTensor(g, g)
    stats = blocks.block_dual_forward(DualTensor(case.block.z, case.block.zt), *case.affines, case.kind)[1]
    with pytest.raises(ValueError, match=r"weight_t must have shape \[32, 3, 3, 3\]"):
        saved, weights = (case.x, DualTensor(case.block.z, case.block.zt), stats), (case.weight, case.weight[:1])
        ops.conv_block_dual_backward(dual, saved, weights, case.affines, case.kind, weight_wanted=True)
