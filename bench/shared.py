"""Trajectory matching on digits alone and beside two busy processes, with the command line's policy for OpenMP.

    python -m bench.shared [--repeats 3] [--default] [--spins 0 100 1000 10000]

60 iterations of MTT: ConvNetD2W32, N = 10, batches of 50. Each is run in a process of its own, as the runtime reads its
variables when it is loaded. --default also runs with the runtime's own policy, which takes long beside other processes;
--spins with other values of GOMP_SPINCOUNT, for the choice of the one in selmatch_ext/openmp.py.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.timing import Setting
from selmatch_ext import openmp

DEVICES = ("cpu",)
ITERATIONS, QUICK_ITERATIONS = 60, 1
BUSY = 2
GOAL = 2.5
OURS, DEFAULT = "command line", "default of the runtime"


def _environment(policy: str) -> dict[str, str]:
    """This process's environment with as many threads as the machine has cores and with that policy."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    if policy == DEFAULT:
        return own
    own |= openmp.wait_policy(own)
    return own if policy == OURS else own | {"GOMP_SPINCOUNT": policy.removeprefix("spin ")}


@contextlib.contextmanager
def _busy(count: int):
    """`count` processes that keep a core busy each, for as long as the block lasts."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _seconds(policy: str, busy: int, iterations: int) -> float:
    with _busy(busy):
        if iterations == QUICK_ITERATIONS:  # in this process, as one takes many seconds to start
            return worker(iterations)
        command = [sys.executable, "-m", "bench.shared", "--worker", str(iterations)]
        done = subprocess.run(command, env=_environment(policy), capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def worker(iterations: int) -> float:
    """Seconds of the iterations in this process, after two that do not count."""
    from selmatch_ext.context import Context
    from selmatch_ext.data.load import load
    from selmatch_ext.experts import train_experts
    from selmatch_ext.methods import MTT, Task
    from selmatch_ext.methods.loop import run_method
    from selmatch_ext.methods.mtt import MTTSettings
    from selmatch_ext.selection.start import choose
    from selmatch_ext.settings import Evaluation, Experts, Start, Training

    settings = MTTSettings(inner_steps=10, batch_syn=50, max_start_epoch=1, expert_epochs=1, lr_images=1.0)
    context = Context(load("digits"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = "ConvNetD2W32" if iterations > QUICK_ITERATIONS else "ConvNetD1W4"
        experts = Experts(model, count=1, strategy="none", training=Training(epochs=2))
        store = train_experts(context, experts, folder / "experts")
        task = Task(choose(Start(), context, Evaluation(), folder).images, context, store)
        run_method(MTT(task, replace(settings, iterations=2)), folder / "warm", {})
        begin = time.perf_counter()
        run_method(MTT(task, replace(settings, iterations=iterations)), folder / "run", {})
        return time.perf_counter() - begin


def run(setting: Setting, repeats: int = 3, default: bool = False, spins: Sequence[int] = ()) -> dict:
    """Median seconds alone and beside the busy processes, which take turns; their ratio, of each policy."""
    iterations, repeats, beside = (QUICK_ITERATIONS, 1, 1) if setting.quick else (ITERATIONS, repeats, BUSY)
    policies = [OURS, *[DEFAULT] * default, *(f"spin {count}" for count in spins)]
    cases = [(policy, busy) for policy in policies for busy in (0, beside)]
    seconds = {case: [] for case in cases}
    for turn in range(repeats):
        for policy, busy in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
            seconds[policy, busy].append(_seconds(policy, busy, iterations))
    found = {}
    for policy in policies:
        without, with_them = (statistics.median(seconds[policy, busy]) for busy in (0, beside))
        all_seconds = {"all alone": seconds[policy, 0], "all beside": seconds[policy, beside]}
        found[policy] = {"alone": without, "beside": with_them, "ratio": with_them / without, **all_seconds}
    return {
        "device": setting.device,
        "iterations": iterations,
        "busy processes": beside,
        "variables": openmp.POLICY,
        "policies": found,
    }


def summary(figures: dict) -> list[tuple[str, str, str]]:
    rows = []
    for policy, found in figures["policies"].items():
        rows.append((f"{figures['iterations']} iterations alone ({policy})", f"{found['alone']:.1f} s", ""))
        what = f"beside {figures['busy processes']} busy processes ({policy})"
        goal = f"<= {GOAL:g}x" if policy == OURS else ""
        rows.append((what, f"{found['beside']:.1f} s, {found['ratio']:.2f}x", goal))
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.shared", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--default", action="store_true", help="also the runtime's own policy")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="also these values of GOMP_SPINCOUNT")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(worker(options.worker))
    else:
        print(json.dumps(run(Setting(), options.repeats, options.default, options.spins), indent=2))


if __name__ == "__main__":
    main()
