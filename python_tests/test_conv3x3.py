"""3 x 3 convolutions by Winograd's filtering against torch's direct ones."""

import itertools
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from selmatch_ext.allocator import reused_memory
from selmatch_ext.ops.conv3x3 import (
    conv3x3,
    conv3x3_dual,
    conv3x3_input_gradient,
    conv3x3_suits,
    conv3x3_weight_gradient,
)

# (batch, channels, outputs, height, width): part of a tile at the edges, one row, more tiles than are done together
SHAPES = [(1, 32, 32, 4, 4), (3, 32, 64, 5, 7), (5, 64, 32, 1, 3), (2, 32, 96, 8, 8), (9, 32, 32, 9, 16)]
# the gradient of the weights in shares, of tiles of 4 x 4 and, with less than 1152 pixels, of 2 x 2
SHAPES += [(20, 32, 96, 16, 15), (20, 32, 64, 16, 15), (16, 32, 64, 8, 8)]
# 128 channels: tiles of 4 x 4, few of them or more than outputs; maps that are too small for them; 128 outputs
SHAPES += [(2, 128, 32, 5, 7), (9, 128, 64, 16, 15), (3, 160, 32, 2, 3), (4, 32, 128, 6, 10)]
# few channels: 35 pixels are no multiple of what is done together, 144 are more than that; one pixel; one column
SHAPES += [(3, 3, 64, 5, 7), (9, 4, 32, 9, 16), (2, 1, 32, 3, 1), (20, 2, 96, 8, 8), (1, 1, 32, 1, 1)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}


def tensors(batch, channels, outputs, height, width, dtype):
    draw = torch.Generator().manual_seed(0)
    sizes = [(batch, channels, height, width), (outputs, channels, 3, 3), (outputs,), (batch, outputs, height, width)]
    return [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


def check(shape, dtype):
    x, weight, bias, g = tensors(*shape, dtype)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*inputs, padding=1)
    gx, gw, gb = torch.autograd.grad(y, inputs, g.double())
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    result = conv3x3(*ours)
    for a, b in [
        (result, y),
        (conv3x3_input_gradient(g, weight), gx),
        (conv3x3_weight_gradient(x, g), gw),
        *zip(torch.autograd.grad(result, ours, g), (gx, gw, gb), strict=True),
    ]:
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_direct_convolution(shape, dtype):
    check(shape, dtype)


def direct_sum(terms):
    """One product after the other, rounded each time. terms: pairs of tensors, the products of which have one shape."""
    total = torch.zeros(())
    for a, b in terms:
        total = total + a * b
    return total


def direct_convolution(x, weight):
    height, width = x.shape[2:]
    padded, place = F.pad(x, (1, 1, 1, 1)), itertools.product(range(x.shape[1]), range(3), range(3))
    return direct_sum(
        (padded[:, c, None, i : i + height, j : j + width], weight[:, c, i, j, None, None]) for c, i, j in place
    )


def direct_weight_gradient(x, g):
    columns, rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1), g.flatten(2).transpose(1, 2).flatten(0, 1)
    return direct_sum((row[:, None], column) for row, column in zip(rows, columns, strict=True))


@pytest.mark.parametrize("channels, batch", [(32, 1), (64, 1), (128, 8), (256, 8)])
def test_error_is_that_of_the_direct_sum(channels, batch):
    """Of short sums, by tiles of 2 x 2, and of long ones, by tiles of 4 x 4: over channels, and over pixels, of which
    an image has 256. (How much torch's convolutions round depends on the processor.)"""
    x, weight, _, g = tensors(batch, channels, channels, 16, 16, torch.float32)
    inputs = [t.double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*inputs, padding=1)
    exact = [y.detach(), *torch.autograd.grad(y, inputs, g.double())]
    back = weight.transpose(0, 1).flip(2, 3)
    direct = direct_convolution(x, weight), direct_convolution(g, back), direct_weight_gradient(x, g).view_as(weight)
    ours = conv3x3(x, weight), conv3x3_input_gradient(g, weight), conv3x3_weight_gradient(x, g)
    for a, b, c in zip(ours, direct, exact, strict=True):
        assert (a - c).norm() <= 1.1 * (b - c).norm()


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("moved", [True, False], ids=["x_t", ""])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dual_equals_the_derivative_of_the_direct_convolution(shape, moved, value):
    check_dual(shape, moved, value)


