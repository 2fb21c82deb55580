"""How many operators one inner step of the fused engine calls: each is a launch on a GPU. Counted on tensors without
memory, so no GPU is needed."""

import collections

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from selmatch_ext import models
from selmatch_ext.fused.comparing import operations_of
from selmatch_ext.modules.private import PrivateModel
from selmatch_ext.unroll.fused_stepper import FusedStepper
from selmatch_ext.unroll.tesla import Wanted

BATCH = 125
WITHOUT_LAUNCH = ("prim::", "aten::empty", "aten::new_empty", "aten::_unsafe_view")


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)
        if not is_view and not name.startswith(WITHOUT_LAUNCH):
            self.count[name] += 1
        return function(*arguments, **(options or {}))


def step(name, precision="float32", tesla=False):
    """Operators of a step of the network: its gradient, and that gradient's derivative."""
    model = models.build(name, 3, 10, (32, 32), generator=torch.Generator().manual_seed(0))
    operations = operations_of(model, torch.zeros(2, 3, 32, 32), training=False)
    stepper = FusedStepper(PrivateModel(model, torch.empty(())), operations, precision)
    size = sum(p.numel() for p in model.parameters())
    wanted = Wanted(not tesla, True, False)
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        theta, direction = (torch.empty(size, device="cuda") for _ in range(2))
        x, y = torch.empty(BATCH, 3, 32, 32, device="cuda"), torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        counter.count.clear()
        stepper.gradient(theta, x, y, wanted, "nothing")
        stepper.derivative(theta, x, y, None, direction, wanted)
    return counter.count


@pytest.mark.parametrize("name, most", [("ConvNet", 83), ("ConvNetBN", 83), ("ConvNetD4", 98), ("ResNet18", 417)])
def test_operators_of_a_step(name, most):
    """A change that needs more launches has to say so here. "ConvNet" is three blocks of 128 channels."""
    count = step(name)
    assert sum(count.values()) <= most, count


def test_no_operator_writes_by_index():
    """index_put_ sorts its indices on a GPU, in a dozen launches."""
    count = step("ConvNet") + step("ConvNet", "bfloat16") + step("ConvNet", tesla=True)
    assert not [name for name in count if "index_put" in name or "scatter" in name]
