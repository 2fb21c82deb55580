"""ZCA whitening against its formula."""

import pytest
import torch

from selmatch_ext.data.images import denormalize
from selmatch_ext.data.load import load, load_data
from selmatch_ext.data.whitening import Whitening, fit_whitening
from selmatch_ext.settings import Data


def images(n=200):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n, 2, 3, 4, generator=g)
    return base + 2 * base.roll(1, 3) + 0.5


def test_formula():
    """U (S + 0.1)^-1/2 U^T of the covariance, from the singular values of the centered images."""
    x = images()
    flat = x.flatten(1).double() - x.flatten(1).double().mean(0)
    _, s, v = torch.linalg.svd(flat, full_matrices=False)
    transform = v.T @ torch.diag((s**2 / 199 + 0.1) ** -0.5) @ v
    found = fit_whitening(x)
    torch.testing.assert_close(found.transform.double(), transform, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found(x).flatten(1).double(), flat @ transform, rtol=1e-4, atol=1e-5)


def test_what_it_is_for():
    """Nearly uncorrelated pixels of nearly unit variance; the original comes back."""
    x = images(5000)
    white = fit_whitening(x, eps=1e-6)(x).flatten(1).double()
    torch.testing.assert_close(white.T.cov(), torch.eye(24).double(), rtol=0, atol=1e-3)
    w = fit_whitening(x)
    torch.testing.assert_close(w.undo(w(x)), x, rtol=1e-4, atol=1e-4)


def test_a_data_set_is_whitened_from_its_training_split():
    data = load_data(Data("digits", zca=True), seed=0)
    plain = load("digits")
    w = fit_whitening(plain.normalize(plain.train.images))
    torch.testing.assert_close(data.normalize(data.test.images), w(plain.normalize(plain.test.images)))
    shown = denormalize(data.normalize(data.test.images), data.mean, data.std, data.whitening)
    assert torch.equal((shown * 255).round().byte(), data.test.images)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"mean of shape \(3,\) and a transform of shape \(2, 2\)"):
        Whitening(torch.zeros(3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"images of shape \(1, 2, 2\) do not fit a whitening of 24 pixels"):
        fit_whitening(images())(torch.zeros(5, 1, 2, 2))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fit_whitening(images(1))
