"""What a matching step costs: peak memory against the number of inner steps, and time per inner step.

    python -m bench.unroll [--device cuda]

One matching step is N inner steps of the network and the gradient of the matching loss with respect to the images and
the learning rate. Peak memory is measured in a fresh process for each number: on the CPU the highest resident size
(VmHWM) minus the resident size (VmRSS) after everything is imported and built and before the step, on a GPU what torch
had allocated at most, less what it had before.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from bench.timing import alternate, threads
from selmatch_ext import models
from selmatch_ext.models.flat import flatten
from selmatch_ext.unroll import unrolled_sgd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python_tests"))
from reference import unrolled_sgd_full_graph  # noqa: E402

THREADS = 2
NETWORK, BATCH, CLASSES = "ConvNet", 50, 10  # width 128, depth 3, instance norm, 32x32
TIMED_STEPS = 8
STEPS = {"autograd": (4, 8, 16, 32), "full graph": (4, 8, 32)}

# What is compared; an engine of unrolled_sgd is one more line here and in STEPS.
RUNS = {"autograd": partial(unrolled_sgd, engine="autograd"), "full graph": unrolled_sgd_full_graph}


class Problem:
    """One matching step at the size of the papers: 10 images a class, batches of 50."""

    def __init__(self, device):
        generator = torch.Generator().manual_seed(0)
        self.model = models.build(NETWORK, 3, CLASSES, 32, generator=generator).to(device)
        self.start = flatten(self.model.parameters()).detach()
        self.target = self.start + 0.01 * torch.randn(self.start.shape, generator=generator).to(device)
        self.images = torch.randn(2 * BATCH, 3, 32, 32, generator=generator).to(device).requires_grad_()
        self.labels = torch.arange(2 * BATCH, device=device) % CLASSES
        self.lr = torch.tensor(0.01, device=device, requires_grad=True)
        self.batches = torch.randperm(2 * BATCH, generator=generator).to(device).split(BATCH)

    def step(self, run, steps):
        """The gradient of the matching loss with respect to images and learning rate."""
        batches = [self.batches[i % 2] for i in range(steps)]
        theta = run(self.model, self.start, self.images, self.labels, batches, self.lr)
        loss = (theta - self.target).square().sum() / (self.start - self.target).square().sum()
        return torch.autograd.grad(loss, [self.images, self.lr])


def _resident(key):
    """VmRSS or VmHWM of this process in MB. Not ru_maxrss, which a child process starts with its parent's size in."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1]) / 1024


def _peak(name, steps, device):
    """Peak memory of one matching step in this process, in MB."""
    problem = Problem(device)
    with threads(THREADS):
        if torch.device(device).type == "cuda":
            before = torch.cuda.memory_allocated(device)
            problem.step(RUNS[name], steps)
            return (torch.cuda.max_memory_allocated(device) - before) / 2**20
        before = _resident("VmRSS")
        problem.step(RUNS[name], steps)
        return _resident("VmHWM") - before


def _fresh_peak(name, steps, device):
    command = [sys.executable, "-W", "ignore", "-m", "bench.unroll", "--device", device, "--peak", name, str(steps)]
    return float(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _seconds(problem):
    """Seconds per inner step of each run, the runs taking turns in this process."""
    calls = {name: partial(problem.step, run, TIMED_STEPS) for name, run in RUNS.items()}
    with threads(THREADS):
        return {name: s / TIMED_STEPS for name, s in alternate(calls, repeats=5, warmup=1).items()}


def run(device: str = "cpu") -> dict:
    """Peak memory in MB by run and number of steps, seconds per inner step, and the two figures that have a goal."""
    peak = {name: {n: _fresh_peak(name, n, device) for n in steps} for name, steps in STEPS.items()}
    problem = Problem(device)
    ours, few, many = peak["autograd"], STEPS["autograd"][0], STEPS["autograd"][-1]
    kept = (many - few) * problem.start.numel() * 4 / 2**20  # the parameters of the further steps
    return {
        "device": device,
        "threads": THREADS,
        "network": f"{NETWORK} (width 128, depth 3, instance norm), batch {BATCH}, 3x32x32",
        "peak_mb": peak,
        "kept_mb": kept,
        "seconds_per_step": _seconds(problem),
        "growth": (ours[many] - kept) / ours[few],
        "share_of_full_graph": ours[many] / peak["full graph"][many],
    }


def show(result: dict) -> str:
    """The figures as a table."""
    columns = sorted({n for peaks in result["peak_mb"].values() for n in peaks})
    lines = [
        f"one matching step, {result['network']}, {result['threads']} threads",
        f"{'peak memory, MB':<18}" + "".join(f"{f'N = {n}':>9}" for n in columns) + f"{'s per inner step':>19}",
    ]
    for name, peaks in result["peak_mb"].items():
        cells = "".join(f"{peaks[n]:>9.0f}" if n in peaks else f"{'':>9}" for n in columns)
        lines.append(f"{name:<18}{cells}{result['seconds_per_step'][name]:>19.3f}")
    return "\n".join(
        [
            *lines,
            f"{columns[-1]} steps against {columns[0]}, less what is kept: {result['growth']:.2f} (goal: <= 1.25)",
            f"share of the full graph's memory: {result['share_of_full_graph']:.3f} (goal: <= 0.1)",
        ]
    )


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    return [
        ("memory of 32 steps over that of 4, less what is kept", f"{result['growth']:.2f}x", "at most 1.25x"),
        ("share of the full graph's memory, 32 steps", f"{result['share_of_full_graph']:.3f}", "at most 0.1"),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=2, metavar=("RUN", "STEPS"), help="only print one run's peak memory in MB")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    if options.peak:
        print(_peak(options.peak[0], int(options.peak[1]), options.device))
    else:
        result = run(options.device)
        print(json.dumps(result, indent=1) if options.json else show(result))
