"""trajectory_distance against the same formula in plain PyTorch: forward + backward at 10 million parameters.

    python -m bench.distance [--device cuda]

The gradient is with respect to the student, as in matching training trajectories.
"""

import argparse
import json

import torch

from bench.timing import alternate, keep_memory, machine, threads
from selmatch_ext import trajectory_distance

PARAMETERS = 10_000_000
THREADS = 2
SHAPES = {"flat": [(PARAMETERS,)], "list of 100": [(1000, 100)] * 100}


def eager(student, start, target):
    """The formula as distillation code writes it."""
    pairs = list(zip(student, start, target, strict=True))
    numerator = sum((s - t).pow(2).sum() for s, _, t in pairs)
    return numerator / sum((a - t).pow(2).sum() for _, a, t in pairs)


def _case(shapes, dtype, device):
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(s, dtype=dtype, generator=generator).to(device) for s in shapes] for _ in range(3)]
    student = [x.requires_grad_() for x in lists[0]]

    def both_ways(function):
        return lambda: torch.autograd.grad(function(*lists), student)

    seconds = alternate({"fused": both_ways(trajectory_distance), "eager": both_ways(eager)}, calls=5)
    for got, want in zip(both_ways(trajectory_distance)(), both_ways(eager)(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-9)
    return seconds


def run(device: str = "cpu") -> dict:
    """Seconds by case ("flat" or a list of 100 tensors of the same total, by dtype) and how many times faster."""
    keep_memory()
    cases = {}
    with threads(THREADS):
        for name, shapes in SHAPES.items():
            for dtype in (torch.float32, torch.float64):
                seconds = _case(shapes, dtype, device)
                label = f"{name}, {str(dtype).removeprefix('torch.')}"
                cases[label] = {**seconds, "speedup": seconds["eager"] / seconds["fused"]}
    slowest = min(case["speedup"] for case in cases.values())
    return {
        "machine": machine(),
        "device": device,
        "threads": THREADS,
        "parameters": PARAMETERS,
        "cases": cases,
        "least_speedup": slowest,
    }


def show(result: dict) -> str:
    """The figures as a table."""
    state = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value)
    lines = [
        f"trajectory distance, forward + backward, {result['parameters']:,} parameters, {result['threads']} threads",
        f"on {result['device']} ({state})",
        f"{'':<24}{'fused':>10}{'eager':>10}{'faster':>9}",
    ]
    for name, case in result["cases"].items():
        lines.append(f"{name:<24}{1e3 * case['fused']:>7.1f} ms{1e3 * case['eager']:>7.1f} ms{case['speedup']:>8.1f}x")
    return "\n".join(lines)


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    return [
        (f"forward + backward, {name}", f"{case['speedup']:.1f}x eager", "at least 2x")
        for name, case in result["cases"].items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    result = run(options.device)
    print(json.dumps(result, indent=1) if options.json else show(result))
