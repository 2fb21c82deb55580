"""Measurements, one file a question; `python -m bench` runs them all.

Each file has run(setting) -> dict of figures, and summary(figures) -> rows (what was measured, the figure, the goal).
DEVICES, where a file has it, names the devices that it measures on; else it measures on both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))  # for `import reference`
