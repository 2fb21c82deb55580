"""Runs every measurement and prints one table, then one JSON line with all figures.

python -m bench [--device cpu|cuda] [--quick] [--json FILE] [name ...]      all measurements of the device without names
"""

import argparse
import importlib
import json
import pkgutil
import sys
import time
import traceback
from pathlib import Path

import torch

import bench
import selmatch_ext as sm
from bench import peaks
from bench.gpu_files import write
from bench.timing import Setting, machine

HELPERS = {"__main__", "checks", "gpu", "gpu_files", "gpu_stages", "peaks", "sanitized", "timing"}
APART = {"equal_time", "networks"}  # questions that are not part of every run


def measurements() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if module.name not in HELPERS | APART)


def chosen(parser: argparse.ArgumentParser, names: list[str], device: str) -> dict:
    """The modules to run by name; an error of the parser for names and devices that do not exist."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or ":" not in device):
        parser.error(f"--device must be cpu, cuda or cuda:NUMBER, got {device!r}")
    unknown = sorted(set(names) - set(measurements()))
    if unknown:
        parser.error(f"no measurement {', '.join(unknown)}; there are {', '.join(measurements())}")
    if kind == "cuda" and (not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count()):
        parser.error(f"--device {device}: torch finds {torch.cuda.device_count()} CUDA devices on this machine")
    modules = {name: importlib.import_module(f"bench.{name}") for name in names or measurements()}
    elsewhere = [name for name, module in modules.items() if kind not in getattr(module, "DEVICES", ("cpu", "cuda"))]
    if names and elsewhere:
        parser.error(f"{', '.join(elsewhere)}: not measured on {kind}, only on the CPU")
    return {name: module for name, module in modules.items() if name not in elsewhere}


def keeps_memory(module) -> bool:
    """Whether a module measures in a process that keeps the memory it frees: fresh pages for every result cost both
    sides time, and more at one time than at another. Such a process stays one, so these come last."""
    return getattr(module, "KEEPS_MEMORY", True)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(measurements())}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repetition: shows that everything runs")
    parser.add_argument("--json", type=Path, help="write the figures there as well, after each measurement")
    options = parser.parse_args()
    modules = chosen(parser, options.names, options.device)
    setting = Setting(options.device, options.quick)
    if setting.gpu:
        torch.cuda.set_device(torch.device(options.device).index or 0)
    figures = {"build": sm.build_info(), "machine": machine(), "device": options.device, "quick": options.quick}
    figures["notes"] = setting.notes
    figures["peaks"] = peaks.measured(setting)
    rows = [("", *row) for row in peaks.rows(figures["peaks"])]
    failed = []
    for name, module in sorted(modules.items(), key=lambda item: keeps_memory(item[1])):
        if keeps_memory(module):
            sm.keep_memory()
        begin = time.perf_counter()
        try:
            figures[name] = module.run(setting)
            rows += [(name, *row) for row in module.summary(figures[name])]
        except Exception as error:  # the other measurements are worth having
            traceback.print_exc()
            figures[name] = {"error": f"{type(error).__name__}: {error}"}
            rows.append((name, "failed", figures[name]["error"].splitlines()[0], ""))
            failed.append(name)
        print(f"measured {name} ({time.perf_counter() - begin:.0f} s)", flush=True)
        if options.json:
            write(options.json, json.dumps(figures))
    print_table(rows)
    for note in setting.notes:
        print(f"note: {note}")
    print(json.dumps(figures))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def print_table(rows: list[tuple[str, str, str, str]]):
    """rows: (measurement, what was measured, figure, goal)."""
    table = [("", "", "measured", "goal"), *rows]
    widths = [max(len(row[k]) for row in table) for k in range(4)]
    for name, what, figure, goal in table:
        print(f"{name:<{widths[0]}}  {what:<{widths[1]}}  {figure:>{widths[2]}}  {goal}".rstrip())


if __name__ == "__main__":
    main()
