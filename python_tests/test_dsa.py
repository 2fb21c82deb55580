"""DSA: every operation and its derivatives against the oracle, in every layout, and what bad input is told."""

import math
import os
import subprocess
import sys

import pytest
import reference
import torch
from conftest import DEVICES
from dsa_cases import ALL, NAMES, OLD_GRIDS, generator, normal
from hypothesis import given, settings
from hypothesis import strategies as st

import selmatch_ext as sm
from selmatch_ext import _C
from selmatch_ext.ops import dsa

pytestmark = OLD_GRIDS
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
operator = torch.ops.selmatch_ext.dsa


def to(table, dtype):
    return sm.Augmentation(table.ops, table.params.to(dtype))


def assert_matches_reference(shape, table, dtype, device):
    """Value, gradient and second derivative (the gradient's gradient with respect to what it was multiplied with)."""
    tolerance = TOLERANCE[dtype]
    exact = normal(shape, 1).requires_grad_()
    expected = reference.augment(exact, table)
    weights = normal(shape, 2)
    (expected_gradient,) = torch.autograd.grad(expected, exact, weights)

    x = exact.detach().to(device, dtype).requires_grad_()
    w = weights.to(device, dtype).requires_grad_()
    y = sm.augment(x, table.to(device))
    (gradient,) = torch.autograd.grad(y, x, w, create_graph=True)
    (second,) = torch.autograd.grad(gradient, w, x.detach(), create_graph=True)
    linear = reference.augment(exact, table) - reference.augment(torch.zeros_like(exact), table)
    for result, truth in ((y, expected), (gradient, expected_gradient), (second, linear)):
        assert result.dtype == dtype and result.device.type == device and result.shape == torch.Size(shape)
        torch.testing.assert_close(result.detach().cpu().double(), truth.detach(), rtol=tolerance, atol=tolerance)


# --- the operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strategy", NAMES + [ALL, "simple", "none"])
@pytest.mark.parametrize("shape", [(6, 3, 32, 32), (3, 1, 17, 12), (2, 5, 9, 40)], ids=str)
def test_every_strategy_matches_the_reference(strategy, shape, dtype, device):
    for seed, (mode, per_sample, siamese) in enumerate(
        [("single", False, False), ("single", True, False), ("multi", False, False), ("multi", False, True)]
    ):
        table = sm.sample_augmentation(
            shape[0], *shape[2:], strategy, mode, per_sample=per_sample, siamese=siamese, generator=generator(seed)
        )
        assert_matches_reference(shape, table, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_strategies_mixed_by_a_mask(dtype, device):
    shape = (16, 3, 32, 32)
    mask = torch.rand(16, generator=generator(0)) < 0.5
    distilled = sm.sample_augmentation(16, 32, 32, per_sample=True, generator=generator(1))
    selected = sm.sample_augmentation(16, 32, 32, "simple", generator=generator(2))
    mixed = sm.mix_augmentations(mask, distilled, selected)
    assert_matches_reference(shape, mixed, dtype, device)
    x = normal(shape, device=device, dtype=dtype)
    expected = torch.where(
        mask.view(-1, 1, 1, 1).to(device), sm.augment(x, distilled.to(device)), sm.augment(x, selected.to(device))
    )
    assert torch.equal(sm.augment(x, mixed.to(device)), expected)


def test_mixing_takes_tables_of_one_row():
    mask = torch.tensor([True, False, True])
    shared = sm.sample_augmentation(3, 8, 8, ALL, "multi", siamese=True, generator=generator(0))
    mixed = sm.mix_augmentations(mask, shared, sm.sample_augmentation(3, 8, 8, "none"))
    assert mixed.ops.shape == (3, 6) and mixed.params.shape == (3, 6, 4)
    assert torch.equal(mixed.ops[0], shared.ops[0]) and torch.equal(mixed.params[2], shared.params[0])
    assert not mixed.ops[1].any()


coefficient = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-6]), st.floats(-4, 4))


