"""What the registered operators should give, by plain PyTorch in float64: for odd_arguments.py."""

from types import SimpleNamespace

import reference
import torch
from torch.func import jvp
from torch.nn import functional as F

import selmatch_ext  # noqa: F401  (registers the operators)
from selmatch_ext.ops.block import BlockKind
from selmatch_ext.ops.gradient_distance import METRICS

OPS = torch.ops.selmatch_ext


def double(value):
    if isinstance(value, list):
        return [double(v) for v in value]
    return (
        value.detach().double().clone(memory_format=torch.contiguous_format)
        if isinstance(value, torch.Tensor)
        else value
    )


def expected(name, args):
    """The results of an operator in float64, None for those that are not compared."""
    return globals()[f"expected_{name}"](*double(args))


def saved_by(name, args):
    """What the forward pass saves for a backward pass with these arguments, each beside what the backward pass was
    given in its place; nothing for an operator that is given nothing of the kind."""
    if name == "gradient_distance_backward":
        return [(OPS.gradient_distance(args[2], args[3], args[4])[1], args[1])]
    if name == "block_backward":
        return [(OPS.block_forward(args[1], *args[3:])[1], args[2])]
    if name == "block_dual_backward":
        return [(OPS.block_dual_forward(*args[3:6], *args[7:])[1], args[6])]
    if name == "conv_block_backward":
        return list(zip(OPS.conv_block_forward(*args[1:3], None, *args[5:])[1:3], args[3:5], strict=True))
    if name == "conv_block_dual_backward":
        made = OPS.conv_block_forward(*args[2:4], None, *args[7:9], *args[12:])
        return list(zip(made[1:3], args[5:7], strict=True))
    return []


@torch.no_grad()
def can_be_compared(name, args):
    """Whether a backward pass was given what the forward pass saves for it: plain PyTorch takes nothing else. What
    differs by more than the rounding of another order of summation was made with other arguments, such as another
    eps."""
    return all(_are_near(made, given) for made, given in saved_by(name, args))


def _are_near(made, given):
    if given.shape != made.shape or not made.is_floating_point():
        return torch.equal(given, made)
    near = 64 * torch.finfo(made.dtype).eps
    size = max(float(made[made.isfinite()].abs().max()), 1e-30) if made.isfinite().any() else 1.0
    return torch.allclose(given, made, near, near * size, equal_nan=True)


def expected_dsa(x, ops, params, mode):
    if not (params.abs() < 1e6).all():  # then the image is what it is, in memory of its own
        return [None]
    table = SimpleNamespace(ops=ops.to(torch.uint8), params=params)
    if x.numel() == 0:
        return [x]

    def linear(x):
        return reference.augment(x, table) - reference.augment(torch.zeros_like(x), table)

    if mode == 0:
        return [reference.augment(x, table)]
    return [linear(x) if mode == 1 else torch.func.vjp(linear, torch.zeros_like(x))[1](x)[0]]


def expected_trajectory_distance(student, start, target):
    squares = [sum(((a - b) ** 2).sum() for a, b in zip(x, target, strict=True)) for x in (student, start)]
    return [squares[0] / squares[1], torch.stack(squares)]


def expected_trajectory_distance_backward(grad, sums, student, start, target, *wanted):
    of_student = [2 * grad / sums[1] * (a - b) for a, b in zip(student, target, strict=True)]
    of_start = [-2 * grad * sums[0] / sums[1] ** 2 * (a - b) for a, b in zip(start, target, strict=True)]
    of_target = [-a - b for a, b in zip(of_student, of_start, strict=True)]
    return [t for w, ts in zip(wanted, (of_student, of_start, of_target), strict=True) if w for t in ts]


def expected_gradient_distance(syn, real, metric):
    return [torch.as_tensor(reference.gradient_distance(syn, real, METRICS[metric])), None]


def expected_gradient_distance_backward(grad, sums, syn, real, metric, *wanted):
    leaves = [[t.clone().requires_grad_() for t in ts] for ts in (syn, real)]
    value = reference.gradient_distance(*leaves, METRICS[metric])
    if not (isinstance(value, torch.Tensor) and value.requires_grad):
        return [torch.zeros_like(t) for w, ts in zip(wanted, leaves, strict=True) if w for t in ts]
    found = torch.autograd.grad(value, [*leaves[0], *leaves[1]], grad, materialize_grads=True)
    halves = found[: len(syn)], found[len(syn) :]
    return [t for w, ts in zip(wanted, halves, strict=True) if w for t in ts]


