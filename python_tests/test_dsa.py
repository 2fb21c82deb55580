"""DSA: every operation and its derivatives against the oracle, the random streams, and what bad input is told."""

import math
import os
import subprocess
import sys

import pytest
import reference
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

import selmatch_ext as sm
from selmatch_ext import _C
from selmatch_ext.ops import dsa

pytestmark = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior has changed")

NAMES = ["color", "crop", "cutout", "flip", "scale", "rotate"]
ALL = "_".join(NAMES)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
operator = torch.ops.selmatch_ext.dsa


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)


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


# --- the drop-in ------------------------------------------------------------------------------------------------------


def both_diff_augments(x, strategy, seed, param):
    """Ours and the oracle's images and gradients from the same state of the global generator; and the states after."""
    outcomes = []
    for function in (sm.DiffAugment, reference.DiffAugment):
        torch.manual_seed(1234)
        images = x.detach().requires_grad_()
        y = function(images, strategy, seed, param)
        (gradient,) = torch.autograd.grad((y * normal(y.shape, 5).to(y)).sum(), images)
        outcomes.append((y, gradient, torch.get_rng_state()))
    return outcomes


@pytest.mark.parametrize("aug_mode", ["S", "M"])
@pytest.mark.parametrize("shape", [(7, 3, 32, 32), (5, 1, 15, 20)], ids=str)
def test_drop_in_gives_the_images_of_the_public_code(aug_mode, shape, device):
    param = sm.ParamDiffAug(aug_mode=aug_mode)
    strategies = [*NAMES, ALL, "color_crop_cutout_scale_rotate", "flip_flip_rotate"]
    for index, strategy in enumerate(strategies):
        for seed in (-1, 0, 3, 4, 1000 + index):
            x = normal(shape, index, torch.float32, device)
            (y, gradient, state), (expected, expected_gradient, expected_state) = both_diff_augments(
                x, strategy, seed, param
            )
            torch.testing.assert_close(y, expected, rtol=3e-5, atol=3e-5)
            torch.testing.assert_close(gradient, expected_gradient, rtol=3e-5, atol=3e-5)
            assert y.is_contiguous()
            if seed == -1:
                assert torch.equal(state, expected_state)


@pytest.mark.parametrize("name", NAMES)
def test_drop_in_in_float64(name, device):
    for seed in (-1, 5):
        (y, gradient, _), (expected, expected_gradient, _) = both_diff_augments(
            normal((4, 3, 12, 9), device=device), name, seed, sm.ParamDiffAug()
        )
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def test_drop_in_with_other_strengths(device):
    param = sm.ParamDiffAug()
    param.aug_mode, param.prob_flip, param.ratio_scale, param.ratio_rotate = "M", 0.9, 1.5, 40.0
    param.ratio_crop_pad, param.ratio_cutout = 0.3, 0.2
    param.brightness, param.saturation, param.contrast = 0.3, 1.2, 0.7
    for seed in (-1, 2):
        (y, gradient, _), (expected, expected_gradient, _) = both_diff_augments(
            normal((6, 3, 16, 16), device=device), ALL, seed, param
        )
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    param.ratio_cutout, x = 0.0, normal((6, 3, 16, 16))
    assert torch.equal(sm.DiffAugment(x, "cutout", 1, param), x)


def test_drop_in_leaves_the_global_generator_alone_when_seeded():
    x = normal((4, 3, 8, 8))
    state = torch.get_rng_state()
    for aug_mode in ("S", "M"):
        sm.DiffAugment(x, ALL, 7, sm.ParamDiffAug(aug_mode=aug_mode))
    assert torch.equal(torch.get_rng_state(), state)


def test_drop_in_with_a_seed_treats_batches_of_any_size_alike():
    x = normal((9, 3, 16, 16))
    for seed in range(12):
        whole = sm.DiffAugment(x, ALL, seed, None)
        assert torch.equal(whole[:4], sm.DiffAugment(x[:4], ALL, seed))


@pytest.mark.parametrize("strategy", ["", "none", "None"])
def test_drop_in_without_a_strategy_returns_its_input(strategy):
    x = normal((2, 3, 8, 8))
    assert sm.DiffAugment(x, strategy, param=sm.ParamDiffAug()) is x


# --- sampling ---------------------------------------------------------------------------------------------------------


def columns(name, batch=4000, height=32, width=20):
    table = sm.sample_augmentation(batch, height, width, name, generator=generator(1))
    assert table.ops.shape == (batch, 1) and table.params.shape == (batch, 1, 4)
    assert table.ops.dtype == torch.uint8 and table.params.dtype == torch.float32
    return table.ops[:, 0], table.params[:, 0].unbind(1)


def assert_covers(values, low, high):
    """Inside the bounds, close to both, with the mean in the middle, as uniform draws are."""
    assert values.min() >= low and values.max() <= high
    span = high - low
    assert values.min() < low + 0.02 * span and values.max() > high - 0.02 * span
    assert abs(values.mean() - (low + high) / 2) < 0.02 * span


