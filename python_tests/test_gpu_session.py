"""`make gpu`: the whole session in small on the CPU; stages that fail, hang or do not exist."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, gpu_stages

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_session_on_the_cpu(tmp_path):
    command = ["make", "gpu", "DEVICE=cpu", f"OUT={tmp_path / 'out'}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [stage["stage"] for stage in found["stages"]] == list(gpu.SHARES) == list(gpu_stages.STAGES)
    states = {stage["stage"]: stage["state"] for stage in found["stages"]}
    assert states == {"build": "skipped"} | dict.fromkeys(list(gpu.SHARES)[1:], "passed")
    for name in ("engine", "blocks", "sync", "sanitizer", "profile"):
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert record["cases"] and all(case["passed"] for case in record["cases"]) and not record["failed"]
        assert record["state"] == "passed" and record["seconds"] > 0
    figures = json.loads((tmp_path / "out" / "bench-figures.json").read_text())
    assert {"peaks", "block", "convolutions", "training"} <= figures.keys()
    assert json.loads((tmp_path / "out" / "trace-fused.json").read_text())["traceEvents"]


def stand_in(monkeypatch, tmp_path, **stages):
    """Stages of Python code in place of the real ones."""
    package = tmp_path / "bench"
    package.mkdir()
    (package / "__init__.py").touch()
    body = "\n".join(f"if sys.argv[1] == {name!r}:\n    {code}" for name, code in stages.items())
    (package / "gpu_stages.py").write_text(f"import json, sys, time\nfrom pathlib import Path\n{body}\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(monkeypatch, tmp_path, capsys):
    partial = "Path(sys.argv[-1], 'engine.json').write_text(json.dumps({'cases': [1], 'failed': []}));"
    stand_in(
        monkeypatch,
        tmp_path,
        tests="raise ValueError('what went wrong')",
        engine=f"{partial} time.sleep(600)",
        blocks="pass",
    )
    monkeypatch.setattr(gpu, "SHARES", {"tests": 0.4, "engine": 0.2, "blocks": 0.4})
    out = tmp_path / "out"
    out.mkdir()
    results = gpu.session(["tests", "engine", "blocks"], "cpu", out, 5.0)
    assert [r["state"] for r in results] == ["failed", "timed out", "passed"]
    assert "ValueError: what went wrong" in results[0]["error"] and "stopped after" in results[1]["error"]
    record = json.loads((out / "engine.json").read_text())
    assert record["cases"] == [1] and record["state"] == "timed out"  # what was found before it was stopped
    assert json.loads((out / "summary.json").read_text())["stages"] == results
    assert "engine" in capsys.readouterr().out


def test_a_case_that_raises_is_a_failed_case(tmp_path):
    record = gpu_stages.Record(tmp_path, "blocks", "cpu")
    record.each(lambda case: {"case": str(case), "passed": 1 / case < 1}, [0, 1, 2])
    found = json.loads((tmp_path / "blocks.json").read_text())
    assert [case["passed"] for case in found["cases"]] == [False, False, True] and found["failed"] == ["0", "1"]
    assert "ZeroDivisionError" in found["cases"][0]["error"]


def test_every_file_with_tests_for_a_gpu_is_run():
    names = {path.name for path in gpu_stages._files_with_gpu_tests()}
    assert {"test_on_gpu.py", "test_block.py", "test_graphs.py", "test_dsa.py", "test_distance.py"} <= names
    assert {"test_gradient_distance.py", "test_transfers.py"} <= names and "test_files.py" not in names


@pytest.mark.parametrize(
    "arguments, message",
    [(["bilds"], "no stage bilds; there are build, tests"), (["--seconds", "0"], "--seconds must be positive, got 0")],
)
def test_wrong_arguments(arguments, message):
    done = subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_options_of_the_sanitizer():
    usage = "  --kernel-name arg (=)   ... \n  --kernel-name-exclude arg"
    assert gpu_stages._tool_options("racecheck", usage) == ["--kernel-name", "kns=selmatch"]
    assert gpu_stages._tool_options("synccheck", "") == [] == gpu_stages._tool_options("initcheck", usage)
    assert gpu_stages._tool_options("memcheck", "--filter arg")[-2:] == ["--filter", "kns=selmatch"]
