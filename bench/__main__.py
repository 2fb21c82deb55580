"""Runs every measurement and prints one table, then one JSON line with all figures.

python -m bench [--json FILE] [name ...]      names: augment, block, distance, shared, unroll; all without any
"""

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

import torch

import bench
import selmatch_ext as sm

HELPERS = {"__main__", "networks", "timing"}


def measurements() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if module.name not in HELPERS)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(measurements())}")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    unknown = set(options.names) - set(measurements())
    if unknown:
        parser.error(f"no measurement {', '.join(sorted(unknown))}; there are {', '.join(measurements())}")
    figures = {"build": sm.build_info(), "torch": torch.__version__}
    rows = []
    for name in options.names or measurements():
        module = importlib.import_module(f"bench.{name}")
        print(f"measuring {name} ...", flush=True)
        figures[name] = module.run()
        rows += [(name, *row) for row in module.summary(figures[name])]
    print_table(rows)
    text = json.dumps(figures)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def print_table(rows: list[tuple[str, str, str, str]]):
    """rows: (measurement, what was measured, figure, goal)."""
    table = [("", "", "measured", "goal"), *rows]
    widths = [max(len(row[k]) for row in table) for k in range(4)]
    for name, what, figure, goal in table:
        print(f"{name:<{widths[0]}}  {what:<{widths[1]}}  {figure:>{widths[2]}}  {goal}".rstrip())


if __name__ == "__main__":
    main()
