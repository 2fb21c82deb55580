"""How long the stages of a run take, how much memory they need at most, and how much time the rest of the run needs.

`recorded` marks a function that is a run, `measured` one that is a stage of it. Outside of a run both do nothing, and
progress bars (`Bar`) show the time left of their own work alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from selmatch_ext._C import build_info
from selmatch_ext.files import read_json, write_json
from selmatch_ext.output import attempt

Function = TypeVar("Function", bound=Callable[..., Any])
FILE = "times.json"
SECONDS_BETWEEN = 10.0  # two writes of the file within a stage
PACKAGES = ("torchvision", "numpy")
_clock: Clock | None = None


@dataclass
class Clock:
    """What was measured of a run. path: the file for it, None where another process writes it.

    stages: {name: {"seconds", "memory", "gpu_memory"}}, the last two in bytes and None where they could not be
    measured, over all calls. runs: for each verb and machine on which the run was computed, its versions and device.
    work: for each stage that is to come or has begun, how much of which kinds of work is left, None where that is not
    known yet. speed: for each kind of work how much was done in this call, in how many seconds and updates."""

    path: Path | None
    stages: dict[str, dict[str, float | None]]
    runs: list[dict[str, str]]
    work: dict[str, dict[str, float] | None]
    speed: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    stage: str | None = None
    before: dict[str, float | None] = field(default_factory=dict)
    since: float = 0.0
    written: float = 0.0

    def begin(self, stage: str) -> None:
        """Starts to measure a stage."""
        _reset_peaks()
        self.stage, self.before, self.since = stage, self.stages.get(stage, {}), time.monotonic()
        self.written = self.since

    def tick(self) -> None:
        """Adds up what the stage took until now, and writes it from time to time: a kill loses little of it."""
        if self.stage is not None and time.monotonic() - self.written > SECONDS_BETWEEN:
            self._add_up()
            self._write()

    def end(self, keep: bool) -> None:
        """Ends the stage. keep: whether its time counts."""
        if keep:
            self._add_up()
            self._write()
        self.work.pop(self.stage or "", None)
        self.stage = None

    def _add_up(self) -> None:
        seconds, peaks = (self.before.get("seconds") or 0.0) + time.monotonic() - self.since, _peaks()
        largest = {name: max(filter(None, (peak, self.before.get(name))), default=None) for name, peak in peaks.items()}
        self.stages[self.stage or ""] = {"seconds": round(seconds, 3), **largest}

    def _write(self) -> None:
        self.written = time.monotonic()
        if self.path is not None:
            attempt(write_json, self.path, {"stages": self.stages, "runs": self.runs})

    def left(self) -> str:
        """What a progress bar says of the time left of the whole run. It follows from the speed that was measured in
        this call; work of a kind that was not done yet makes it a lower bound."""
        seconds, known = 0.0, True
        for kinds in self.work.values():
            for kind, amount in (kinds or {"": math.inf}).items():
                done, took, _ = self.speed.get(kind, (0.0, 0.0, 0))
                if done > 0:
                    seconds += max(0.0, amount) * took / done
                elif amount > 0:
                    known = False
        if not known and seconds < 1:
            return "run: time left unknown"
        return f"run: {'' if known else 'at least '}{tqdm.format_interval(seconds)} left"


class Bar(tqdm):
    """A progress bar that also shows the time left of the run, and measures how fast its kind of work goes.

    kind: of the work, such as a network that is trained. each: how much of it a unit of the bar is."""

    def __init__(self, *, kind: str = "other work", each: float = 1.0, **options: Any):
        self.kind, self.each, self.clock, self.last = kind, each, _clock, time.monotonic()
        if self.clock is not None and self.clock.stage is not None:
            total, initial = options["total"], options.get("initial", 0)
            kinds = self.clock.work.get(self.clock.stage) or {}
            kinds[kind] = max(kinds.get(kind, 0.0), total * each) - initial * each  # `expect` may know of later bars
            self.clock.work[self.clock.stage] = kinds
        super().__init__(**options)

    def update(self, n: float | None = 1) -> bool | None:
        now, clock, amount = time.monotonic(), self.clock, (n or 0) * self.each
        if clock is not None and clock.stage is not None:
            done, seconds, updates = clock.speed.get(self.kind, (0.0, 0.0, 0))
            if updates == 1:  # the first one also loads and compiles, so that it counts only as long as it is alone
                done = seconds = 0.0
            clock.speed[self.kind] = done + amount, seconds + now - self.last, updates + 1
            kinds = clock.work.get(clock.stage) or {}
            if self.kind in kinds:
                kinds[self.kind] -= amount
            clock.tick()
        self.last = now
        return super().update(n)

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        shown = super().format_dict
        if self.clock is not None and self.clock.stage is not None:
            shown["postfix"] = ", ".join(filter(None, (shown["postfix"], self.clock.left())))
        return shown


def expect(stage: str, kind: str, amount: float) -> None:
    """Says how much work of which kind a stage of the run will be that has not begun; nothing for one that is none."""
    if _clock is not None and stage in _clock.work:
        _clock.work[stage] = {kind: amount}


def recorded(verb: str, writes: Callable[[], bool], *stages: str) -> Callable[[Function], Function]:
    """For a function (settings, folder, device, …) that is a run: what is measured within goes to folder/times.json.

    verb: of the command line. writes: whether this process is the one that writes. stages: those at the end of the run,
    without which its time left is not known."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(settings: Any, folder: str | Path, device: torch.device, *rest: Any, **options: Any) -> Any:
            global _clock
            outer, path = _clock, Path(folder) / FILE if writes() else None
            known, runs = read(Path(folder))
            machine = {"verb": verb, **_machine(device)}
            runs = runs if machine in runs else [*runs, machine]
            _clock = Clock(path, known, runs, dict.fromkeys(stages))
            try:
                return function(settings, folder, device, *rest, **options)
            finally:
                _clock = outer

        return call  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def measured(stage: str, refuses: bool = False) -> Iterator[None]:
    """Within, or within the function that it decorates, is a stage of the run. A stage within a stage is part of it.

    refuses: the stage finds out whether the folder belongs to this run; where it raises, it counts nothing."""
    clock = _clock if _clock is not None and _clock.stage is None else None
    if clock is not None:
        clock.begin(stage)
    keep = not refuses
    try:
        yield
        keep = True
    finally:
        if clock is not None:
            clock.end(keep)


