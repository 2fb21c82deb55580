"""trajectory_distance against the same formula in plain PyTorch: forward + backward at 10 million parameters.

The gradient is with respect to the student, as in matching training trajectories. Bytes that have to move: all three
vectors are read on the way forward; student and target are read and the gradient is written on the way back.
"""

import torch

from bench.peaks import copy_rate
from bench.timing import Setting, alternate, rotations, threads
from selmatch_ext import trajectory_distance

PASSES = 6  # over memory of one vector's size


def eager(student, start, target):
    """The formula as distillation code writes it."""
    pairs = list(zip(student, start, target, strict=True))
    numerator = sum((s - t).pow(2).sum() for s, _, t in pairs)
    return numerator / sum((a - t).pow(2).sum() for _, a, t in pairs)


def _both_ways(function, lists):
    return torch.autograd.grad(function(*lists), lists[0])


def _case(setting, shapes, dtype):
    options = {"generator": setting.generator(), "device": setting.device, "dtype": dtype}
    nbytes = sum(torch.Size(s).numel() for s in shapes) * dtype.itemsize

    def made():
        lists = [[torch.randn(s, **options) for s in shapes] for _ in range(3)]
        lists[0] = [x.requires_grad_() for x in lists[0]]
        return lists

    sets = [made() for _ in range(rotations(setting, 3 * nbytes))]
    for got, want in zip(_both_ways(trajectory_distance, sets[0]), _both_ways(eager, sets[0]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-9)
    functions = {"fused": trajectory_distance, "eager": eager}
    calls = {name: [lambda f=f, lists=lists: _both_ways(f, lists) for lists in sets] for name, f in functions.items()}
    seconds = alternate(setting, calls, in_a_row=5)
    share = PASSES * nbytes / seconds["fused"] / copy_rate(setting)
    return {**seconds, "speedup": seconds["eager"] / seconds["fused"], "share_of_copy": share}


def run(setting: Setting) -> dict:
    """Seconds by case ("flat" or a list of 100 tensors of the same total, by dtype) and how many times faster."""
    count = setting.size(10_000_000, 10_000_000, 10_000)
    shapes = {"flat": [(count,)], "list of 100": [(count // 10_000, 100)] * 100}
    cases = {}
    with threads():
        for name, sizes in shapes.items():
            for dtype in (torch.float32, torch.float64):
                cases[f"{name}, {str(dtype).removeprefix('torch.')}"] = _case(setting, sizes, dtype)
    least = min(case["speedup"] for case in cases.values())
    return {"device": setting.device, "parameters": count, "cases": cases, "least_speedup": least}


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    return [
        (
            f"forward + backward, {name}",
            f"{case['speedup']:.1f}x eager, {case['share_of_copy']:.0%} of a copy's bandwidth",
            "at least 2x",
        )
        for name, case in result["cases"].items()
    ]
