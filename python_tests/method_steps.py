"""What tests of the methods' steps share: small tasks, draws as methods make them, and the comparison of two losses."""

import reference
import torch
from conftest import MODEL

from selmatch_ext.context import Context
from selmatch_ext.methods import Task
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Start

ALL = "color_crop_cutout_flip_scale_rotate"
CLASSES = range(10)
TRAJECTORY = {"inner_steps": 3, "expert_epochs": 1, "max_start_epoch": 3, "batch_syn": 7, "lr_init": 0.05}
UNROLLED = {"model": MODEL, "steps": 2, "epochs": 2, "networks": 2, "batch_real": 50, "lr_init": 0.05}


def task(digits, ipc=2, experts=None, dtype=torch.float64, seed=3):
    return Task(begin("random", ipc, digits, seed), Context(digits, seed), experts, dtype)


def begin(select, ipc, data, seed=0, experts=None):
    """The start that needs no scores and no features."""
    return choose(Start(select, ipc), Context(data, seed), None, None, experts).images


def real(task, indices):
    return task.data.normalize(task.data.train.images[indices], dtype=task.dtype)


def pick(task, label, count, g):
    """The indices that a method draws of a class."""
    members = (task.data.train.labels == label).nonzero().squeeze(1)
    return members[torch.randperm(len(members), generator=g)[:count]]


def assert_same_step(method, expected, got, names=None):
    leaves = [method.learned[name] for name in names or method.learned]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    want, have = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (expected, got))
    for w, h in zip(want, have, strict=True):
        assert w.norm() > 0 and (h - w).norm() <= 1e-9 * w.norm()


def siamese(task, strategy, g):
    if strategy == "none":
        return lambda x: x
    table = sample_augmentation(1, *task.data.image_size, strategy=strategy, siamese=True, generator=g)
    return lambda x: reference.augment(x, table)
