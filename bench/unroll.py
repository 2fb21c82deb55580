"""What a matching step costs: time per inner step, peak memory against the number of inner steps, and exactness.

    python -m bench.unroll --plot FILE.png [--figures FILE.json]      the peak memory in figures of `python -m bench`

Memory is left as PyTorch leaves it, on both sides (kept_memory.py has a process that keeps what it frees).
One matching step is N inner steps of the network and the gradient of the matching loss with respect to the images and
the learning rate. The full graph is what public code does: autograd through all N steps. Every comparison has one
precision on both sides: IEEE float32, TF32 (on a GPU) or bfloat16 (torch's autocast for the full graph). The fused
engine is called through `UnrolledSGD`, which keeps what it read of the network, and its CUDA graphs, between calls.

The rate of an inner step is that of the fused engine's convolutions as direct sums: 11 of the size of a forward
convolution (10 where their results are kept, as always in the last step but with CUDA graphs, 9 where all is), 8 for
the first layer; its share is of the peak in that precision.

Peak memory on the CPU is measured in a fresh process for each number: the highest resident size (VmHWM) minus the
resident size (VmRSS) after everything is imported and built and before the step. On a GPU it is what torch's allocator
had allocated, and reserved, at most in two steps, less what was allocated and reserved before. Exactness is that of the
images' gradient, against float64, on scikit-learn's digits enlarged to 3 x 32 x 32 (random images where scikit-learn is
not installed), towards parameters trained for as many steps on other images.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.convolutions import forward_flops, layers
from bench.peaks import NAMES, precisions, product_rate
from bench.timing import Setting, alternate, threads
from selmatch_ext import models
from selmatch_ext.models.flat import flatten
from selmatch_ext.precision import precision_scope
from selmatch_ext.unroll import UnrolledSGD

KEEPS_MEMORY = False
ROOT = Path(__file__).resolve().parent.parent
CLASSES, EXACT_LR = 10, 0.01
FULL, FUSED = "full graph", "fused"
KINDS = {
    "autograd": {"engine": "autograd"},
    FUSED: {"engine": "fused"},
    "fused, keep": {"engine": "fused", "keep": "activations"},
    "fused, keep all": {"engine": "fused", "keep": "all"},
    "TESLA": {"engine": "fused", "gradient": "tesla"},
    "fused, CUDA graphs": {"engine": "fused", "cuda_graphs": True},
    "fused, keep, CUDA graphs": {"engine": "fused", "keep": "activations", "cuda_graphs": True},
}


def networks(setting: Setting) -> dict[str, str]:
    """By norm."""
    if setting.quick:
        return {"instance norm": "ConvNetD2W8", "batch norm": "ConvNetD2W8BN"}
    return {"instance norm": "ConvNet", "batch norm": "ConvNetBN"}  # width 128, depth 3


def batch_of(setting: Setting) -> int:
    return setting.size(50, 125, 5)


def side_of(setting: Setting) -> int:
    return setting.size(32, 32, 8)


def runs(setting: Setting) -> list[tuple[str, str]]:
    """(kind, precision) of everything that is timed."""
    found = []
    for precision in precisions(setting):
        kinds = [FULL, FUSED, "fused, keep", "fused, keep all"]
        kinds += ["fused, CUDA graphs", "fused, keep, CUDA graphs"] * setting.gpu
        found += [(kind, precision) for kind in kinds + ["autograd", "TESLA"] * (precision == "float32")]
    return found


class Problem:
    """One matching step at the size of the papers: batches of half of the images."""

    def __init__(self, setting, network, images=None, labels=None, dtype=torch.float32):
        self.device, side, batch = torch.device(setting.device), side_of(setting), batch_of(setting)
        generator = torch.Generator().manual_seed(0)
        self.model = models.build(network, 3, CLASSES, side, generator=generator).to(self.device, dtype)
        self.start = flatten(self.model.parameters()).detach()
        self.target = self.start + 0.01 * torch.randn(self.start.shape, generator=generator).to(self.start)
        if images is None:
            images = torch.randn(2 * batch, 3, side, side, generator=generator)
            labels = torch.arange(2 * batch) % CLASSES
        self.images, self.labels = images.to(self.device, dtype).requires_grad_(), labels.to(self.device)
        self.lr = torch.tensor(EXACT_LR, device=self.device, dtype=dtype, requires_grad=True)
        order = torch.randperm(len(images), generator=generator).to(self.device)
        self.batches = order.split(len(images) // 2)[:2]
        self.known = {}

    def unrolled(self, *run):
        """The function that runs the inner steps, and the scope that its backward pass runs in; the same ones at each
        call, and gone with the problem."""
        if run not in self.known:
            self.known[run] = self._unrolled(*run)
        return self.known[run]

    def _unrolled(self, kind, precision):
        if kind != FULL:
            return UnrolledSGD(self.model, precision=precision, **KINDS[kind]), contextlib.nullcontext

        from reference import unrolled_sgd_full_graph

        def full(*arguments):
            with precision_scope(precision, self.device):
                return unrolled_sgd_full_graph(self.model, *arguments)

        return full, partial(precision_scope, "tf32" if precision == "tf32" else "float32", self.device)

    def student(self, kind, precision, steps):
        batches = [self.batches[i % 2] for i in range(steps)]
        return self.unrolled(kind, precision)[0](self.start, self.images, self.labels, batches, self.lr)

    def step(self, kind, precision, steps):
        """The gradient of the matching loss with respect to images and learning rate."""
        theta = self.student(kind, precision, steps)
        with self.unrolled(kind, precision)[1]():
            loss = (theta - self.target).square().sum() / (self.start - self.target).square().sum()
            return torch.autograd.grad(loss, [self.images, self.lr])


def label(kind: str, precision: str) -> str:
    return f"{kind}, {NAMES[precision]}"


# --- memory -----------------------------------------------------------------------------------------------------------


def resident(key):
    """VmRSS or VmHWM of this process in MB. Not ru_maxrss, which a child process starts with its parent's size in."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key)).split()[1]) / 1024