def test_bounds_of_color():
    ops, (brightness, saturation, contrast, _) = columns("color")
    assert (ops == dsa.COLOR).all()
    assert_covers(brightness, -0.5, 0.5)
    assert_covers(saturation, 0, 2)
    assert_covers(contrast, 0.5, 1.5)


def test_bounds_of_crop():
    ops, (rows, columns_, *_) = columns("crop")
    assert (ops == dsa.SHIFT).all()
    assert rows.unique().tolist() == list(range(-4, 5))
    assert columns_.unique().tolist() == list(range(-3, 4))  # int(20 * 0.125 + 0.5) = 3


def test_bounds_of_cutout():
    ops, bounds = columns("cutout", height=9, width=32)
    first_row, end_row, first_column, end_column = (bound.long() for bound in bounds)
    assert (ops == dsa.BOX).all()
    assert ((end_row - first_row) == 5).all() and ((end_column - first_column) == 16).all()
    assert (first_row + 2).unique().tolist() == list(range(9))  # centers; an even box's may lie one beyond the image
    assert (first_column + 8).unique().tolist() == list(range(33))


def test_share_of_flips():
    ops, _ = columns("flip")
    assert set(ops.tolist()) == {dsa.NONE, dsa.FLIP}
    assert abs((ops == dsa.FLIP).float().mean() - 0.5) < 0.03


def test_bounds_of_scale_and_rotate():
    ops, (a, b, c, d) = columns("scale")
    assert (ops == dsa.AFFINE).all() and not b.any() and not c.any() and not torch.equal(a, d)
    assert_covers(a, 1 / 1.2, 1.2)
    assert_covers(d, 1 / 1.2, 1.2)
    ops, (a, b, c, d) = columns("rotate")
    assert (ops == dsa.AFFINE).all() and torch.equal(a, d) and torch.equal(b, -c)
    assert_covers(torch.atan2(c, a).rad2deg(), -15, 15)


def test_simple_is_a_random_crop_and_a_flip():
    table = sm.sample_augmentation(4000, 32, 32, "simple", generator=generator(0))
    assert table.ops.shape == (4000, 2)
    assert (table.ops[:, 0] == dsa.SHIFT).all()
    for shift in table.params[:, 0, :2].unbind(1):
        assert shift.unique().tolist() == list(range(-4, 5))
    assert abs((table.ops[:, 1] == dsa.FLIP).float().mean() - 0.5) < 0.03


def test_single_draws_one_name_and_per_sample_one_for_each_image():
    codes = {dsa.COLOR, dsa.SHIFT, dsa.BOX, dsa.AFFINE}
    strategy = "color_crop_cutout_rotate"
    drawn = set()
    for seed in range(40):
        ops = sm.sample_augmentation(8, 32, 32, strategy, generator=generator(seed)).ops
        assert ops.shape == (8, 1) and len(ops.unique()) == 1
        drawn.add(ops[0, 0].item())
    assert drawn == codes
    ops = sm.sample_augmentation(4000, 32, 32, strategy, per_sample=True, generator=generator(0)).ops
    shares = torch.bincount(ops[:, 0].long(), minlength=6) / 4000
    assert {code for code in range(6) if shares[code] > 0} == codes
    assert all(abs(shares[code] - 0.25) < 0.03 for code in codes)


def test_multi_applies_all_names_in_order():
    table = sm.sample_augmentation(5, 32, 32, "rotate_color_cutout", "multi", generator=generator(0))
    assert table.ops.tolist() == [[dsa.AFFINE, dsa.COLOR, dsa.BOX]] * 5


@pytest.mark.parametrize("mode", ["single", "multi"])
def test_siamese_is_one_row_whatever_the_batch(mode):
    one, other = (sm.sample_augmentation(b, 8, 8, ALL, mode, siamese=True, generator=generator(4)) for b in (256, 10))
    assert one.ops.shape[0] == 1
    assert torch.equal(one.ops, other.ops) and torch.equal(one.params, other.params)


def test_sampling_is_repeatable_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (
        sm.sample_augmentation(64, 32, 32, ALL, per_sample=True, generator=generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.ops, again.ops) and torch.equal(first.params, again.params)
    assert not torch.equal(first.params, other.params)
    unseeded = [sm.sample_augmentation(64, 32, 32, "color").params for _ in range(2)]
    assert not torch.equal(*unseeded)
    assert torch.equal(torch.get_rng_state(), state)
    stream = generator(0)
    draws = [sm.sample_augmentation(64, 32, 32, "color", generator=stream).params for _ in range(2)]
    assert not torch.equal(*draws)


def test_tables_go_where_they_are_asked_for(device):
    table = sm.sample_augmentation(4, 8, 8, generator=generator(0), device=device)
    assert table.ops.device.type == device and table.params.device.type == device
    assert table.to("meta").ops.device.type == "meta"


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
