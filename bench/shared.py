"""Matching and training alone and beside busy processes, with the command line's policy for OpenMP.

    python -m bench.shared [--repeats 3] [--default] [--spins 0 100 1000 10000]

Matching: 60 iterations of MTT on digits, ConvNetD2W32, N = 10, batches of 50, beside two busy processes. Training: the
demo's network, and ConvNetBN of width 128 on images of 32 x 32, by `train` and by a plain loop of torch, beside one.
Each is run in a process of its own, as the runtime reads its variables when it is loaded. --default also matches with
the runtime's own policy, which takes long beside other processes; --spins with other values of GOMP_SPINCOUNT, for the
choice of the one in selmatch_ext/openmp.py.
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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.timing import Setting
from selmatch_ext import models, openmp
from selmatch_ext.settings import Training
from selmatch_ext.training import batch_augmenter, train

DEVICES = ("cpu",)
OURS, DEFAULT, PLAIN = "command line", "default of the runtime", "plain torch"
QUICK = {"matching": 1, "the demo's training": 1}


@dataclass(frozen=True)
class Work:
    """What is timed: steps, beside how many busy processes, and how many times slower it may be there. Of training also
    the network, and channels, side and number of the images of a batch."""

    count: int
    busy: int
    goal: float
    network: str = ""
    batch: tuple[int, int, int] = (1, 8, 30)


WORKS = {
    "matching": Work(60, 2, 2.5),
    "the demo's training": Work(600, 1, 1.6, "ConvNetW32"),
    "training of ConvNetBN": Work(40, 1, 2.1, "ConvNetBN", (3, 32, 64)),
}


def _environment(policy: str) -> dict[str, str]:
    """This process's environment with as many threads as the machine has cores and with that policy."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    if policy == DEFAULT:
        return own
    own |= openmp.wait_policy(own)
    return own if policy in (OURS, PLAIN) else own | {"GOMP_SPINCOUNT": policy.removeprefix("spin ")}


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


def _seconds(name: str, who: str, busy: int, count: int) -> float:
    with _busy(busy):
        if count == QUICK.get(name):  # in this process, as one takes many seconds to start
            return worker(name, who, count)
        command = [sys.executable, "-m", "bench.shared", "--worker", name, who, str(count)]
        done = subprocess.run(command, env=_environment(who), capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def worker(name: str, who: str, count: int) -> float:
    """Seconds of `count` steps of a work in this process, after some that do not count."""
    if not WORKS[name].network:
        return _matching(count)
    return (_plain_training if who == PLAIN else _training)(WORKS[name], count)


def _matching(iterations: int) -> float:
    from selmatch_ext.context import Context
    from selmatch_ext.data.load import load
    from selmatch_ext.experts import train_experts
    from selmatch_ext.methods import MTT, Task
    from selmatch_ext.methods.loop import run_method
    from selmatch_ext.methods.mtt import MTTSettings
    from selmatch_ext.selection.start import choose
    from selmatch_ext.settings import Evaluation, Experts, Start

    settings = MTTSettings(inner_steps=10, batch_syn=50, max_start_epoch=1, expert_epochs=1, lr_images=1.0)
    context = Context(load("digits"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = "ConvNetD2W32" if iterations > 1 else "ConvNetD1W4"
        experts = Experts(model, count=1, strategy="none", training=Training(epochs=2))
        store = train_experts(context, experts, folder / "experts")
        task = Task(choose(Start(), context, Evaluation(), folder).images, context, store)
        run_method(MTT(task, replace(settings, iterations=2)), folder / "warm", {})
        begin = time.perf_counter()
        run_method(MTT(task, replace(settings, iterations=iterations)), folder / "run", {})
        return time.perf_counter() - begin


def _network_and_images(work: Work) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    channels, side, batch = work.batch
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, channels, side, side, generator=draw)
    return models.build(work.network, channels, 10, side, generator=draw), images, torch.arange(batch) % 10


def _training(work: Work, count: int) -> float:
    model, images, labels = _network_and_images(work)
    augmenter = batch_augmenter("none", images.shape[2:])

    def steps(epochs: int) -> None:  # of one batch each
        settings = Training(epochs=epochs, lr=1e-3, momentum=0.9, batch=len(labels))
        train(model, lambda indices: images[indices], labels, settings, augmenter, torch.Generator())

    steps(2)
    begin = time.perf_counter()
    steps(count)
    return time.perf_counter() - begin


def _plain_training(work: Work, count: int) -> float:
    model, images, labels = _network_and_images(work)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(2 + count):
        if step == 2:
            begin = time.perf_counter()
        loss = F.cross_entropy(model(images[torch.randperm(len(labels))]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - begin


def run(setting: Setting, repeats: int = 3, default: bool = False, spins: Sequence[int] = ()) -> dict:
    """By work and by who does it, or by policy: median seconds alone and beside the busy processes, which take turns,
    and their ratio."""
    policies = (OURS, *[DEFAULT] * default, *(f"spin {count}" for count in spins))
    works, repeats = (list(QUICK), 1) if setting.quick else (list(WORKS), repeats)
    found = {
        name: _compared(name, (OURS, PLAIN) if WORKS[name].network else policies, repeats, setting.quick)
        for name in works
    }
    return {"device": setting.device, "variables": openmp.POLICY, "works": found}


def _compared(name: str, by: Sequence[str], repeats: int, quick: bool) -> dict:
    work = WORKS[name]
    count = QUICK[name] if quick else work.count
    cases = [(who, busy) for who in by for busy in (0, work.busy)]
    seconds = {case: [] for case in cases}
    for turn in range(repeats):
        for who, busy in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
            seconds[who, busy].append(_seconds(name, who, busy, count))
    found = {}
    for who in by:
        alone, beside = (statistics.median(seconds[who, busy]) for busy in (0, work.busy))
        every = {"all alone": seconds[who, 0], "all beside": seconds[who, work.busy]}
        found[who] = {"alone": alone, "beside": beside, "ratio": beside / alone, **every}
    return {"steps": count, "busy processes": work.busy, "by": found}


def summary(figures: dict) -> list[tuple[str, str, str]]:
    rows = []
    for name, work in figures["works"].items():
        for who, found in work["by"].items():
            what = f"{name}, {work['steps']} steps ({who}), alone and beside {work['busy processes']} busy"
            figure = f"{found['alone']:.1f} s, {found['beside']:.1f} s, {found['ratio']:.2f}x"
            rows.append((what, figure, f"<= {WORKS[name].goal:g}x" if who == OURS else ""))
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.shared", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--default", action="store_true", help="also the runtime's own policy")
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="also these values of GOMP_SPINCOUNT")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, who, count = options.worker
        print(worker(name, who, int(count)))
    else:
        print(json.dumps(run(Setting(), options.repeats, options.default, options.spins), indent=2))


if __name__ == "__main__":
    main()
