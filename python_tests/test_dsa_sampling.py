"""Sampled augmentations: bounds and shares of what is drawn, one row or many, and repeatable streams."""

import pytest
import torch
from dsa_cases import ALL, generator

import selmatch_ext as sm
from selmatch_ext.ops import dsa


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