@st.composite
def tables(draw, batch, height, width):
    """Tables of anything: maps that shrink, blow up, shear, collapse or mirror; boxes and shifts beyond the image."""
    rows, length = draw(st.sampled_from([1, batch])), draw(st.integers(0, 3))
    ops = torch.zeros(rows, length, dtype=torch.uint8)
    params = torch.zeros(rows, length, 4, dtype=torch.float64)
    for r in range(rows):
        for k in range(length):
            ops[r, k] = code = draw(st.integers(0, 5))
            if code == dsa.SHIFT or code == dsa.BOX:
                values = draw(st.lists(st.integers(-2, max(height, width) + 2), min_size=4, max_size=4))
            else:
                values = draw(st.lists(coefficient, min_size=4, max_size=4))
            params[r, k] = torch.tensor(values, dtype=torch.float64)
    return sm.Augmentation(ops, params)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_table_on_any_shape(device, data):
    shape = tuple(data.draw(st.integers(1, high), label) for label, high in zip("BCHW", (3, 6, 21, 21), strict=True))
    table = data.draw(tables(shape[0], *shape[2:]))
    assert_matches_reference(shape, table, torch.float64, device)


def test_images_wider_than_a_vector_window(device):
    params = torch.tensor([[[0.9, 0, 0, 1.1]], [[0.3, 0, 0, 0.2]], [[2.9, 0, 0, 1]], [[0.96, -0.26, 0.26, 0.96]]])
    table = sm.Augmentation(torch.full((4, 1), dsa.AFFINE, dtype=torch.uint8), params)
    assert_matches_reference((4, 3, 50, 70), table, torch.float64, device)
    assert_matches_reference((4, 3, 50, 70), table, torch.float32, device)


def test_sampling_just_inside_the_far_edges(device):
    """Positions that are less than 32 but that rounding can move there, on each side: a step of the float at a time."""
    edge = torch.tensor(16.5 / 15.5)  # takes pixel 31 to 15.5 + 15.5 * edge = 32
    bits = edge.view(torch.int32) + torch.arange(-200, 200, dtype=torch.int32)
    scale, one = bits.view(torch.float32), torch.ones(400)
    for a, d in ((scale, one), (one, scale), (scale, scale)):
        params = torch.stack([a, 0 * a, 0 * a, d], dim=1)[:, None]
        table = sm.Augmentation(torch.full((400, 1), dsa.AFFINE, dtype=torch.uint8), params)
        assert_matches_reference((400, 2, 32, 32), table, torch.float32, device)


def test_images_larger_than_shared_memory(device):
    table = sm.sample_augmentation(2, 160, 150, ALL, "multi", generator=generator(0))
    assert_matches_reference((2, 3, 160, 150), table, torch.float64, device)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, device):
    x = normal((2, 3, 6, 5), device=device).requires_grad_()
    table = to(sm.sample_augmentation(2, 6, 5, name, generator=generator(3), device=device), torch.float64)
    assert torch.autograd.gradcheck(lambda x: sm.augment(x, table), x)
    assert torch.autograd.gradgradcheck(lambda x: sm.augment(x, table).pow(2), x)


@pytest.mark.parametrize("mode", [dsa.FORWARD, dsa.TRANSPOSE])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "turned", "empty", "bfloat16"])
def test_opcheck(mode, layout, device):
    table = sm.sample_augmentation(3, 8, 8, ALL, "multi", siamese=True, generator=generator(0), device=device)
    x = normal((3, 3, 8, 8), dtype=torch.float32, device=device)
    variants = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "turned": x.transpose(2, 3),
        "empty": x[:0],
        "bfloat16": x.bfloat16(),
    }
    torch.library.opcheck(operator, (variants[layout].requires_grad_(), *table, mode))


# --- layouts, dtypes, threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_short_floats_are_computed_in_float32(name, dtype, device):
    x = normal((4, 3, 16, 16), dtype=dtype, device=device).requires_grad_()
    table = sm.sample_augmentation(4, 16, 16, name, generator=generator(0), device=device)
    y = sm.augment(x, table)
    assert y.dtype == dtype
    assert torch.equal(y, sm.augment(x.float(), table).to(dtype))
    weights = normal(x.shape, 1, dtype, device)
    (gradient,) = torch.autograd.grad(y, x, weights)
    assert torch.equal(gradient, operator(weights.float(), *table, dsa.TRANSPOSE).to(dtype))


