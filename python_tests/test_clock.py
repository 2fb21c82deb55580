"""Times, memory and the time left of a run."""

import json
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU

from selmatch_ext import clock
from selmatch_ext.ranks import progress


def recorded(function, folder, *stages):
    """Runs `function` as a run in `folder`, and returns what times.json then holds."""
    call = clock.recorded("run", lambda: True, *stages)(lambda settings, folder, device: function())
    call(None, folder, CPU)
    return json.loads((folder / "times.json").read_text())


@pytest.fixture
def now(monkeypatch):
    """The time, which only the test changes."""
    time = SimpleNamespace(value=1000.0)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: time.value))
    return time


def test_stages_add_up_over_calls(tmp_path, now):
    @clock.measured("inner")
    def inner():
        now.value += 4

    def work(seconds, error=None, refuses=False):
        with clock.measured("outer", refuses):
            now.value += seconds
            inner()
            if error is not None:
                raise error

    found = recorded(lambda: work(1.5), tmp_path)
    assert {name: s["seconds"] for name, s in found["stages"].items()} == {"outer": 5.5}  # inner is part of it
    with pytest.raises(KeyboardInterrupt):
        recorded(lambda: work(2, KeyboardInterrupt()), tmp_path)
    with pytest.raises(ValueError, match="another run"):
        recorded(lambda: work(100, ValueError("another run's folder"), refuses=True), tmp_path)
    found = recorded(inner, tmp_path)
    assert {name: s["seconds"] for name, s in found["stages"].items()} == {"outer": 11.5, "inner": 4.0}
    run = found["runs"]
    assert len(run) == 1 and run[0]["verb"] == "run" and run[0]["torch"] == torch.__version__
    assert run[0]["device"].startswith("cpu")


def test_a_long_stage_is_written_while_it_runs(tmp_path, now):
    def work():
        with clock.measured("long"), progress(total=3, kind="k") as bar:
            for _ in range(3):
                now.value += 6
                bar.update()
            written = json.loads((tmp_path / "times.json").read_text())
            assert written["stages"]["long"]["seconds"] == 12.0

    assert recorded(work, tmp_path)["stages"]["long"]["seconds"] == 18.0


def test_outside_of_a_run_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with clock.measured("stage"), progress(total=1, kind="k", desc="work") as bar:
        bar.update()
    assert not list(tmp_path.iterdir()) and "run:" not in capsys.readouterr().err


def test_a_bar_need_not_say_what_its_work_is(tmp_path, now):
    def work():
        with clock.measured("stage"), progress(total=2) as bar:
            now.value += 60
            bar.update()
            assert shown(bar) == "run: 01:00 left"

    recorded(work, tmp_path)


def test_only_one_process_writes(tmp_path):
    call = clock.recorded("run", lambda: False)(lambda settings, folder, device: _stage())
    call(None, tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def _stage():
    with clock.measured("stage"):
        pass


@pytest.mark.parametrize("text", ["", "[]", '{"stages": 3, "runs": []}', '{"stages": {"a": 1}, "runs": []}'])
def test_damaged_times_stop_no_run(tmp_path, text):
    (tmp_path / "times.json").write_text(text)
    assert clock.read(tmp_path) == ({}, [])
    assert list(recorded(_stage, tmp_path)["stages"]) == ["stage"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not reset peaks")
def test_peak_memory_is_that_of_the_stage(tmp_path):
    def work():
        # Pages of its own, which go back to the system whatever the allocator keeps
        with clock.measured("large"), mmap.mmap(-1, 300 * 2**20) as pages:
            for start in range(0, len(pages), 2**20):
                pages[start : start + 2**20] = bytes([1]) * 2**20
        with clock.measured("small"):
            pass

    stages = recorded(work, tmp_path)["stages"]
    assert 250e6 < stages["large"]["memory"] - stages["small"]["memory"] < 400e6
    assert stages["small"]["memory"] > 50e6 and stages["small"]["gpu_memory"] is None


def shown(bar):
    return bar.format_dict["postfix"]


def test_the_time_left_follows_from_what_was_measured(tmp_path, now):
    """Work of a kind that was not done yet is no part of the estimate, which then is a lower bound."""

    def work():
        with clock.measured("start"), progress(total=2, kind="net", each=50.0, desc="scores") as bar:
            assert shown(bar) == "run: time left unknown"
            now.value += 900  # with what is done only once
            bar.update()
            now.value += 100  # 50 image passes of the network take 100 s
            bar.update()
            assert shown(bar) == "run: time left unknown"  # the distillation may take any time
        clock.expect("evaluation", "net", 300.0)
        with clock.measured("distillation"), progress(total=10, initial=4, kind="iterations") as bar:
            bar.set_postfix(loss="0.5", refresh=False)
            assert shown(bar) == "loss=0.5, run: at least 10:00 left"  # 300 passes, each 2 s
            now.value += 20
            bar.update(2)
            assert shown(bar) == "loss=0.5, run: 10:40 left"  # and 4 iterations, each 10 s
            bar.update(4)
        with clock.measured("evaluation"):
            for label in ("random", "start", "made"):
                with progress(total=1, kind="net", each=100.0, desc=label) as bar:
                    last = shown(bar)
                    now.value += 200
                    bar.update()
            assert last == "run: 03:20 left" and shown(bar) == "run: 00:00 left"

    recorded(work, tmp_path, "distillation", "evaluation")


def test_work_that_was_never_measured_makes_a_lower_bound(tmp_path, now):
    def work():
        clock.expect("evaluation", "other net", 300.0)
        with clock.measured("distillation"), progress(total=10, kind="iterations") as bar:
            now.value += 60
            bar.update(5)
            assert shown(bar) == "run: at least 01:00 left"

    recorded(work, tmp_path, "distillation", "evaluation")


def test_what_is_not_part_of_the_run_is_not_expected(tmp_path, now):
    def work():
        clock.expect("evaluation", "net", 300.0)  # of `selmatch distill`, which ends before
        with clock.measured("distillation"), progress(total=10, kind="iterations") as bar:
            now.value += 60
            bar.update(5)
            assert shown(bar) == "run: 01:00 left"

    recorded(work, tmp_path, "distillation")


def test_times_of_a_folder_without_any(tmp_path):
    assert clock.read(tmp_path) == ({}, []) and clock.read(Path("/nowhere")) == ({}, [])
