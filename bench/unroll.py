"""What a matching step costs: time per inner step, peak memory against the number of inner steps, and exactness.

    python -m bench.unroll [--device cuda] [--plot FILE.png]

One matching step is N inner steps of the network and the gradient of the matching loss with respect to the images and
the learning rate. The full graph is what public code does: autograd through all N steps. Peak memory is measured in a
fresh process for each number: on the CPU the highest resident size (VmHWM) minus the resident size (VmRSS) after
everything is imported and built and before the step, on a GPU what torch had allocated at most, less what it had
before. Exactness is that of the images' gradient, against float64, on scikit-learn's digits enlarged to 3 x 32 x 32,
towards parameters trained for as many steps on other digits.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.timing import alternate, machine, threads
from selmatch_ext import models
from selmatch_ext.data.load import load
from selmatch_ext.models.flat import flatten
from selmatch_ext.unroll import unrolled_sgd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python_tests"))
from reference import unrolled_sgd_full_graph  # noqa: E402

THREADS = 2
NETWORKS = {"instance norm": "ConvNet", "batch norm": "ConvNetBN"}  # width 128, depth 3
BATCH, CLASSES = 50, 10
TIMED_STEPS = 8
EXACT_STEPS, EXACT_LR = 20, 0.01

FULL, FUSED = "full graph", "fused"
RUNS = {
    FULL: unrolled_sgd_full_graph,
    "autograd": partial(unrolled_sgd, engine="autograd"),
    FUSED: partial(unrolled_sgd, engine="fused"),
    "fused, keep": partial(unrolled_sgd, engine="fused", keep="activations"),
    "bfloat16": partial(unrolled_sgd, engine="fused", precision="bfloat16"),
    "bfloat16, keep": partial(unrolled_sgd, engine="fused", precision="bfloat16", keep="activations"),
    "TESLA": partial(unrolled_sgd, engine="fused", gradient="tesla"),
}
GRAPHS = {"fused, CUDA graphs": partial(unrolled_sgd, engine="fused", cuda_graphs=True)}  # on a GPU alone
STEPS = {FULL: (4, 8, 32), "autograd": (4, 32), FUSED: (4, 8, 32), "fused, keep": (4, 32), "bfloat16": (4, 32)}
EXACT = (FULL, FUSED, "bfloat16", "TESLA")  # what is kept changes nothing


class Problem:
    """One matching step at the size of the papers: 10 images a class, batches of 50."""

    def __init__(self, network, device, images=None, labels=None, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.model = models.build(network, 3, CLASSES, 32, generator=generator).to(device, dtype)
        self.start = flatten(self.model.parameters()).detach()
        self.target = self.start + 0.01 * torch.randn(self.start.shape, generator=generator).to(self.start)
        if images is None:
            images = torch.randn(2 * BATCH, 3, 32, 32, generator=generator)
            labels = torch.arange(2 * BATCH) % CLASSES
        self.images, self.labels = images.to(device, dtype).requires_grad_(), labels.to(device)
        self.lr = torch.tensor(EXACT_LR, device=device, dtype=dtype, requires_grad=True)
        self.batches = torch.randperm(2 * BATCH, generator=generator).to(device).split(BATCH)

    def student(self, run, steps):
        batches = [self.batches[i % 2] for i in range(steps)]
        return run(self.model, self.start, self.images, self.labels, batches, self.lr)

    def step(self, run, steps):
        """The gradient of the matching loss with respect to images and learning rate."""
        theta = self.student(run, steps)
        loss = (theta - self.target).square().sum() / (self.start - self.target).square().sum()
        return torch.autograd.grad(loss, [self.images, self.lr])


# --- memory -----------------------------------------------------------------------------------------------------------


def _resident(key):
    """VmRSS or VmHWM of this process in MB. Not ru_maxrss, which a child process starts with its parent's size in."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1]) / 1024


def _peak(network, name, steps, device):
    """Peak memory of one matching step in this process, in MB."""
    problem = Problem(network, device)
    with threads(THREADS):
        if torch.device(device).type == "cuda":
            before = torch.cuda.memory_allocated(device)
            problem.step(RUNS[name], steps)
            return (torch.cuda.max_memory_allocated(device) - before) / 2**20
        before = _resident("VmRSS")
        problem.step(RUNS[name], steps)
        return _resident("VmHWM") - before


def _fresh_peak(network, name, steps, device):
    command = [sys.executable, "-W", "ignore", "-m", "bench.unroll", "--device", device, "--peak", network, name]
    result = subprocess.run([*command, str(steps)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout)


# --- time -------------------------------------------------------------------------------------------------------------


def _seconds(network, device):
    """Seconds per inner step of each run, the runs taking turns in this process."""
    problem = Problem(network, device)
    runs = RUNS | (GRAPHS if torch.device(device).type == "cuda" else {})
    calls = {name: partial(problem.step, run, TIMED_STEPS) for name, run in runs.items()}
    with threads(THREADS):
        return {name: s / TIMED_STEPS for name, s in alternate(calls, repeats=4, warmup=1).items()}


def _compiled():
    """Why the full graph is not measured under torch.compile, or that it can be."""
    problem = Problem("ConvNetW16D2", "cpu")
    problem.model = torch.compile(problem.model, backend="aot_eager")
    try:
        theta = problem.student(unrolled_sgd_full_graph, 1)
        torch.autograd.grad(theta.sum(), problem.images)
    except Exception as error:
        return f"does not work: {str(error).strip().splitlines()[0]}"
    return "works"


# --- exactness --------------------------------------------------------------------------------------------------------


def _digits(skip, dtype):
    """100 digits, 10 a class, as 3 x 32 x 32 images."""
    data = load("digits")
    chosen = [(data.train.labels == c).nonzero().squeeze(1)[skip : skip + 10] for c in range(CLASSES)]
    chosen = torch.cat(chosen)
    images = data.normalize(data.train.images[chosen]).to(dtype)
    return F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), data.train.labels[chosen]


