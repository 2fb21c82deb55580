"""Damaged files of every kind: what is read is right, everything else ends in one documented error of one line.

SELMATCH_FUZZ_SEED and SELMATCH_FUZZ_SECONDS make another or a longer run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import selmatch_ext

SEED = os.environ.get("SELMATCH_FUZZ_SEED", "0")
SECONDS = os.environ.get("SELMATCH_FUZZ_SECONDS", "12")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the limit of memory needs Linux")
def test_mutants_of_every_kind_of_file(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("mutants.py")), str(tmp_path / "files"), SEED, SECONDS]
    (tmp_path / "files").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(selmatch_ext.__file__).parents[1])}  # this copy of the package
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=float(SECONDS) + 300, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    assert all(sum(counts.values()) > 0 and counts.get("refused") for counts in found["kinds"].values()), found
    assert len(found["kinds"]) == 15 and [p.name for p in tmp_path.iterdir()] == ["files"]
