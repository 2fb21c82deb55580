"""What several tests share: a small data set, tiny settings, and a store of short expert trajectories."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selmatch_ext.context import CPU, Context

# Other modules are imported where they are used: tests of the operations run without the packages of the pipeline.

__all__ = [
    "CPU",
    "CountFirstLayers",
    "DEVICES",
    "MEASURED",
    "MODEL",
    "digits",
    "experts",
    "random_set",
    "run_for",
    "tiny_run",
]
MODEL = "ConvNetD2W8"
MEASURED = ("times.json", "report.html")
"""Files of a run that hold times, which no two runs have in common."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(params=DEVICES)
def device(request):
    """Both devices, the GPU where there is one."""
    return request.param


@pytest.fixture
def one_thread():
    """The tensors here are so small that several threads would mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    from selmatch_ext.data.load import load

    return load("digits")


def tiny_run(**changes):
    """Every stage of the demo on digits, in seconds."""
    from selmatch_ext.methods.selmatch import SelMatchSettings
    from selmatch_ext.runner import Run
    from selmatch_ext.settings import Data, Evaluation, Experts, Scores, Start, Training, Window

    scores = Scores(source="el2n", model=MODEL, runs=1, training=Training(epochs=1))
    run = Run.of(
        "selmatch",
        data=Data("digits"),
        start=Start("window", ipc=6, alpha=0.5, window=Window(step=0.5, networks=1), scores=scores),
        experts=Experts(model=MODEL, count=2, strategy="crop", training=Training(epochs=3)),
        settings=SelMatchSettings(
            iterations=3,
            inner_steps=3,
            expert_epochs=1,
            max_start_epoch=2,
            batch_syn=25,
            lr_images=10.0,
            lr_init=0.02,
            strategy="color_crop",
            checkpoint_seconds=0.0,
        ),
        evaluation=Evaluation(
            model=MODEL,
            networks=2,
            distilled_strategy="color_crop",
            selected_strategy="crop",
            training=Training(epochs=2, batch=32, lr=0.02, momentum=0.9, schedule="cosine"),
        ),
    )
    return replace(run, **changes)


def random_set(data, ipc, seed=0):
    """Random training images, none of them marked as learned."""
    from selmatch_ext.data.distilled import as_selected
    from selmatch_ext.selection.start import choose
    from selmatch_ext.settings import Start

    return as_selected(choose(Start("random", ipc), Context(data, seed), None, None).images)


def run_for(method, iterations, folder, made_from=None, seed=0, **settings):
    """The loop, for so many iterations. A method without task or settings gets the seed and the settings given here."""
    from selmatch_ext.methods import MethodSettings
    from selmatch_ext.methods.loop import run_method

    if not hasattr(method, "task"):
        method.task, method.settings = SimpleNamespace(context=Context(None, seed)), MethodSettings(**settings)
    with mock.patch.object(type(method), "iterations", iterations, create=True):
        return run_method(method, folder, made_from or {})


@pytest.fixture(scope="session")
def experts(digits, tmp_path_factory):
    from selmatch_ext.experts import train_experts

    return train_experts(Context(digits), tiny_run().experts, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def learned(digits):
    """A set of images that are no pixels any more, of which some leave the range of pixels."""
    real = random_set(digits, 2)
    noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) % 3 > 0
    return replace(real, images=real.images + noise, distilled=mask, lr=0.0123, method="mtt", settings={"a": [1]})


@pytest.fixture
def public(learned, tmp_path):
    """MTT's two files with the images and labels of `learned`; the path of the first."""
    (tmp_path / "mtt").mkdir()
    torch.save(learned.images, tmp_path / "mtt" / "images_100.pt")
    torch.save(learned.labels, tmp_path / "mtt" / "labels_100.pt")
    return tmp_path / "mtt" / "images_100.pt"


class CountFirstLayers(TorchDispatchMode):
    """calls: how often each operator of ops/conv_block.py is called."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().removeprefix("selmatch_ext::")
        if name.startswith("conv_block"):
            self.calls[name] = self.calls.get(name, 0) + 1
        return function(*arguments, **(options or {}))
