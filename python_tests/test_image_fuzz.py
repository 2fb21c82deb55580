"""Random damage to image files and archives; `fuzz_images.py` runs longer, with other seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_images

import selmatch_ext


def test_damaged_images_and_archives_are_read_or_refused_in_one_line(tmp_path):
    """SELMATCH_FUZZ_SEED and SELMATCH_FUZZ_COUNT change which mutants are tried, and how many."""
    seed, count = (
        os.environ.get(f"SELMATCH_FUZZ_{name}", default) for name, default in (("SEED", "0"), ("COUNT", "300"))
    )
    arguments = [str(tmp_path / "fuzz"), "--seed", seed, "--count", count]
    environment = {**os.environ, "PYTHONPATH": str(Path(selmatch_ext.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, fuzz_images.__file__, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    read, refused = (sum(n for kind, n in counts.items() if kind.endswith(what)) for what in (" read", " refused"))
    assert read + refused == counts["mutants"] == int(count) and read > 0.05 * int(count) and refused > 0.3 * int(count)