def _peak_here(setting, network, kind, precision, steps):
    """Peak memory of one matching step in this process, on the CPU, in MB."""
    problem = Problem(setting, network)
    with threads():
        before = resident("VmRSS")
        problem.step(kind, precision, steps)
        return resident("VmHWM") - before


def _peak(setting, network, kind, precision, steps):
    """{"allocated": MB} of one matching step, on a GPU {"allocated": MB, "reserved": MB}."""
    if not setting.gpu:
        command = [sys.executable, "-W", "ignore", "-m", "bench.unroll", "--peak", network, kind, precision, str(steps)]
        command += ["--quick"] * setting.quick
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return {"allocated": float(result.stdout)}
    gc.collect()
    torch.cuda.empty_cache()
    problem = Problem(setting, network)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):  # the second has the graphs of the first
            problem.step(kind, precision, steps)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError as error:
        setting.notes.append(f"unroll: {label(kind, precision)} with {steps} steps needs more memory than there is")
        return {"error": str(error).splitlines()[0]}
    peak = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {k: (p - b) / 2**20 for k, p, b in zip(("allocated", "reserved"), peak, before, strict=True)}


def _memory(setting):
    """By run and number of steps."""
    few, many = setting.size((4, 32), (4, 55), (1, 2))
    cases = [(kind, "float32") for kind in (FULL, FUSED, "fused, keep", "fused, keep all")]
    if setting.gpu:
        cases = [case for case in runs(setting) if case[0] not in ("autograd", "TESLA")]
    elif setting.quick:
        cases, few = cases[1:2], 2  # a process each, which takes seconds to start
    network = networks(setting)["instance norm"]
    return {label(*case): {n: _peak(setting, network, *case, n) for n in sorted({few, many})} for case in cases}


