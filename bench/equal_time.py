"""Trajectory matching for as long as the plain loop needs for 100 updates: how many updates ours makes in that time,
and the accuracy after both.

    python -m bench.equal_time --settings FOLDER --experts FOLDER --out FOLDER [--updates 100]

--settings is the folder of a run or of a sweep's cell of MTT or SelMatch, with its data, start and evaluation;
--experts has its expert trajectories. The plain loop keeps the graph of all inner steps, as public code does, and
augments by PyTorch's operations. Both make the same updates, since both gradients are exact, so ours makes those of the
plain loop too: the set after 100 updates is a snapshot of the longer run. An update is the loss and its gradients; the
two loops take turns on two threads, and the medians count. A killed run continues.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from reference import unrolled_sgd_full_graph

import selmatch_ext as sm
from bench.timing import machine, threads
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.load import load_data
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import evaluate
from selmatch_ext.files import read_json, write_json
from selmatch_ext.methods import MTT, Task, find_method
from selmatch_ext.runner import Run, distill_alone
from selmatch_ext.selection.start import Kept, choose

REPEATS = 7


def check(run: Run) -> None:
    """ValueError where the plain loop would not make the updates of ours, one loss each."""
    if not issubclass(find_method(run.method), MTT):
        raise ValueError(f"--settings is of the method {run.method}; allowed are MTT and methods built on it")
    needed = {"gradient": "exact", "precision": "float32", "experts_per_iteration": 1, "first_max_start_epoch": None}
    for name, value in needed.items():
        given = vars(run.settings)[name]
        if given != value:
            raise ValueError(f"--settings has {name} {given}; both loops make the same updates where it is {value}")


def seconds_of_updates(run: Run, context: Context, experts: Path, kept: Kept) -> dict[str, float]:
    """Median seconds of an update: {"plain": …, "ours": …}."""
    method, store = find_method(run.method), ExpertStore(experts)
    start = choose(run.start, context, run.evaluation, kept, store).images
    both = {name: method(Task(start, context, store), run.settings) for name in ("plain", "ours")}
    as_plain(both["plain"])
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for i in range(REPEATS + 1):
        for name, one in both.items():
            begin = time.perf_counter()
            torch.autograd.grad(one.loss(i, torch.Generator().manual_seed(i)), list(one.learned.values()))
            seconds[name].append(time.perf_counter() - begin)
    return {name: median(times[1:]) for name, times in seconds.items()}  # the first warms up


def as_plain(method: MTT) -> None:
    """Makes the method keep the graph of all inner steps."""
    method.unrolled = partial(_full_graph, method.model)


def _full_graph(model, *arguments, **optimizer):
    return unrolled_sgd_full_graph(model, *arguments, **{k: v for k, v in optimizer.items() if v})


def compare(settings: Path, experts: Path, out: Path, updates: int) -> dict:
    """Writes and returns out/equal_time.json: seconds of an update, and for both loops updates, mean and std of the
    test accuracy in %."""
    run = Run.load(settings)
    check(run)
    context = Context(load_data(run.data, run.seed), run.seed, torch.device("cpu"))
    times = out / "times.json"
    if not times.exists():
        out.mkdir(parents=True, exist_ok=True)
        with threads():
            seconds = seconds_of_updates(run, context, experts, Kept.under(out))
        write_json(times, {"machine": machine(), "settings": str(settings), "seconds": seconds})
    result = read_json(times, "seconds")
    seconds = result.pop("seconds")
    count = {"plain": updates, "ours": round(updates * seconds["plain"] / seconds["ours"])}
    if count["ours"] < updates:
        raise ValueError(
            f"the plain loop is faster here: {seconds['plain']:.3g} s an update, ours {seconds['ours']:.3g}"
        )
    longer = replace(run.settings, iterations=count["ours"], snapshot_every=updates)
    distill_alone(replace(run, settings=longer), out / "ours", context.device, experts)
    sets = {"plain": f"snapshots/iteration_{updates:06d}.safetensors", "ours": "distilled.safetensors"}
    for name, path in sets.items():
        record = out / f"evaluation_{name}.json"
        found = evaluate(DistilledSet.load(out / "ours" / path), context, run.evaluation, record, name)["test"]
        result[name] = {"seconds": seconds[name], "updates": count[name], "mean": found.mean, "std": found.std}
    write_json(out / "equal_time.json", result)
    return result


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.equal_time", description=__doc__.splitlines()[0])
    for name in ("settings", "experts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--updates", type=int, default=100, help="of the plain loop")
    options = parser.parse_args()
    sm.keep_memory()  # as the command line does, for both
    result = compare(options.settings, options.experts, options.out, options.updates)
    for name in ("plain", "ours"):
        case = result[name]
        print(
            f"{name}: {case['seconds']:.3f} s an update; after {case['updates']} updates "
            f"{case['mean']:.1f} ± {case['std']:.1f} %"
        )


if __name__ == "__main__":
    main()
