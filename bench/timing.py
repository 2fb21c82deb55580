"""What all measurements share: where they run, and how calls are timed against one another in one process."""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

THREADS = 2  # of torch on the CPU
Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where a measurement runs. quick: tiny sizes and one repetition, which only show that it works."""

    device: str = "cpu"
    quick: bool = False
    notes: list[str] = field(default_factory=list, compare=False)  # what a reader of the figures has to know

    @property
    def gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def generator(self, seed: int = 0) -> torch.Generator:
        """On the device, where large tensors are drawn a hundred times as fast as on the CPU of a GPU's machine."""
        return torch.Generator(self.device).manual_seed(seed)

    def size(self, cpu: Any, gpu: Any, quick: Any) -> Any:
        """The one of three sizes that is for this setting."""
        return quick if self.quick else gpu if self.gpu else cpu


def machine() -> dict:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": THREADS, "gpu": gpu, "torch": torch.__version__}


@contextmanager
def threads(count: int = THREADS):
    """torch on this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rotations(setting: Setting, nbytes: int) -> int:
    """How many sets of inputs, each of `nbytes`, calls on a GPU should take turns with, so that none is still in the L2
    cache when it is used again: three times the cache in all, at most 64 sets. 1 on the CPU."""
    if not setting.gpu:
        return 1
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(64, math.ceil(3 * cache / nbytes)))


def alternate(
    setting: Setting,
    calls: Mapping[str, Call | Sequence[Call]],
    repeats: int = 15,
    warmup: int = 2,
    in_a_row: int = 1,
    graphs: bool = True,
) -> dict[str, float]:
    """The median seconds of a call of each, taking turns `repeats` times after `warmup` turns that do not count.

    calls: by name a function, or a list of functions that do the same on inputs of their own (`rotations` says how
    many are enough). A turn runs the functions of a name one after the other, at least `in_a_row` of them, and its
    figure is their mean: with several a case runs mostly in the caches and the heap that it left itself, as in a
    training loop. Each round has an order of its own, the same ones in every run, so that no case always follows the
    same other.

    On the CPU turns are timed by its clock. On a GPU they are timed by CUDA events around a replay of a CUDA graph of
    the turn, so that launches do not count; around the launches themselves where graphs is False, or where the calls
    cannot be captured (`setting.notes` then says so)."""
    if setting.quick:
        repeats, warmup, in_a_row = 1, 1, 1
    turns = {}
    for name, given in calls.items():
        functions = [given] if callable(given) else list(given)
        work = [functions[k % len(functions)] for k in range(max(in_a_row, len(functions)))]
        turns[name] = _gpu_turn(setting, name, work, graphs) if setting.gpu else _cpu_turn(work)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    order, shuffle = list(turns), random.Random(0).shuffle
    for turn in range(warmup + repeats):
        shuffle(order)
        for name in order:
            found = turns[name]()
            if turn >= warmup:
                seconds[name].append(found)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _cpu_turn(work: list[Call]) -> Callable[[], float]:
    def seconds() -> float:
        begin = time.perf_counter()
        for function in work:
            function()
        return (time.perf_counter() - begin) / len(work)

    return seconds


def _gpu_turn(setting: Setting, name: str, work: list[Call], graphs: bool) -> Callable[[], float]:
    def launch() -> list[object]:
        return [function() for function in work]  # all results are kept, so that each is written to memory of its own

    replay = _captured(setting, name, launch) if graphs else launch
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        torch.cuda.synchronize()
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(work)

    return seconds


def _captured(setting: Setting, name: str, launch: Callable[[], object]) -> Callable[[], object]:
    """A replay of a CUDA graph of `launch`; `launch` itself where it cannot be captured."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # libraries set themselves up at a first call, which cannot be captured
        for _ in range(2):
            launch()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            results = launch()
    except Exception as error:
        setting.notes.append(f"{name}: timed over launches, as it cannot be captured ({str(error).splitlines()[0]})")
        torch.cuda.synchronize()
        return launch

    def replay(keep: object = results) -> None:  # the results keep their memory in the graph's pool
        graph.replay()

    return replay