def _exactness(network, device):
    """For each run: relative error and cosine of the images' gradient against float64."""
    other = Problem(network, device, *_digits(10, torch.float64), torch.float64)
    with torch.no_grad():
        target = other.student(RUNS[FUSED], EXACT_STEPS)
    exact = Problem(network, device, *_digits(0, torch.float64), torch.float64)
    exact.target = target
    expected = exact.step(RUNS[FULL], EXACT_STEPS)[0].flatten()
    result = {}
    for name in EXACT:
        problem = Problem(network, device, *_digits(0, torch.float32))
        problem.target = target.float()
        found = problem.step(RUNS[name], EXACT_STEPS)[0].flatten().double()
        error = (found - expected).norm() / expected.norm()
        result[name] = {"error": error.item(), "cosine": F.cosine_similarity(found, expected, dim=0).item()}
    return result


def run(device: str = "cpu") -> dict:
    """Seconds per inner step and exactness by network and run; peak memory in MB by run and number of steps."""
    network = NETWORKS["instance norm"]
    peak = {name: {n: _fresh_peak(network, name, n, device) for n in steps} for name, steps in STEPS.items()}
    seconds = {norm: _seconds(name, device) for norm, name in NETWORKS.items()}
    exactness = {norm: _exactness(name, device) for norm, name in NETWORKS.items()}
    kept = 28 * Problem(network, device).start.numel() * 4 / 2**20  # the parameters of 28 further steps
    ours = peak[FUSED]
    return {
        "machine": machine(),
        "device": device,
        "threads": THREADS,
        "batch": BATCH,
        "peak_mb": peak,
        "seconds_per_step": seconds,
        "speedup": {norm: {name: s[FULL] / s[name] for name in s} for norm, s in seconds.items()},
        "exactness": exactness,
        "compile": _compiled(),
        "growth": (ours[32] - kept) / ours[4],
        "share_of_full_graph": ours[32] / peak[FULL][32],
        "share_of_full_graph_keep": _growth(peak["fused, keep"]) / _growth(peak[FULL]),
    }


def _growth(peaks):
    """MB per inner step."""
    return (peaks[32] - peaks[4]) / 28


def show(result: dict) -> str:
    """The figures as a table."""
    columns = sorted({n for peaks in result["peak_mb"].values() for n in peaks})
    state = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value)
    lines = [
        f"one matching step, ConvNet, width 128, batch {result['batch']}, 3x32x32, {result['threads']} threads",
        state,
        f"{'peak memory, MB':<18}" + "".join(f"{f'N = {n}':>9}" for n in columns),
    ]
    for name, peaks in result["peak_mb"].items():
        lines.append(f"{name:<18}" + "".join(f"{peaks[n]:>9.0f}" if n in peaks else f"{'':>9}" for n in columns))
    for norm, seconds in result["seconds_per_step"].items():
        lines.append(f"{norm:<18}{'s per step':>12}{'faster':>9}{'error':>10}{'cosine':>9}  (N = {EXACT_STEPS})")
        for name, value in seconds.items():
            line = f"{name:<18}{value:>12.3f}{result['speedup'][norm][name]:>8.2f}x"
            exact = result["exactness"][norm].get(name)
            lines.append(line if exact is None else f"{line}{exact['error']:>10.1e}{exact['cosine']:>9.4f}")
    lines.append(f"the full graph under torch.compile: {result['compile']}")
    return "\n".join([*lines, *(f"{what}: {figure} ({goal})" for what, figure, goal in summary(result))])


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    goals = {
        ("instance norm", FUSED): 1.8,
        ("batch norm", FUSED): 2.2,
        ("instance norm", "bfloat16"): 4,
        ("batch norm", "bfloat16"): 4,
    }
    rows = [
        (f"{name} against the full graph, {norm}", f"{result['speedup'][norm][name]:.2f}x", f"at least {goal}x")
        for (norm, name), goal in goals.items()
    ]
    cosine = min(result["exactness"][norm]["bfloat16"]["cosine"] for norm in NETWORKS)
    return [
        *rows,
        ("memory of 32 steps over that of 4, less what is kept", f"{result['growth']:.2f}x", "at most 1.25x"),
        ("share of the full graph's memory, 32 steps", f"{result['share_of_full_graph']:.3f}", "at most 0.1"),
        ("the same of what a step keeps, keep", f"{result['share_of_full_graph_keep']:.3f}", "at most 0.143"),
        ("cosine of bfloat16's images' gradient", f"{cosine:.4f}", "at least 0.99"),
    ]


def plot(result: dict, path: str) -> None:
    """Peak memory against the number of inner steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, peaks in result["peak_mb"].items():
        axes.plot([int(n) for n in peaks], peaks.values(), marker="o", label=name)
    axes.set(xlabel="inner steps", ylabel="peak memory, MB", yscale="log", title="one matching step, ConvNet width 128")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", nargs=3, metavar=("NETWORK", "RUN", "STEPS"), help="only print one run's peak in MB")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plot", metavar="PNG", help="draw peak memory against the number of inner steps")
    options = parser.parse_args()
    if options.peak:
        network, name, steps = options.peak
        print(_peak(network, name, int(steps), options.device))
    else:
        result = run(options.device)
        if options.plot:
            plot(result, options.plot)
        print(json.dumps(result, indent=1) if options.json else show(result))