# --- time -------------------------------------------------------------------------------------------------------------


def step_flops(setting: Setting, kind: str, steps: int) -> float:
    """Of the fused engine's convolutions in one of `steps` inner steps, as direct sums."""
    first, *others = layers(*setting.size((128, 3), (128, 3), (8, 2)), side_of(setting))
    times = 9 if "keep all" in kind else 10 if "keep" in kind else 11
    if times == 11 and "CUDA graphs" not in kind:
        times -= 1 / steps
    batch = batch_of(setting)
    return 8 * forward_flops(batch, first) + times * sum(forward_flops(batch, layer) for layer in others)


def _seconds(setting, network):
    """Seconds per inner step of each run, the runs taking turns in this process; those of the fused engine with their
    rate."""
    steps = setting.size(8, 55, 2)
    problem = Problem(setting, network)
    calls = {run: partial(problem.step, *run, steps) for run in runs(setting)}
    with threads():
        found = alternate(setting, calls, repeats=setting.size(4, 3, 1), warmup=1, graphs=False)
    cases = {}
    for (kind, precision), seconds in found.items():
        case = {"seconds": seconds / steps, "speedup": found[FULL, precision] / seconds}
        if kind.startswith(FUSED):
            rate = step_flops(setting, kind, steps) / case["seconds"]
            case |= {"flops": rate, "share_of_peak": rate / product_rate(setting, precision)}
        cases[label(kind, precision)] = case
    return cases


def _compiled(setting):
    """Why the full graph is not measured under torch.compile, or that it can be."""
    problem = Problem(Setting(quick=True), networks(Setting(quick=True))["instance norm"])
    problem.model = torch.compile(problem.model, backend="aot_eager")
    try:
        theta = problem.student(FULL, "float32", 1)
        torch.autograd.grad(theta.sum(), problem.images)
    except Exception as error:
        return f"does not work: {str(error).strip().splitlines()[0]:.60}..."
    return "works"


# --- exactness --------------------------------------------------------------------------------------------------------


def _images(setting, part, dtype):
    """Images and labels, 10 or fewer a class; part: 0 or 1, those that are matched and those of the target."""
    each, side = setting.size(10, 10, 1), side_of(setting)
    labels = torch.arange(CLASSES).repeat_interleave(each)
    try:
        from selmatch_ext.data.load import load

        data = load("digits")
    except ImportError:
        draw = torch.Generator().manual_seed(1 + part)
        return torch.randn(len(labels), 3, side, side, generator=draw).to(dtype), labels
    places = [(data.train.labels == c).nonzero().squeeze(1)[part * each : (part + 1) * each] for c in range(CLASSES)]
    images = data.normalize(data.train.images[torch.cat(places)]).to(dtype)
    return F.interpolate(images, size=side, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), labels


def _exactness(setting, network):
    """For each run: relative error and cosine of the images' gradient against float64."""
    steps = setting.size(20, 20, 2)
    with torch.no_grad():
        other = Problem(setting, network, *_images(setting, 1, torch.float64), torch.float64)
        target = other.student(FUSED, "float32", steps)
    exact = Problem(setting, network, *_images(setting, 0, torch.float64), torch.float64)
    exact.target = target
    expected = exact.step(FULL, "float32", steps)[0].flatten()
    problem = Problem(setting, network, *_images(setting, 0, torch.float32))
    problem.target = target.float()
    result = {}
    for kind, precision in [run for run in runs(setting) if run[0] in (FULL, FUSED, "TESLA")]:
        found = problem.step(kind, precision, steps)[0].flatten().double()
        error = (found - expected).norm() / expected.norm()
        cosine = F.cosine_similarity(found, expected, dim=0)
        result[label(kind, precision)] = {"error": error.item(), "cosine": cosine.item()}
    return result