def read(folder: Path) -> tuple[dict[str, dict[str, float | None]], list[dict[str, str]]]:
    """(stages, runs) of folder/times.json as `Clock` has them; nothing where there is no such file, or a damaged one:
    no run may stop for it."""
    try:
        found = read_json(folder / FILE, "stages", "runs")
        stages = {
            name: {key: _bounded(spent.get(key)) for key in ("seconds", "memory", "gpu_memory")}
            for name, spent in found["stages"].items()
        }
        return stages, [{str(key): str(value) for key, value in run.items()} for run in found["runs"]]
    except (OSError, ValueError, TypeError, AttributeError):
        return {}, []


def _bounded(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and 0 <= value < math.inf else None


def _machine(device: torch.device) -> dict[str, str]:
    """The versions and the device that a run is computed with."""
    versions = {
        "selmatch_ext": build_info()["version"],
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {sys.platform}"
    return {**versions, "device": f"{device} ({name})"}


def _reset_peaks() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is resident now
    if torch.cuda.is_initialized():
        for k in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(k)


def _peaks() -> dict[str, int | None]:
    """The largest resident size of this process and, where a GPU is used, the most that torch had allocated on one,
    since `_reset_peaks`."""
    memory = gpu = None
    with contextlib.suppress(OSError, IndexError, ValueError):
        memory = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    if torch.cuda.is_initialized():
        gpu = max(torch.cuda.max_memory_allocated(k) for k in range(torch.cuda.device_count()))
    return {"memory": memory, "gpu_memory": gpu}