@pytest.mark.parametrize("name", [*NAMES, "none"])
def test_strides(name, device):
    table = sm.sample_augmentation(4, 10, 12, name, generator=generator(0), device=device)
    x = normal((4, 3, 10, 12), dtype=torch.float32, device=device)
    expected = sm.augment(x, table)
    big = normal((8, 6, 20, 24), device=device, dtype=torch.float32)
    sliced = big[::2, 1::2, 3:13, ::2].copy_(x)
    channels_last = x.to(memory_format=torch.channels_last)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for variant in (channels_last, sliced, turned, x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)):
        assert torch.equal(sm.augment(variant, table), expected)
    result = sm.augment(channels_last, table)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert result.data_ptr() != channels_last.data_ptr()
    row = x[:1, :1, :1].expand(4, 3, 10, 12)
    assert torch.equal(sm.augment(row, table), sm.augment(row.contiguous(), table))


@pytest.mark.parametrize("shape", [(800, 3, 32, 32), (3000, 3, 17, 15)], ids=["whole lines", "parts of lines"])
def test_batches_that_go_past_the_caches(shape, device):
    """Large results are written another way than small ones, on the CPU."""
    table = sm.sample_augmentation(*shape[:1], *shape[2:], ALL, per_sample=True, generator=generator(0), device=device)
    memory = normal((math.prod(shape) + 1,), dtype=torch.float32, device=device)
    for x in (memory[:-1].view(shape), memory[1:].view(shape), memory[:1].expand(shape)):
        for mode in (dsa.FORWARD, dsa.TRANSPOSE):
            parts = zip(*(tensor.split(100) for tensor in (x, *table)), strict=True)
            expected = torch.cat([operator(*part, mode) for part in parts])
            assert torch.equal(operator(x, *table, mode), expected)


def test_gradients_that_are_expanded_or_channels_last(device):
    table = sm.sample_augmentation(4, 8, 8, "rotate", generator=generator(0), device=device)
    x = normal((4, 3, 8, 8), device=device).requires_grad_()
    (summed,) = torch.autograd.grad(sm.augment(x, table).sum(), x)
    torch.testing.assert_close(summed, operator(torch.ones_like(x), *table, dsa.TRANSPOSE))
    weights = normal(x.shape, 1, device=device)
    (gradient,) = torch.autograd.grad(sm.augment(x, table), x, weights.to(memory_format=torch.channels_last))
    assert torch.equal(gradient, operator(weights, *table, dsa.TRANSPOSE))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 1, 1, 1), (2, 0, 4, 4)], ids=str)
def test_nothing_to_do(shape, device):
    table = sm.sample_augmentation(shape[0], *shape[2:], ALL, "multi", generator=generator(0), device=device)
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = sm.augment(x, table)
    assert y.shape == shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == shape
    assert sm.DiffAugment(x, ALL).shape == shape


