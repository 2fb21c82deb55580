"""What runs on a device against float64 on the CPU, at small sizes: the fused engine with every norm, option and
precision, training, blocks; and that no step waits for the GPU. Most of it also runs on the CPU."""

import copy
from collections import Counter

import pytest
import torch
from conftest import DEVICES
from torch.nn import functional as F

from bench import checks
from selmatch_ext import models
from selmatch_ext.fused.training import fast
from selmatch_ext.models.flat import flatten
from selmatch_ext.precision import is_slow, precision_scope

ON_CPU = checks.engine_cases(gpu=False)
GPU_ALONE = [case for case in checks.engine_cases(gpu=True) if case not in ON_CPU]


@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_engine(case, device):
    found = checks.check_engine(case, device, small=True)
    assert found["passed"], found


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_ALONE, ids=str)
def test_engine_with_what_a_gpu_alone_has(case):
    found = checks.check_engine(case, "cuda", small=True)
    assert found["passed"], found


def test_every_option_is_there_with_every_norm():
    for cases, precisions in ((ON_CPU, {"float32", "bfloat16"}), (GPU_ALONE, {"float32", "bfloat16", "tf32"})):
        assert {(c.norm, c.precision) for c in cases} == {(n, p) for n in checks.NORMS for p in precisions}
    options = Counter((c.norm, c.keep, c.gradient, c.soft, c.augmented) for c in ON_CPU)
    assert len(options) == 6 * len(checks.NORMS)


def test_a_wrong_gradient_does_not_pass(monkeypatch):
    case = checks.EngineCase("IN", torch.float64)
    expected = checks._expected
    monkeypatch.setattr(checks, "_expected", lambda *key: {n: g * (1 + 1e-6) for n, g in expected(*key).items()})
    assert not checks.check_engine(case, "cpu", small=True)["passed"]


@pytest.mark.parametrize("case", checks.block_cases(checks.SMALL_SHAPES), ids=str)
def test_blocks(case, device):
    for found in checks.check_block(case, device):
        assert found["passed"], found


@pytest.mark.gpu
@pytest.mark.parametrize("case", checks.block_cases(checks.REAL_SHAPES), ids=str)
def test_blocks_at_real_sizes(case):
    for found in checks.check_block(case, "cuda"):
        assert found["passed"], found


@pytest.mark.parametrize("norm", checks.NORMS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", pytest.param("tf32", marks=pytest.mark.gpu)])
def test_training(norm, precision, device):
    if precision == "tf32" and device == "cpu":
        pytest.skip("TF32 is of GPUs")
    found = checks.check_training(norm, precision, device)
    assert found["passed"], found


@pytest.mark.parametrize("name", ["ConvNetD2W32", "ConvNetD2W32BN", "ConvNetD2W8LNASwishMP"])
def test_the_fast_path_of_training(name, device):
    """Loss, gradients and running statistics of `fast` against those of the module itself."""
    draw = torch.Generator().manual_seed(0)
    plain = models.build(name, 3, 5, 16, generator=draw).to(device)
    copied = copy.deepcopy(plain)
    x, y = torch.randn(12, 3, 16, 16, generator=draw).to(device), torch.randint(5, (12,), generator=draw).to(device)
    network = fast(copied, x)
    assert network is not copied
    losses = []
    with precision_scope("float32", torch.device(device)):
        for run in (plain, network):
            losses.append(F.cross_entropy(run(x), y))
            losses[-1].backward()
    assert abs(losses[0] - losses[1]) < 1e-5
    gradients = [flatten([p.grad for p in m.parameters()]) for m in (plain, copied)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    for a, b in zip(plain.buffers(), copied.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_no_step_waits_for_the_device(graphs, device):
    if graphs and device == "cpu":
        pytest.skip("CUDA graphs are of GPUs")
    case = checks.EngineCase("IN", torch.float32, augmented=True, graphs=graphs)
    found = checks.check_synchronization(case, device, small=True)
    assert found["passed"], found


@pytest.mark.gpu
def test_a_step_that_waits_is_noticed():
    with pytest.raises(RuntimeError, match="synchroniz"), checks.no_synchronization("cuda"):
        torch.ones(3, device="cuda").sum().item()
    assert checks._waits(lambda: torch.ones(3, device="cuda").sum().item(), "cuda") >= 1
    assert not is_slow(torch.device("cuda"))
