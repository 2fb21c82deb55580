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

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
# (batch, channels, outputs, height, width): images in one piece of 32 pixels, and in several, the last of them smaller
SHAPES = [(3, 1, 32, 5, 7), (2, 3, 64, 13, 20), (2, 4, 96, 9, 16)]
NORMS = [norm for norm in test_block.NORMS if norm != "layer"]  # whose gamma is of pixels
KINDS = [("relu", "average"), ("relu", "max"), ("leaky", "none"), ("leaky", "average")]
OPERATORS = torch.ops.selmatch_ext


class Case:
    """Random tensors for one kind of layer, none of which bends where rounding could make it bend elsewhere."""

    def __init__(self, norm, activation, pool, shape, dtype):
        batch, channels, outputs, *sides = shape
        self.block = test_block.Case(norm, activation, pool, (batch, outputs, *sides), dtype)
        draw, self.dtype, self.kind = torch.Generator().manual_seed(2), dtype, self.block.kind
        self.affines = self.block.given(self.block.parameters), self.block.given(self.block.parameters_t)
        self.distance = 0.0
        while self.distance < 1e-5:
            self.x, self.weight, self.weight_t, self.bias = (
                torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)
                for size in (
                    (batch, channels, *sides),
                    (outputs, channels, 3, 3),
                    (outputs, channels, 3, 3),
                    (outputs,),
                )
            )
            self.distance = self.find_distance()
        self.weights = self.weight, self.weight_t
        if norm not in ("batch", "instance"):
            self.bias = None  # no norm that would cancel it

    def find_distance(self):
        """How far what goes into the rectifier is from 0, and with maximum pooling the two largest from each other."""
        z = F.conv2d(self.x.double(), self.weight.double(), padding=1)
        linear = self.kind._replace(slope=1.0, pool=blocks.NO_POOL)
        n = reference.block(z, *(p.double() for p in self.block.parameters), linear)
        if self.kind.pool != blocks.MAX_POOL:
            return n.abs().min()
        windows = n[..., : n.shape[2] // 2 * 2, : n.shape[3] // 2 * 2].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        largest, second = windows.topk(2, dim=-1).values.unbind(-1)
        return torch.minimum(largest.abs(), torch.where(largest > 0, largest - second, 1.0)).min()

    def passes(self):
        """What the four passes give, without what they save."""
        (affine, _), g = self.affines, (self.block.g, self.block.gt)
        y, saved = ops.conv_block(self.x, self.weight, self.bias, affine, self.kind)
        back = ops.conv_block_backward(self.block.g, self.x, self.weight, saved, affine, self.kind)
        y_both, saved = ops.conv_block_dual_forward(self.x, self.weights, self.affines, self.kind)
        arguments = g, self.x, self.weights, saved, self.affines, self.kind
        dual = ops.conv_block_dual_backward(*arguments)
        less = ops.conv_block_dual_backward(*arguments, x_wanted=False)
        assert less[3].shape == (0,) and all(torch.equal(a, b) for a, b in zip(less[:3], dual[:3], strict=True))
        return (y,), back, (y_both,), dual

    def expected(self):
        """The same in float64."""
        x, bias = self.x.double(), None if self.bias is None else self.bias.double()
        values = [t.double() for t in (self.weight, *self.block.parameters, self.block.g)]
        tangents = [t.double() for t in (self.weight_t, *self.block.parameters_t, self.block.gt)]

        def forward(weight, gamma, beta):
            return reference.block(F.conv2d(x, weight, bias, padding=1), gamma, beta, self.kind)

        def backward(weight, gamma, beta, g):
            z = F.conv2d(x, weight, padding=1)
            gz, *found = reference.block_gradients(z, gamma, beta, g, self.kind)
            of_weight = torch.nn.grad.conv2d_weight(x, weight.shape, gz, padding=1)
            return of_weight, *found, F.conv_transpose2d(gz, weight, padding=1)

        y, y_t = jvp(forward, tuple(values[:3]), tuple(tangents[:3]))
        back, dual = jvp(backward, tuple(values), tuple(tangents))
        return (y,), back[:3], (torch.cat((y, y_t)),), dual

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
@pytest.mark.parametrize("norm", NORMS)
def test_all_four_passes(norm, shape, dtype):
    for activation, pool in KINDS:
        Case(norm, activation, pool, shape, dtype).check()


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_more_images_than_shares_of_a_batch(norm):
    Case(norm, "relu", "average", (37, 3, 32, 6, 6), torch.float64).check()


@pytest.mark.parametrize("norm", NORMS)
def test_statistics(norm):
    case = Case(norm, "relu", "average", (3, 3, 32, 9, 6), torch.float64)
    stats = ops.conv_block(case.x, case.weight, case.bias, case.affines[0], case.kind)[1].stats
    z = F.conv2d(case.x, case.weight, case.bias, padding=1)
    expected = blocks.block_forward(z, *case.affines[0], case.kind)[1]
    torch.testing.assert_close(stats, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("mean, deviation", [(0, 1), (0.5, 0.25), (3, 0.1)], ids=str)
def test_the_weights_gradient_rounds_less_than_that_of_a_stored_z(norm, mean, deviation):
    """Also where it loses digits: images with a mean, and gradients with one, which the norm takes away."""
    case = Case(norm, "relu", "average", (2, 3, 32, 64, 64), torch.float32)
    case.x, g, affine = mean + deviation * case.x, 1 + 0.1 * case.block.g, case.affines[0]
    case.block.g = g
    y, saved = ops.conv_block(case.x, case.weight, None, affine, case.kind)
    found = ops.conv_block_backward(g, case.x, case.weight, saved, affine, case.kind)[0]
    z = F.conv2d(case.x, case.weight, padding=1)
    gz = blocks.block_backward(g, z, blocks.block_forward(z, *affine, case.kind)[1], *affine, case.kind)[0]
    stored = torch.nn.grad.conv2d_weight(case.x.double(), case.weight.shape, gz.double(), padding=1)
    case.bias = None
    (expected_y,), (expected, *_), *_ = case.expected()
    assert (y - expected_y).norm() < 1e-5 * expected_y.norm()
    assert (found - expected).norm() < 0.5 * (stored - expected).norm()


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_vector_instructions(level):
    here = os.path.dirname(__file__)
    code = f"""
import sys; sys.path.insert(0, {here!r})
import torch, test_conv_block
for dtype in test_conv_block.TOLERANCE:
    for norm in test_conv_block.NORMS:
        for kind in test_conv_block.KINDS:
            test_conv_block.Case(norm, *kind, (2, 3, 64, 13, 20), dtype).check()
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
    case = Case(norm, "leaky", "average", (2, 2, 32, 3, 4), torch.float64)
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


def test_only_a_bias_that_the_norm_cancels():
    for norm in ("none", "group"):
        case = Case(norm, "relu", "average", (2, 3, 32, 4, 4), torch.float64)
        with pytest.raises(ValueError, match="bias must be None where no norm subtracts it again"):
            ops.conv_block(case.x, case.weight, torch.ones(32, dtype=torch.float64), case.affines[0], case.kind)
    case = Case("batch", "relu", "average", (2, 3, 32, 4, 4), torch.float64)
    bias = case.bias.requires_grad_()
    ops.conv_block(case.x, case.weight.requires_grad_(), bias, case.affines[0], case.kind)[0].square().sum().backward()
    assert torch.equal(bias.grad, torch.zeros(32, dtype=torch.float64)) and case.weight.grad.abs().max() > 0


def test_operators_are_registered_completely():
    case = Case("instance", "relu", "max", (2, 3, 32, 4, 5), torch.float32)
    affine, both, g = case.affines[0], (*case.affines[0], *case.affines[1]), (case.block.g, case.block.gt)
    check = torch.library.opcheck
    check(OPERATORS.conv_block_forward.default, (case.x, case.weight, case.bias, *affine, *case.kind))
    _, saved = ops.conv_block(case.x, case.weight, None, affine, case.kind)
    check(OPERATORS.conv_block_backward.default, (g[0], case.x, case.weight, *saved[:2], *affine, *case.kind))
    check(OPERATORS.conv_block_dual_forward.default, (case.x, *case.weights, *both, *case.kind))
    for wanted in (True, False):
        inside = (*g, case.x, *case.weights, *saved[:2], *both, wanted, *case.kind)
        check(OPERATORS.conv_block_dual_backward.default, inside)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 5), (2, 3, 5, 0)], ids=str)
def test_empty_images(shape):
    case = Case("batch", "relu", "none", (2, 3, 32, 4, 4), torch.float32)
    x, none = torch.zeros(shape), torch.zeros(shape[0], 32, *shape[2:])
    y, saved = ops.conv_block(x, case.weight, None, case.affines[0], case.kind)
    assert y.shape == none.shape
    back = ops.conv_block_backward(none, x, case.weight, saved, case.affines[0], case.kind)
    y_both, saved = ops.conv_block_dual_forward(x, case.weights, case.affines, case.kind)
    assert y_both.shape == (2 * shape[0], *none.shape[1:])
    *dual, of_x = ops.conv_block_dual_backward((none, none), x, case.weights, saved, case.affines, case.kind)
    assert of_x.shape == x.shape
    assert all((t == 0).all() and t.numel() for t in (*back, *dual))


def test_bad_input():
    case = Case("batch", "relu", "average", (2, 3, 32, 4, 4), torch.float32)
    x, weight, g, affine, kind = case.x, case.weight, case.block.g, case.affines[0], case.kind
    with pytest.raises(ValueError, match="x must have 1 to 4 channels, got 32"):
        ops.conv_block(torch.zeros(2, 32, 4, 4), torch.zeros(32, 32, 3, 3), None, affine, kind)
    with pytest.raises(ValueError, match="multiples of 32 up to 2.20 .of the input also 1 to 4., got 3 and 31"):
        ops.conv_block(x, weight[:31], None, affine, kind)
    for change, message in [
        ({"activation": blocks.SWISH}, "activation must be 0, got 2"),
        ({"slope": 0.1, "pool": blocks.MAX_POOL}, "slope must be 0 with maximum pooling, got 0.1"),
    ]:
        assert not ops.conv_block_suits(affine, kind._replace(**change))
        with pytest.raises(ValueError, match=message):
            ops.conv_block(x, weight, None, affine, kind._replace(**change))
    layer = test_block.Case("layer", "relu", "average", (2, 32, 4, 4), torch.float32)
    assert ops.conv_block_suits(affine, kind) and not ops.conv_block_suits(layer.parameters, layer.kind)
    with pytest.raises(ValueError, match=r"gamma and beta must have shape \(channels\)"):
        ops.conv_block(x, weight, None, layer.parameters, layer.kind)

    saved = ops.conv_block(x, weight, None, affine, kind)[1]
    for error, message, arguments in [
        (TypeError, "x must be float32 or float64, got", (g, x.half(), weight, saved)),
        (TypeError, "bits must be Int, got float32", (g, x, weight, saved._replace(bits=saved.bits.float()))),
        (ValueError, r"bits must have shape \[2, 1, 32\]", (g, x, weight, saved._replace(bits=saved.bits[:1]))),
        (
            ValueError,
            r"moments must have shape \[1, 28, 28\]",
            (g, x, weight, saved._replace(moments=saved.moments[0])),
        ),
        (ValueError, r"g must have shape \[2, 32, 2, 2\]", (g[:1], x, weight, saved)),
    ]:
        with pytest.raises(error, match=message):
            ops.conv_block_backward(*arguments, affine, kind)
    with pytest.raises(ValueError, match=r"weight_t must have shape \[32, 3, 3, 3\]"):
        weights = case.weight, case.weight[:1]
        ops.conv_block_dual_backward((g, g), x, weights, saved, case.affines, kind)