@pytest.mark.parametrize("mode", ["single", "multi"])
def test_the_number_of_threads_does_not_matter(mode):
    table = sm.sample_augmentation(64, 32, 32, ALL, mode, per_sample=True, generator=generator(0))
    x = normal((64, 3, 32, 32), dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((sm.augment(x, table), operator(x, *table, dsa.TRANSPOSE)))
    finally:
        torch.set_num_threads(threads)
    for forward, transposed in results[1:]:
        assert torch.equal(forward, results[0][0]) and torch.equal(transposed, results[0][1])


INSTRUCTION_SETS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for case in torch.load(sys.argv[2], weights_only=True):
    for mode in range(3):
        y = torch.ops.selmatch_ext.dsa(case["x"], case["ops"], case["params"], mode)
        torch.testing.assert_close(y, case["results"][mode], rtol=case["tolerance"], atol=case["tolerance"])
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_instruction_sets_give_the_same(level, tmp_path):
    """The loops are compiled several times over and chosen by the machine; here those it would not choose are run."""
    cases = []
    for dtype, tolerance in TOLERANCE.items():
        for shape in ((12, 3, 32, 32), (6, 5, 13, 37)):
            table = sm.sample_augmentation(shape[0], *shape[2:], ALL, per_sample=True, generator=generator(0))
            x = normal(shape, dtype=dtype)
            results = [operator(x, *table, mode) for mode in range(3)]
            cases.append({"x": x, "results": results, "tolerance": tolerance, **table._asdict()})
    torch.save(cases, tmp_path / "cases.pt")
    environment = {**os.environ, "SELMATCH_CPU": level}
    command = [sys.executable, "-c", INSTRUCTION_SETS, _C.__file__, str(tmp_path / "cases.pt")]
    subprocess.run(command, env=environment, check=True)


# --- bad input --------------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(3, 3, 8, 8)
TABLE = sm.sample_augmentation(3, 8, 8, "color", generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: sm.augment(IMAGES[0], TABLE), ValueError, r"x must have 4 dimensions .* got shape \(3, 8, 8\)"),
        (lambda: sm.augment(IMAGES.long(), TABLE), TypeError, "x must be float32, .* got torch.int64"),
        (lambda: sm.augment(IMAGES, TABLE.to("meta")), ValueError, "x is on cpu, the table on meta"),
        (lambda: sm.augment(IMAGES[:2], TABLE), ValueError, "the table has 3 rows; 1 or the batch size 2"),
        (lambda: sm.augment(IMAGES.to(torch.float8_e4m3fn), TABLE), TypeError, "x must be float32"),
        (lambda: sm.DiffAugment(IMAGES[0], "flip"), ValueError, "x must have 4 dimensions"),
        (lambda: sm.DiffAugment(IMAGES.int(), "flip"), TypeError, "x must be float32"),
        (lambda: sm.DiffAugment(IMAGES, "flip_blur"), ValueError, "contains 'blur'; .* color, crop, cutout"),
        (lambda: sm.DiffAugment(IMAGES, "flip", param=sm.ParamDiffAug("X")), ValueError, "aug_mode must be 'S' .* 'X'"),
        (lambda: sm.DiffAugment(IMAGES, 3), TypeError, "strategy must be a string .* got int"),
        (lambda: sm.sample_augmentation(3, 8, 8, "noise"), ValueError, "contains 'noise'"),
        (lambda: sm.sample_augmentation(3, 8, 8, "simple_flip"), ValueError, "'simple' alone"),
        (lambda: sm.sample_augmentation(3, 8, 8, mode="S"), ValueError, "mode must be 'single' or 'multi', got 'S'"),
        (lambda: sm.sample_augmentation(-1, 8, 8), ValueError, "batch must be at least 0, got -1"),
        (lambda: sm.sample_augmentation(3, 0, 8), ValueError, "height must be at least 1, got 0"),
        (lambda: sm.mix_augmentations(torch.ones(3), TABLE, TABLE), TypeError, "mask must be a bool tensor"),
        (lambda: sm.mix_augmentations(torch.ones(4).bool(), TABLE, TABLE), ValueError, "when_true has 3 rows; 1 or"),
        (
            lambda: sm.mix_augmentations(torch.ones(3).bool(), TABLE, TABLE.to("meta")),
            ValueError,
            "when_false is on meta, mask on cpu",
        ),
        (lambda: operator(IMAGES, *TABLE, 3), ValueError, "mode must be 0, 1 or 2, got 3"),
        (lambda: operator(IMAGES, TABLE.ops.int(), TABLE.params, 0), TypeError, "ops must be uint8"),
        (lambda: operator(IMAGES, TABLE.ops + 9, TABLE.params, 0), ValueError, "ops holds 10; operations are 0 to 5"),
        (lambda: operator(IMAGES, TABLE.ops, TABLE.params.half(), 0), TypeError, "params must be float32 or float64"),
        (lambda: operator(IMAGES, TABLE.ops, TABLE.params[..., :3], 0), ValueError, "params must have shape"),
        (lambda: operator(IMAGES[:2], *TABLE, 0), ValueError, r"ops must have shape \(2 or 1, length\)"),
        (lambda: operator(IMAGES.long(), *TABLE, 0), TypeError, "x must be float32"),
    ],
)
def test_bad_input_is_told_apart(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_parameters_that_are_not_finite_do_no_harm(device):
    bad = [float("nan"), float("inf"), -float("inf"), 1e30]
    for code in range(6):
        table = sm.Augmentation(torch.tensor([[code]], dtype=torch.uint8), torch.tensor([[bad]])).to(device)
        for mode in range(3):
            assert operator(torch.ones(2, 3, 8, 8, device=device), *table, mode).shape == (2, 3, 8, 8)
