"""What several tests share: a small data set, tiny settings, and a store of short expert trajectories."""

from dataclasses import replace

import pytest
import torch

from selmatch_ext.data.images import load
from selmatch_ext.experts import train_experts
from selmatch_ext.settings import Evaluation, Experts, Matching, Scores, Training, Window, digits_demo

CPU = torch.device("cpu")
MODEL = "ConvNetD2W8"


@pytest.fixture(scope="session")
def digits():
    return load("digits")


def tiny_run(**changes):
    """Every stage of the demo on digits, in seconds."""
    run = replace(
        digits_demo(),
        scores=Scores(source="el2n", model=MODEL, runs=1, training=Training(epochs=1)),
        window=Window(ipc=6, alpha=0.5, step=0.5, networks=1),
        experts=Experts(model=MODEL, count=2, strategy="crop", training=Training(epochs=3)),
        matching=Matching(
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


@pytest.fixture(scope="session")
def experts(digits, tmp_path_factory):
    return train_experts(digits, tiny_run().experts, tmp_path_factory.mktemp("experts"), 0, CPU)
