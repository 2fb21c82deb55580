"""What the studies share: the sets in files under names that differ, and the files that results are written to.

Each study trains many networks by `evaluate`, keeps the record of every finished one in its folder, so that a killed
call continues, and writes a JSON file, a table in Markdown and a PNG beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from selmatch_ext import report
from selmatch_ext.data.distilled import DistilledSet, seen_as, training_set
from selmatch_ext.data.images import ImageData
from selmatch_ext.files import write_json, write_text
from selmatch_ext.output import say


def named(paths: list[Path]) -> dict[str, Path]:
    """A name for each path: that of the file or folder, with as many folders above it as make all names differ."""
    if not paths:
        raise ValueError("no set is given; it takes one or more .safetensors files")
    parts = [Path(str(path.resolve()).removesuffix(".safetensors")).parts[1:] for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(f"the same set is given twice among {', '.join(map(str, paths))}")
    depth = next(d for d in range(1, 1 + max(map(len, parts))) if len({p[-d:] for p in parts}) == len(parts))
    return {"_".join(p[-depth:]): path for p, path in zip(parts, paths, strict=True)}


def load_sets(paths: list[Path], data: ImageData, load: Callable[[Path], DistilledSet]) -> dict[str, DistilledSet]:
    """The sets in files by their labels. ValueError for one that does not fit `data`, before anything is trained."""
    sets = {label: load(path) for label, path in named(paths).items()}
    for subset in sets.values():
        seen_as(subset, data)
    return sets


def without_schedule(path: Path) -> DistilledSet:
    """The set in a file, for networks other than that of its schedule."""
    return replace(training_set(path), schedule=None)


def as_means(results: dict) -> dict:
    """Accuracies as they are written in JSON."""
    return {label: {str(k): {"mean": a.mean, "std": a.std} for k, a in r.items()} for label, r in results.items()}


def write(folder: Path, name: str, rows: list[list[str]], made: Any) -> None:
    """Writes folder/NAME.json and the table folder/NAME.md, which is printed as well."""
    write_json(folder / f"{name}.json", made)
    write_text(folder / f"{name}.md", report.markdown(rows) + "\n")
    say(report.table(rows))
