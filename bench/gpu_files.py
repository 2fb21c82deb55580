"""Writing figures so that a run that is cut off leaves whole files. (Without torch: `make gpu` begins
before the package is built.)"""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replaces the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)
