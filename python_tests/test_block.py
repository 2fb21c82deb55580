"""The fused block and its dual passes against torch's own layers, differentiated by torch.func in float64."""

import itertools
import os
import subprocess
import sys

import pytest
import reference
import torch
from torch.func import jvp
from torch.nn import functional as F

import selmatch_ext.ops.block as ops
from selmatch_ext.ops.block import BlockKind

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2}
NORMS = {
    "none": (ops.NO_NORM, None),
    "instance": (ops.SAMPLE_NORM, "channels"),
    "group": (ops.SAMPLE_NORM, 2),
    "layer": (ops.SAMPLE_NORM, 1),
    "batch": (ops.BATCH_NORM, None),
}
ACTIVATIONS = {
    "relu": (ops.PIECEWISE, 0.0),
    "leaky": (ops.PIECEWISE, 0.01),
    "identity": (ops.PIECEWISE, 1.0),
    "sigmoid": (ops.SIGMOID, 0.0),
    "swish": (ops.SWISH, 0.0),
}
POOLS = {"none": ops.NO_POOL, "average": ops.AVERAGE_POOL, "max": ops.MAX_POOL}
SHAPES = [(3, 6, 5, 7), (2, 36, 4, 4)]  # odd sides and part of a vector; more than two vectors


class Case:
    """Random tensors for one kind of block: values, tangents in two parts, and cotangents of the result."""

    def __init__(self, norm, activation, pool, shape, dtype, device="cpu"):
        code, groups = NORMS[norm]
        groups = shape[1] if groups == "channels" else groups or 1
        self.kind = BlockKind(code, groups, 1e-5, *ACTIVATIONS[activation], POOLS[pool])
        self.affine = norm != "none"
        self.dtype = dtype
        draw = torch.Generator().manual_seed(1)

        def normal(size, to=dtype):
            return torch.randn(size, generator=draw, dtype=torch.float64).to(device, to)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        size = shape[1:] if norm == "layer" else shape[1:2]
        self.z, self.zt, self.zt_more = (normal(shape) for _ in range(3))
        self.parameters = [normal(size, wide) for _ in range(2)]
        self.parameters_t = [normal(size, wide) for _ in range(2)]
        if not self.affine:
            self.parameters = [torch.ones(size).to(self.z), torch.zeros(size).to(self.z)]
            self.parameters_t = [torch.zeros(size).to(self.z)] * 2
        pooled = reference.block(self.z.double(), *(p.double() for p in self.parameters), self.kind).shape
        self.g, self.gt, self.gt_more = (normal(pooled) for _ in range(3))

    @property
    def dual_z(self):
        return ops.DualTensor(self.z, self.zt, self.zt_more)

    @property
    def dual_g(self):
        return ops.DualTensor(self.g, self.gt, self.gt_more)

    def given(self, parameters):
        return parameters if self.affine else (None, None)

    def expected(self):
        """Everything in float64: (y, its tangent), (gradients), (their tangents)."""
        values = [t.double() for t in (self.z, *self.parameters, self.g)]
        tangents = [self.zt.double() + self.zt_more, *self.parameters_t, self.gt.double() + self.gt_more]
        tangents = [t.double() for t in tangents]
        y, yt = jvp(lambda *i: reference.block(*i, self.kind), tuple(values[:3]), tuple(tangents[:3]))
        back = jvp(lambda *i: reference.block_gradients(*i, self.kind), tuple(values), tuple(tangents))
        return (y, yt), *back

    def check(self, result, expected):
        assert result.dtype == (self.dtype if result.dim() == 4 else self.parameters[0].dtype)
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[self.dtype], f"{error:.1e}"

    def check_all(self):
        (y, yt), gradients, tangents = self.expected()
        batch = len(self.z)
        result, stats = ops.block_forward(self.z, *self.given(self.parameters), self.kind)
        self.check(result, y)
        found = ops.block_backward(self.g, self.z, stats, *self.given(self.parameters), self.kind)
        for a, b in list(zip(found, gradients, strict=True))[: 3 if self.affine else 1]:
            self.check(a, b)
        affine = (self.given(self.parameters), self.given(self.parameters_t), self.kind)
        both, stats = ops.block_dual_forward(self.dual_z, *affine)
        self.check(both[:batch], y)
        self.check(both[batch:], yt)
        both, *found = ops.block_dual_backward(self.dual_g, self.dual_z, stats, *affine)
        self.check(both[batch:], gradients[0])
        self.check(both[:batch], tangents[0])
        for a, b in list(zip(found, tangents[1:], strict=True))[: 2 if self.affine else 0]:
            self.check(a, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_all_four_passes(norm, dtype, device):
    for activation, pool, shape in itertools.product(ACTIVATIONS, POOLS, SHAPES):
        Case(norm, activation, pool, shape, dtype, device).check_all()


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_vector_instructions(level):
    here = os.path.dirname(__file__)
    code = f"""
import sys; sys.path.insert(0, {here!r})
import torch, test_block
for norm in test_block.NORMS:
    for dtype in test_block.TOLERANCE:
        test_block.Case(norm, "swish", "max", (2, 38, 5, 6), dtype).check_all()
        test_block.Case(norm, "relu", "average", (2, 38, 5, 6), dtype).check_all()
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "SELMATCH_CPU": level}, check=True)


def test_one_part_of_a_tangent_and_any_strides():
    case = Case("group", "swish", "average", (4, 6, 8, 8), torch.float64)
    affine = (case.parameters, case.parameters_t, case.kind)
    expected = ops.block_dual_forward(ops.DualTensor(case.z, case.zt + case.zt_more), *affine)[0]
    assert torch.allclose(ops.block_dual_forward(case.dual_z, *affine)[0], expected, atol=1e-13)
    strided = case.z.repeat_interleave(2, 3)[..., ::2].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(
        ops.block_forward(strided, *case.parameters, case.kind)[0],
        ops.block_forward(case.z, *case.parameters, case.kind)[0],
    )


def test_the_same_bits_for_any_number_of_threads():
    case = Case("batch", "relu", "average", (9, 32, 8, 8), torch.float32)
    affine = (case.parameters, case.parameters_t, case.kind)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        both, stats = ops.block_dual_forward(case.dual_z, *affine)
        results.append((both, *ops.block_dual_backward(case.dual_g, case.dual_z, stats, *affine)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_far_from_zero(norm):
    """A mean a thousand times the deviation: sums of squares must not cancel."""
    case = Case(norm, "leaky", "none", (3, 8, 6, 6), torch.float32)
    z = case.z + 1000
    expected = reference.block(z.double(), *(p.double() for p in case.parameters), case.kind)
    result = ops.block_forward(z, *case.given(case.parameters), case.kind)[0]
    assert (result - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("norm", NORMS)
def test_differentiable(norm):
    case = Case(norm, "swish", "average", (2, 4, 5, 4), torch.float64)
    inputs = [t.requires_grad_() for t in (case.z, *(case.parameters if case.affine else ()))]

    def function(z, gamma=None, beta=None):
        return ops.block(z, gamma, beta, case.kind)

    assert torch.autograd.gradcheck(function, inputs)


def test_operators_are_registered_completely():
    case = Case("layer", "relu", "max", (2, 4, 5, 4), torch.float32)
    affine = (*case.parameters, *case.parameters_t, *case.kind)
    checks = torch.library.opcheck
    checks(torch.ops.selmatch_ext.block_forward.default, (case.z.requires_grad_(), *case.parameters, *case.kind))
    case.z.requires_grad_(False)
    _, stats = ops.block_forward(case.z, *case.parameters, case.kind)
    arguments = (case.g, case.z, stats, *case.parameters, *case.kind)
    checks(torch.ops.selmatch_ext.block_backward.default, arguments)
    _, stats = ops.block_dual_forward(case.dual_z, case.parameters, case.parameters_t, case.kind)
    checks(torch.ops.selmatch_ext.block_dual_forward.default, (*case.dual_z, *affine))
    arguments = (*case.dual_g, *case.dual_z, stats, *affine)
    checks(torch.ops.selmatch_ext.block_dual_backward.default, arguments)


@pytest.mark.parametrize("size", [(0, 4, 6, 6), (2, 4, 0, 6), (2, 4, 6, 0), (2, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_empty_tensors(norm, size, device):
    by = 1 if 0 in size[2:] else 2  # torch pools no map without pixels, and neither does a block
    kind = BlockKind(NORMS[norm][0], 1, 1e-5, *ACTIVATIONS["relu"], ops.AVERAGE_POOL if by == 2 else ops.NO_POOL)
    z = torch.zeros(size, device=device)
    shape = size[1:] if norm == "layer" else size[1:2]
    affine = (None, None) if norm == "none" else (torch.ones(shape, device=device), torch.zeros(shape, device=device))
    y, stats = ops.block_forward(z, *affine, kind)
    assert y.shape == (*size[:2], size[2] // by, size[3] // by) and (stats == 0).all()
    gz, *gradients = ops.block_backward(y, z, stats, *affine, kind)
    assert gz.shape == z.shape and all((g == 0).all() for g in gradients)
    dual_z, dual_y = ops.DualTensor(z, z), ops.DualTensor(y, y)
    both, stats = ops.block_dual_forward(dual_z, affine, affine, kind)
    assert both.shape == (2 * len(y), *y.shape[1:]) and (stats == 0).all()
    both, *gradients = ops.block_dual_backward(dual_y, dual_z, stats, affine, affine, kind)
    assert both.shape == (2 * len(z), *size[1:]) and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("pool", [ops.AVERAGE_POOL, ops.MAX_POOL])
@pytest.mark.parametrize("sides", [(1, 2), (2, 1), (0, 4), (4, 0)], ids=str)
def test_maps_too_small_to_pool_are_refused(sides, pool, device):
    """By torch as well; in the same words on tensors without memory."""
    kind, sizes, none = BlockKind(pool=pool), (2, 3, *sides), (None, None)
    with pytest.raises(RuntimeError):
        (F.avg_pool2d if pool == ops.AVERAGE_POOL else F.max_pool2d)(torch.zeros(sizes, device=device), 2)
    for z in (torch.zeros(sizes, device=device), torch.zeros(sizes, device="meta")):
        g, stats, dual_z = z[..., : sides[0] // 2, : sides[1] // 2], z.new_zeros(1, 2, 3), ops.DualTensor(z, z)
        dual_g = ops.DualTensor(g, g)
        for call in (
            lambda z=z: ops.block_forward(z, None, None, kind),
            lambda z=z, g=g, stats=stats: ops.block_backward(g, z, stats, None, None, kind),
            lambda z=dual_z: ops.block_dual_forward(z, none, none, kind),
            lambda z=dual_z, g=dual_g, s=stats: ops.block_dual_backward(g, z, s, none, none, kind),
        ):
            with pytest.raises(ValueError, match=f"^block: pooling needs maps of at least 2 x 2, z has {sides[0]} x"):
                call()


def test_the_gradient_cannot_be_differentiated_again():
    case = Case("batch", "swish", "average", (2, 4, 6, 6), torch.float64)
    inputs = [t.requires_grad_() for t in (case.z, *case.parameters)]
    gradients = torch.autograd.grad(ops.block(*inputs, case.kind).square().sum(), inputs, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="gradient of block .* cannot be differentiated again"):
            gradient.sum().backward(retain_graph=True)


def test_bad_input():
    case = Case("group", "relu", "average", (2, 4, 6, 6), torch.float32)
    gamma, beta = case.parameters
    for error, message, z, parameters, kind in [
        (ValueError, r"z must have shape", case.z[0], (gamma, beta), case.kind),
        (TypeError, r"z must be float32", case.z.half(), (gamma, beta), case.kind),
        (ValueError, r"gamma must have shape \[4\]", case.z, (gamma[:3], beta), case.kind),
        (TypeError, r"beta must be float", case.z, (gamma, beta.double()), case.kind),
        (ValueError, r"4 channels do not divide into 3 groups", case.z, (gamma, beta), case.kind._replace(groups=3)),
        (ValueError, r"norm must be 0 to 2, got 3", case.z, (gamma, beta), case.kind._replace(norm=3)),
        (ValueError, r"pool must be 0 to 2, got -1", case.z, (gamma, beta), case.kind._replace(pool=-1)),
        (ValueError, r"activation must be 0 to 2", case.z, (gamma, beta), case.kind._replace(activation=7)),
    ]:
        with pytest.raises(error, match=message):
            ops.block_forward(z, *parameters, kind)
    _, stats = ops.block_forward(case.z, gamma, beta, case.kind)
    with pytest.raises(ValueError, match=r"g must have shape \[2, 4, 3, 3\]"):
        ops.block_backward(case.z, case.z, stats, gamma, beta, case.kind)
    with pytest.raises(ValueError, match="stats must have shape"):
        ops.block_backward(case.g, case.z, stats[:1], gamma, beta, case.kind)
    with pytest.raises(TypeError, match="stats must be float32, got float64"):
        ops.block_backward(case.g, case.z, stats.double(), gamma, beta, case.kind)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match="stats is on cuda:0, z on cpu"):
            ops.block_backward(case.g, case.z, stats.cuda(), gamma, beta, case.kind)
    plain = case.kind._replace(norm=ops.NO_NORM)
    for parameters in ((gamma, None), (None, beta)):
        with pytest.raises(ValueError, match="gamma and beta need a norm"):
            ops.block_forward(case.z, *parameters, plain)
        with pytest.raises(ValueError, match="gamma_t and beta_t need a norm"):
            ops.block_dual_forward(ops.DualTensor(case.z, case.zt), (None, None), parameters, plain)