def expected_conv3x3(x, weight, bias, transposed):
    if 0 in x.shape[2:]:
        return [x.new_empty((x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:]))]
    return [(F.conv_transpose2d if transposed else F.conv2d)(x, weight, bias, padding=1)]


def expected_conv3x3_dual(x, x_t, weight, weight_t, bias, bias_t, transposed, value):
    (y,) = expected_conv3x3(x, weight, bias, transposed)
    (y_t,) = expected_conv3x3(x, weight_t, bias_t, transposed)
    if x_t is not None:
        y_t = y_t + expected_conv3x3(x_t, weight, None, transposed)[0]
    if not value:
        return [y_t]
    return [torch.cat((y_t, y) if transposed else (y, y_t))]


def expected_conv3x3_weight_gradient(x, g):
    shape = (g.shape[1], x.shape[1], 3, 3)
    return [torch.nn.grad.conv2d_weight(x, shape, g, padding=1) if x.numel() else x.new_zeros(shape)]


def affine_of(z, norm, *parameters):
    fallback = (z.new_ones(z.shape[1]), z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1]))
    if parameters[0] is not None and parameters[0].dim() == 3:
        fallback = [f.view(-1, 1, 1).expand(z.shape[1:]).clone() for f in fallback]
    return [f if p is None else p for p, f in zip(parameters, fallback, strict=False)]


def expected_block_forward(z, gamma, beta, *kind):
    return [reference.block(z, *affine_of(z, kind[0], gamma, beta), BlockKind(*kind)), None]


def expected_block_backward(g, z, stats, gamma, beta, *kind):
    found = reference.block_gradients(z, *affine_of(z, kind[0], gamma, beta), g, BlockKind(*kind))
    return [found[0], *(found[1:] if kind[0] else (None, None))]


def expected_block_dual_forward(z, zt, zt_more, gamma, beta, gamma_t, beta_t, *kind):
    gamma, beta, gamma_t, beta_t = affine_of(z, kind[0], gamma, beta, gamma_t, beta_t)
    tangents = (zt if zt_more is None else zt + zt_more, gamma_t, beta_t)
    return [torch.cat(jvp(lambda *i: reference.block(*i, BlockKind(*kind)), (z, gamma, beta), tangents)), None]


def expected_block_dual_backward(g, gt, gt_more, z, zt, zt_more, stats, gamma, beta, gamma_t, beta_t, *kind):
    gamma, beta, gamma_t, beta_t = affine_of(z, kind[0], gamma, beta, gamma_t, beta_t)
    tangents = (zt if zt_more is None else zt + zt_more, gamma_t, beta_t, gt if gt_more is None else gt + gt_more)
    found, moved = jvp(lambda *i: reference.block_gradients(*i, BlockKind(*kind)), (z, gamma, beta, g), tangents)
    return [torch.cat([moved[0], found[0]]), *(moved[1:] if kind[0] else (None, None))]


def expected_conv_block_forward(x, weight, bias, gamma, beta, *kind):
    (z,) = expected_conv3x3(x, weight, bias, False)
    return [expected_block_forward(z, gamma, beta, *kind)[0], None, None, None]


def expected_conv_block_backward(g, x, weight, bits, moments, gamma, beta, *kind):
    (z,) = expected_conv3x3(x, weight, None, False)
    gz, *gradients = expected_block_backward(g, z, None, gamma, beta, *kind)
    return [*expected_conv3x3_weight_gradient(x, gz), *gradients]


def expected_conv_block_dual_forward(x, weight, weight_t, gamma, beta, gamma_t, beta_t, *kind):
    (both,) = expected_conv3x3_dual(x, None, weight, weight_t, None, None, False, True)
    moved = expected_block_dual_forward(*both.chunk(2), None, gamma, beta, gamma_t, beta_t, *kind)
    return [moved[0], None, None]


def expected_conv_block_dual_backward(g, gt, x, weight, weight_t, bits, moments, *rest):
    *affine, x_wanted = rest[:5]
    (z_both,) = expected_conv3x3_dual(x, None, weight, weight_t, None, None, False, True)
    both, *gradients = expected_block_dual_backward(g, gt, None, *z_both.chunk(2), None, None, *affine, *rest[5:])
    gzt, gz = both.chunk(2)
    of_x = expected_conv3x3_dual(gz, gzt, weight, weight_t, None, None, True, False)[0] if x_wanted else x.new_empty(0)
    return [*expected_conv3x3_weight_gradient(x, gzt), *gradients, of_x]
