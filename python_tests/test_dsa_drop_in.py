"""DiffAugment in place of the public code's: the same images, gradients and states of the generator."""

import pytest
import reference
import torch
from dsa_cases import ALL, NAMES, OLD_GRIDS, normal

import selmatch_ext as sm

pytestmark = OLD_GRIDS


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
