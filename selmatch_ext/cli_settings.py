"""Settings that a command is given as a whole: --settings and a run's settings.json, its folder, or a recipe's name."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from selmatch_ext import recipes
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.models import from_file
from selmatch_ext.provenance import from_dict
from selmatch_ext.ranges import Seed, check_number
from selmatch_ext.runner import Run
from selmatch_ext.settings import Data, StartParts

OF_THE_SET = Data(dataset="of the set")
"""Stands for the data set that a set's file names."""


@dataclass(frozen=True)
class Place:
    """Where results go, and where to compute."""

    out: Path
    """Folder for the results."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""


@dataclass(frozen=True)
class WithExperts(Place):
    """Where results go, where to compute, and where the expert trajectories are."""

    experts: Path | None = None
    """Folder of the expert store, for methods that match trajectories or start from trained networks."""
    experts_model: str | None = None
    """The network of the experts, where it is a function of yours (package.module:function)."""


Here = Annotated[Place, tyro.conf.arg(name="")]


def given_run(arguments: list[str], with_method: Collection[str]) -> tuple[Run | None, list[str]]:
    """The run that --settings names, None where it is not given, and the other words of the command. Where the verb is
    one of `with_method` and names no method, that of the run is added.

    Raises ValueError as `Run.load` and `recipes.find` do."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--settings")
    parser.add_argument("--reduced", action="store_true")
    chosen, words = parser.parse_known_args(arguments)
    if chosen.settings is None:
        if chosen.reduced:
            raise ValueError("--reduced needs --settings and the name of a recipe")
        return None, arguments
    verb = words[0] if words else ""
    named = words[1] if len(words) > 1 and verb in with_method and not words[1].startswith("-") else None
    if verb == "demo":
        named = recipes.RECIPES[recipes.DEMO].method
    run = _find(chosen.settings, named, verb in with_method or verb == "demo")
    if chosen.reduced:
        run = recipes.reduced(run)
    if verb in with_method and named is None:
        words = [words[0], run.method, *words[1:]]
    return run, words


def _find(given: str, method: str | None, whole: bool) -> Run:
    if given in recipes.RECIPES or not Path(given).exists():
        if "/" in given or given.endswith(".json"):
            raise FileNotFoundError(f"--settings {given}: there is no such folder or file")
        recipe = recipes.find(given)
        run = recipe.settings
        if whole and recipe.method == recipes.SELECT:
            raise ValueError(
                f"the recipe {given} selects real images and learns none: selmatch select --settings {given} --out "
                f"DIR, then selmatch evaluate DIR/{run.start.select}.safetensors --settings {given}"
            )
        if method not in (None, run.method):
            raise ValueError(f"the recipe {given} is of the method {run.method}, not {method}")
        return run
    run = Run.load(given, method, whole)
    return replace(run, data=replace(run.data, download=False, cache=None))  # a file does not choose these


def check_named_networks(run: Run, parts: Collection[str], words: list[str]) -> None:
    """Raises ValueError for a network in one of the verb's parts (`settings_by_name`) that is a function of a module of
    Python, unless the command names it too: a data file does not choose which code runs."""
    trusted = {value for word in words for value in (word, word.partition("=")[2])}
    for name, value in _networks(run):
        part = name.partition(".")[0] if "." in name else "settings"
        if part in parts or (part == "start" and {name.split(".")[1], "parts"} & set(parts)):
            from_file.checked_name(value, f"the setting {name}", f"--{name.replace('_', '-')}", trusted)


def _networks(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(option, value) of each setting that names a network."""
    found = []
    for field in fields(settings):
        value, option = vars(settings)[field.name], f"{prefix}{field.name}"
        if is_dataclass(value):
            found += _networks(value, "" if field.name == "settings" else f"{option}.")
        elif field.name == "model":
            found.append((option, value))
    return found


def settings_by_name(run: Run) -> dict[str, Any]:
    """The parts of a run by the names that verbs have for them."""
    parts = {field.name: getattr(run, field.name) for field in fields(run) if field.name != "method"}
    common = StartParts(**{field.name: getattr(run.start, field.name) for field in fields(StartParts)})
    return parts | {"scores": run.start.scores, "features": run.start.features, "parts": common}


def data_of(data: Data, path: Path, seed: int) -> tuple[Data, int]:
    """The data settings that the set in the file `path` was made with, and the seed that drew test_share, held_out and
    per_class, where `data` does not name a data set; what else differs from the defaults in `data` counts. Else `data`
    and `seed`. Nothing is downloaded or cached because a file says so.

    Raises ValueError where the file does not say of which data set it is."""
    if data.dataset != OF_THE_SET.dataset:
        return data, seed
    settings = DistilledSet.load(path).settings
    given = settings.get("data")
    if not isinstance(given, dict) or "dataset" not in given:
        raise ValueError(f"{path} does not say of which data set it is; name it by --data.dataset")
    check_number("seed", settings.get("seed"), Seed)
    known = replace(from_dict(Data, given, f"{path}: settings.data"), download=False, cache=None)
    changed = {f.name: getattr(data, f.name) for f in fields(data)}
    changed = {name: value for name, value in changed.items() if value != getattr(OF_THE_SET, name)}
    return replace(known, **changed), settings["seed"]
