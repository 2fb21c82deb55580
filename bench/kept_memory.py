"""One matching step in processes that return freed memory to the system, as by default, and in processes that keep it.

    python -m bench.kept_memory [--quick]

The setting holds for a whole process, so that each measurement has a process of its own; the two kinds take turns.
Seconds are of an inner step (as in bench/unroll.py, 8 steps, fused engine and full graph), in float32; peak memory is
the highest resident size of the process less that before the first step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import selmatch_ext as sm
from bench.timing import Setting, threads
from bench.unroll import FULL, FUSED, Problem, networks, resident

DEVICES = ("cpu",)
ROOT = Path(__file__).resolve().parent.parent
NAMES = {"returned": "memory is returned", "kept": "memory is kept"}


def measured(setting: Setting, kept: bool, kind: str) -> dict:
    """{"seconds": of an inner step, "peak_mb":} in this process."""
    if kept and not sm.keep_memory():
        raise RuntimeError("the C library of this machine has no mallopt")
    steps, problem, times = setting.size(8, 8, 2), Problem(setting, networks(setting)["instance norm"]), []
    with threads():
        before = resident("VmRSS")
        for _ in range(setting.size(5, 5, 2)):
            begin = time.perf_counter()
            problem.step(kind, "float32", steps)
            times.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(times[1:]) / steps, "peak_mb": resident("VmHWM") - before}


def run(setting: Setting) -> dict:
    """By kind of step, by what becomes of freed memory: medians over processes."""
    found: dict = {kind: {name: [] for name in NAMES} for kind in setting.size((FUSED, FULL), (), (FUSED,))}
    for _ in range(setting.size(3, 3, 1)):
        for kind, by_name in found.items():
            for name, cases in by_name.items():
                command = [sys.executable, "-W", "ignore", "-m", "bench.kept_memory", "--one", name, kind]
                command += ["--quick"] * setting.quick
                cases.append(json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout))
    return {
        kind: {
            name: {key: statistics.median(case[key] for case in cases) for key in cases[0]}
            for name, cases in by_name.items()
        }
        for kind, by_name in found.items()
    }


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    return [
        (
            f"inner step, {kind}, {NAMES[name]}",
            f"{1e3 * case['seconds']:.0f} ms, {case['seconds'] / by_name['returned']['seconds']:.2f} of the time, "
            f"peak {case['peak_mb']:.0f} MB",
            "",
        )
        for kind, by_name in result.items()
        for name, case in by_name.items()
    ]


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.kept_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(quick=options.quick)
    if options.one:
        name, kind = options.one
        print(json.dumps(measured(setting, name == "kept", kind)))
        return
    result = run(setting)
    for what, figure, _ in summary(result):
        print(f"{what:<45} {figure}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