def check_dual(shape, moved, value):
    x, weight, bias, g = tensors(*shape, torch.float64)
    x_t, weight_t, bias_t, g_t = (t.flip(-1).sin() for t in (x, weight, bias, g))
    x_t, g_t = (t if moved else torch.zeros_like(t) for t in (x_t, g_t))

    def back(g, weight):
        return F.conv_transpose2d(g, weight, padding=1)

    y, y_t = torch.func.jvp(partial(F.conv2d, padding=1), (x, weight, bias), (x_t, weight_t, bias_t))
    b, b_t = torch.func.jvp(back, (g, weight), (g_t, weight_t))
    x_t, g_t = (t if moved else None for t in (x_t, g_t))
    results = [
        (conv3x3_dual(x, x_t, weight, weight_t, (bias, bias_t), value=value), (y, y_t) if value else (y_t,)),
        (conv3x3_dual(g, g_t, weight, weight_t, transposed=True, value=value), (b_t, b) if value else (b_t,)),
    ]
    for found, expected in results:
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - torch.cat(expected)).norm() <= 1e-13 * torch.cat(expected).norm()


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_vector_instructions(level):
    here = os.path.dirname(__file__)
    code = f"""
import sys; sys.path.insert(0, {here!r})
import torch, test_conv3x3
test_conv3x3.check_dual((9, 128, 64, 16, 15), True, True)
test_conv3x3.check_dual((3, 32, 64, 5, 7), True, True)
test_conv3x3.check_dual((3, 3, 64, 5, 7), True, True)
for dtype in test_conv3x3.TOLERANCE:
    test_conv3x3.check((3, 32, 64, 5, 7), dtype)
    test_conv3x3.check((20, 32, 64, 16, 15), dtype)
    test_conv3x3.check((9, 128, 64, 16, 15), dtype)
    test_conv3x3.check((3, 3, 64, 5, 7), dtype)
    test_conv3x3.check((20, 1, 32, 9, 8), dtype)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "SELMATCH_CPU": level}, check=True)


@pytest.mark.parametrize("channels", [3, 32, 128])
def test_the_same_bits_for_any_number_of_threads(channels):
    x, weight, bias, g = tensors(20, channels, 64, 16, 15, torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        dual = conv3x3_dual(x, x.flip(0), weight, weight.flip(1), (bias, None))
        back = conv3x3_dual(g, g.flip(0), weight, weight.flip(1), transposed=True)
        of_weight, of_input = conv3x3_weight_gradient(x, g), conv3x3_input_gradient(g, weight)
        results.append((conv3x3(x, weight, bias), dual, back, of_weight, of_input))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("channels", [3, 32])
def test_operators_are_registered_completely(channels):
    x, weight, bias, g = tensors(2, channels, 32, 5, 4, torch.float64)
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), False)
    torch.library.opcheck(torch.ops.selmatch_ext.conv3x3.default, arguments)
    torch.library.opcheck(torch.ops.selmatch_ext.conv3x3.default, (g.requires_grad_(), weight, None, True))
    torch.library.opcheck(torch.ops.selmatch_ext.conv3x3_weight_gradient.default, (x, g.requires_grad_()))
    x, weight, bias, g = (t.detach() for t in (x, weight, bias, g))
    with reused_memory():
        torch.library.opcheck(torch.ops.selmatch_ext.conv3x3.default, (x, weight, bias, False))
    for value in (True, False):
        torch.library.opcheck(
            torch.ops.selmatch_ext.conv3x3_dual.default, (x, x, weight, weight, bias, None, False, value)
        )
        torch.library.opcheck(
            torch.ops.selmatch_ext.conv3x3_dual.default, (g, None, weight, weight, None, None, True, value)
        )


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("needed", ["xw", "x", "w"])
def test_second_derivatives(needed, channels):
    x, weight, bias, g = tensors(2, channels, 32, 3, 4, torch.float64)
    inputs = (x.requires_grad_("x" in needed), weight.requires_grad_("w" in needed), bias.requires_grad_())
    gradgradcheck = torch.autograd.gradgradcheck
    assert gradgradcheck(conv3x3, inputs, fast_mode=True)
    g.requires_grad_("x" in needed)
    assert gradgradcheck(conv3x3_input_gradient, (g, weight), fast_mode=True)
    for function in (torch.autograd.gradcheck, gradgradcheck):
        x.requires_grad_("w" in needed)
        assert function(conv3x3_weight_gradient, (x, g), fast_mode=True)


@pytest.mark.parametrize("channels", [3, 32])
def test_second_derivatives_equal_those_of_the_direct_convolution(channels):
    x, weight, bias, g = tensors(3, channels, 64, 5, 7, torch.float64)
    results = []
    for convolve in (conv3x3, lambda *inputs: F.conv2d(*inputs, padding=1)):
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = convolve(*inputs)
        first = torch.autograd.grad((y * y.tanh() * g).sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(d.sin().sum() for d in first), inputs))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_a_tangent_does_not_see_the_bias():
    for channels in (3, 32, 128):
        x, weight, bias, _ = tensors(2, channels, 64, 5, 7, torch.float64)
        bias.fill_(torch.inf)
        assert conv3x3_dual(x, x, weight, weight, (bias, None), value=False).isfinite().all()


def test_what_suits():
    _, weight, _, _ = tensors(1, 32, 64, 4, 4, torch.float32)
    assert conv3x3_suits(weight)
    assert not conv3x3_suits(weight.double())
    assert not conv3x3_suits(weight[..., :2])
    assert conv3x3_suits(weight[:, :3]) and not conv3x3_suits(weight[:, :5]) and not conv3x3_suits(weight[:3])


def test_bad_input_and_empty_batch():
    x, weight, bias, g = tensors(2, 32, 64, 4, 4, torch.float32)
    assert conv3x3(x[:0], weight, bias).shape == (0, 64, 4, 4)
    assert (conv3x3_weight_gradient(x[:0], g[:0]) == 0).all()
    assert (conv3x3_weight_gradient(x[:0, :3], g[:0]) == 0).all()
    assert conv3x3_input_gradient(g[:0], weight[:, :3]).shape == (0, 3, 4, 4)
    for error, message, arguments in [
        (
            ValueError,
            "multiples of 32 up to 2.20 .of the input also 1 to 4., got 16",
            (x[:, :16], weight[:, :16], bias),
        ),
        (ValueError, r"weight must have shape \[64, 32, 3, 3\]", (x, weight[:, :, :2], bias)),
        (ValueError, r"bias must have shape \[64\]", (x, weight, bias[:3])),
        (TypeError, "weight must be float32, got float64", (x, weight.double(), bias)),
        (TypeError, "x must be float32 or float64", (x.bfloat16(), weight.bfloat16(), None)),
        (ValueError, "x must have shape .batch, channels", (x[0], weight, bias)),
    ]:
        with pytest.raises(error, match=message):
            conv3x3(*arguments)
    with pytest.raises(ValueError, match="g must have shape"):
        conv3x3_weight_gradient(x, g[:1])
    assert conv3x3_dual(x[:0], None, weight, weight).shape == (0, 64, 4, 4)
    for error, message, arguments in [
        (ValueError, r"x_t must have shape \[2, 32, 4, 4\]", (x, x[:1], weight, weight)),
        (ValueError, r"weight_t must have shape \[64, 32, 3, 3\]", (x, x, weight, weight[:32])),
        (TypeError, "weight_t must be float32", (x, x, weight, weight.double())),
        (ValueError, r"bias_t must have shape \[64\]", (x, x, weight, weight, (None, bias[:3]))),
    ]:
        with pytest.raises(error, match=message):
            conv3x3_dual(*arguments)
