"""The number of threads of a run: one for little work, and what the user has set where that is said."""

import pytest
import torch
from torch import nn

from selmatch_ext import models, threads, training
from selmatch_ext.settings import Training


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    for name in threads.CHOICES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def network(size, channels):
    return models.build(f"ConvNetD2W{channels}", 1, 10, (size, size), generator=torch.Generator().manual_seed(0))


def test_multiply_adds_are_counted_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(54, 7))
    x, generator = torch.randn(3, 4, 5, 5), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert threads.multiply_adds(model, x) == 3 * (9 * 6 * 2 * 9 + 54 * 7)
    assert torch.equal(torch.get_rng_state(), generator) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_little_work_gets_one_thread(monkeypatch):
    small, large = (network(8, 32), torch.zeros(1, 1, 8, 8)), (network(32, 64), torch.zeros(1, 1, 32, 32))
    assert threads.threads_for(*small, 50) == 1
    assert threads.threads_for(*small, 5000) == threads.threads_for(*large, 50) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads.threads_for(*small, 50) == 2


def test_threads_are_put_back():
    with pytest.raises(ValueError), threads.using(1):
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("batch, expected", [(8, 1), (4096, 2)])
def test_training_uses_them(batch, expected):
    seen = []

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(8, 32)

        def forward(self, x):
            seen.append(torch.get_num_threads())
            return self.inner(x)

    x, labels = torch.zeros(4096, 1, 8, 8), torch.arange(4096) % 10
    keep = lambda indices, generator: training.sample_augmentation(len(indices), 8, 8, "none")  # noqa: E731
    settings = Training(epochs=1, lr=0.01, batch=batch)
    training.train(Seen(), x[: 2 * batch].__getitem__, labels[: 2 * batch], settings, keep, torch.Generator())
    assert seen[-1] == expected and torch.get_num_threads() == 2


class Functional(nn.Module):
    """Calls no layer that is counted."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, 3, 3))

    def forward(self, x):
        return torch.conv2d(x, self.weight).mean((2, 3))


NORMALIZED = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4, track_running_stats=False))


@pytest.mark.parametrize("model", [Functional(), NORMALIZED], ids=["functional", "refuses one image"])
def test_where_the_work_is_not_known_all_threads_stay(model):
    assert threads.threads_for(model, torch.zeros(4, 1, 8, 8), 8) == 2


def test_computed_weights_are_counted():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 3, 3))
    assert threads.multiply_adds(layer, torch.zeros(1, 1, 8, 8)) == 36 * 27