def run(setting: Setting) -> dict:
    """Seconds per inner step and exactness by network and run; peak memory in MB by run and number of steps."""
    named = networks(setting)
    peak = _memory(setting)
    return {
        "device": setting.device,
        "batch": batch_of(setting),
        "peak_mb": peak,
        "parameters_mb": Problem(setting, named["instance norm"]).start.nbytes / 2**20,
        "steps": {norm: _seconds(setting, name) for norm, name in named.items()},
        "exactness": {norm: _exactness(setting, name) for norm, name in named.items()},
        "compile": _compiled(setting),
    }


def _memory_rows(peak, vector):
    """vector: MB of the parameters, of which each step keeps one."""
    rows = []
    for name, found in peak.items():
        figures = [
            f"{n}: " + ", ".join(f"{v:.0f}" if k != "error" else "-" for k, v in c.items()) for n, c in found.items()
        ]
        rows.append((f"peak memory in MB by steps, {name}", "; ".join(figures), ""))
    ours, full = peak[label(FUSED, "float32")], peak.get(label(FULL, "float32"), {})
    few, many = min(ours, key=int), max(ours, key=int)
    if few != many and "error" not in ours[many]:
        growth = (ours[many]["allocated"] - (int(many) - int(few)) * vector) / ours[few]["allocated"]
        what = f"memory of {many} steps over that of {few}, less the parameters that are kept"
        rows.append((what, f"{growth:.2f}x", "at most 1.25x"))
    if "allocated" in ours[many] and "allocated" in full.get(many, {}):
        share = ours[many]["allocated"] / full[many]["allocated"]
        rows.append((f"share of the full graph's memory, {many} steps", f"{share:.3f}", "at most 0.1"))
    return rows


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    goals = {"instance norm": "at least 2.8x, 100 %", "batch norm": "at least 4x, 100 %"}
    rows = []
    for norm, cases in result["steps"].items():
        for name, case in cases.items():
            figure = f"{1e3 * case['seconds']:.2f} ms, {case['speedup']:.2f}x"
            if "flops" in case:
                figure += f", {case['flops'] / 1e9:.0f} GFLOP/s = {case['share_of_peak']:.0%} of the peak"
            goal = goals[norm] if name == label(FUSED, "float32") else ""
            rows.append((f"inner step, {norm}, {name}", figure, goal))
        for name, exact in result["exactness"][norm].items():
            goal = "cosine at least 0.99" if "bfloat16" in name and name.startswith(FUSED) else ""
            figure = f"error {exact['error']:.1e}, cosine {exact['cosine']:.4f}"
            rows.append((f"images' gradient against float64, {norm}, {name}", figure, goal))
    rows += _memory_rows(result["peak_mb"], result["parameters_mb"])
    return [*rows, ("the full graph under torch.compile", result["compile"], "")]


def plot(result: dict, path: str) -> None:
    """Peak memory against the number of inner steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, peaks in result["peak_mb"].items():
        shown = name.removesuffix(", IEEE float32")
        axes.plot([int(n) for n in peaks], [p["allocated"] for p in peaks.values()], marker="o", label=shown)
    axes.set(xlabel="inner steps", ylabel="peak memory, MB", yscale="log", title="one matching step, ConvNet width 128")
    axes.set_yticks([200, 500, 1000, 2000, 5000])
    axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", nargs=4, metavar=("NETWORK", "KIND", "PRECISION", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plot", metavar="PNG", help="draw peak memory against the number of inner steps")
    parser.add_argument("--figures", metavar="JSON", default="bench/results/cpu.json", help="of python -m bench")
    options = parser.parse_args()
    if options.peak:
        network, kind, precision, steps = options.peak
        print(_peak_here(Setting(quick=options.quick), network, kind, precision, int(steps)))
    elif options.plot:
        plot(json.loads(Path(options.figures).read_text())["unroll"], options.plot)
    else:
        parser.error("python -m bench unroll measures; here is --plot")
