"""Table and plot of the accuracies that run.sh has left in a folder: `python table.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from selmatch_ext import report
from selmatch_ext.evaluation import Accuracy
from selmatch_ext.files import read_json, write_json, write_text
from selmatch_ext.selection.coreset import BY_SCORE
from selmatch_ext.settings import SELECTIONS


def collect(folder: Path) -> dict[str, dict[int, Accuracy]]:
    """{selection: {images per class: accuracy}} of the records FOLDER/SELECTION-IPC/accuracy.json."""
    found: dict[str, dict[int, Accuracy]] = {}
    for path in folder.glob("*/accuracy.json"):
        name, _, ipc = path.parent.name.rpartition("-")
        if name in SELECTIONS and ipc.isdecimal():
            found.setdefault(name, {})[int(ipc)] = Accuracy([row[0] for row in read_json(path)["accuracies"]])
    order = sorted(found, key=lambda name: (name in BY_SCORE, SELECTIONS.index(name)))
    return {name: dict(sorted(found[name].items())) for name in order}


def main(folder: Path) -> None:
    """Writes folder/results.json, table.md and curves.png, and prints the table."""
    results = collect(folder)
    if not results:
        raise SystemExit(f"{folder} has no records SELECTION-IPC/accuracy.json; run run.sh first")
    sizes = sorted({ipc for row in results.values() for ipc in row})
    rows = [["selection", *(f"{ipc} a class" for ipc in sizes), ""]]
    for name, row in results.items():
        shown = [str(row[ipc]) if ipc in row else "" for ipc in sizes]
        rows.append([name, *shown, "hardest images" if name in BY_SCORE else ""])
    write_json(folder / "results.json", {n: {str(k): a.values for k, a in row.items()} for n, row in results.items()})
    write_text(folder / "table.md", f"Test accuracy of networks trained on real images\n\n{report.markdown(rows)}\n")
    curves = {name: {ipc: (a.mean, a.std) for ipc, a in row.items()} for name, row in results.items()}
    report.plot_curves(curves, folder / "curves.png", "images per class", "test accuracy (%)")
    print(report.table(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
