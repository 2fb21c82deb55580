"""Copies to a device: one for each dtype, whatever the number of tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selmatch_ext.ops.dsa import Augmentation
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.transfers import steps_to_device, to_device

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and isinstance(arguments[0], torch.Tensor):
            if result.device != arguments[0].device:
                self.blocking.append(not (options or {}).get("non_blocking", False))
        return result


def steps(count=55):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randperm(20, generator=generator)[: 7 + i % 2] for i in range(count)]
    return batches, [sample_augmentation(len(b), 8, 9, generator=generator) for b in batches]


def test_an_iteration_takes_three_copies_that_do_not_block():
    batches, tables = steps()
    with Copies() as copies:
        there, tables_there = steps_to_device(batches, tables, META)
    assert copies.blocking == [False] * 3
    assert [b.shape for b in there] == [b.shape for b in batches]
    assert [t.params.shape for t in tables_there] == [t.params.shape for t in tables]
    assert all(b.device == META for b in there) and all(t.ops.device == META for t in tables_there)


def test_on_the_cpu_nothing_is_copied():
    batches, tables = steps(3)
    there, tables_there = steps_to_device(batches, tables, torch.device("cpu"))
    assert all(a is b for a, b in zip(there, batches, strict=True))
    assert all(a.ops is b.ops and a.params is b.params for a, b in zip(tables_there, tables, strict=True))
    assert steps_to_device([], [], META) == ([], [])


@pytest.mark.gpu
def test_values_on_a_gpu():
    batches, tables = steps()
    there, tables_there = steps_to_device(batches, tables, torch.device("cuda"))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, batches, strict=True))
    for moved, table in zip(tables_there, tables, strict=True):
        assert isinstance(moved, Augmentation)
        assert torch.equal(moved.ops.cpu(), table.ops) and torch.equal(moved.params.cpu(), table.params)


def test_shapes_are_kept():
    given = [torch.zeros(2, 3), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(()), torch.zeros(5)]
    assert [(t.shape, t.dtype) for t in to_device(given, META)] == [(t.shape, t.dtype) for t in given]
