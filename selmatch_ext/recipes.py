"""The cells of the papers' tables as named settings (`selmatch recipes`), each also at a scale for a laptop. They are
in recipes.json."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from selmatch_ext import strict_json
from selmatch_ext.files import read_json
from selmatch_ext.methods.base import LoopSettings
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.distribution import DMSettings
from selmatch_ext.methods.frepo import FRePoSettings
from selmatch_ext.methods.gradient import DCSettings
from selmatch_ext.methods.kip import KIPSettings
from selmatch_ext.methods.mtt import MTTSettings
from selmatch_ext.methods.selmatch import SelMatch
from selmatch_ext.provenance import from_dict
from selmatch_ext.runner import Run
from selmatch_ext.selection import coreset
from selmatch_ext.selection.difficulty import COMPUTED
from selmatch_ext.settings import Evaluation, Scores, Training

SELECT = "select"
DEMO = "selmatch-digits-ipc6"
_TABLE = Path(__file__).with_name("recipes.json")
_ROW = ("row", "data", "method", "suffix", "source", "bases", "settings", "by_ipc", "published", "names", "ours")
_OURS = ("mean", "std", "file", "key", "scale", "machine")


@dataclass(frozen=True)
class Ours:
    """What a committed run of this package found for a recipe, at a smaller scale: test accuracy and standard deviation
    over its networks in %, the file and the key in it, and in words scale and machine."""

    mean: float
    std: float
    file: str
    key: str
    scale: str
    machine: str


@dataclass(frozen=True, eq=False)
class Recipe:
    """One cell of a published table. row: its row there, which is the method's name or that of a variant or selection;
    method: of METHODS, or SELECT for real images that are selected and not learned; data: the data set in lower case.
    published: test accuracy in %, None where it is not known; source: the table that has it."""

    name: str
    row: str
    method: str
    data: str
    published: float | None
    source: str
    ours: Ours | None
    given: dict[str, Any] = field(repr=False)

    @cached_property
    def settings(self) -> Run:
        """What it is run with: the method's defaults, and what the table changes. For SELECT, method and experts are
        not used."""
        method = SelMatch.name if self.method == SELECT else self.method
        return from_dict(Run, self.given, f"recipe {self.name}", Run.of(method))


def _read(path: Path) -> Iterator[Recipe]:
    """The recipes in a file: {"bases": {name: {"settings", "by_ipc"}}, "rows": [{"row", "data", "published": {ipc: % or
    null}, …}]}. A cell's settings are those of its row's bases in their order, then the row's own; of each first
    "settings", then what "by_ipc" has for its number of images per class. Raises ValueError naming what is wrong."""
    table = read_json(path, "bases", "rows")
    bases = {name: _known(base, ("settings", "by_ipc"), f"{path}: {name}") for name, base in table["bases"].items()}
    for number, given in enumerate(table["rows"]):
        where = f"{path}: row {number}"
        row = _known(given, _ROW, where)
        missing = [name for name in ("row", "data", "published") if name not in row]
        unknown = [name for name in row.get("bases", []) if name not in bases]
        if missing or unknown:
            raise ValueError(f"{where} lacks {', '.join(missing)}" if missing else f"{where}: no base {unknown[0]}")
        parts = [*(bases[name] for name in row.get("bases", [])), row]
        for ipc, published in row["published"].items():
            if published is not None:
                (published,) = strict_json.numbers([published], f"{where}: published {ipc}", 1)
            settings = dict[str, Any]()
            for part in parts:
                settings = _merged(settings, part.get("settings", {}))
                settings = _merged(settings, part.get("by_ipc", {}).get(ipc, {}))
            name = row.get("names", {}).get(ipc, f"{row['row']}-{row['data']}-ipc{ipc}{row.get('suffix', '')}")
            ours = row.get("ours", {}).get(ipc)
            yield Recipe(
                name=name,
                row=row["row"],
                method=row.get("method", SELECT),
                data=row["data"],
                published=published,
                source=row.get("source", ""),
                ours=None if ours is None else Ours(**_known(ours, _OURS, f"{where}: ours {ipc}")),
                given=_merged(settings, {"start": {"ipc": int(ipc)}}),
            )


def _known(value: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    unknown = strict_json.mapping(value, where).keys() - set(keys)
    if unknown:
        raise ValueError(f"{where} has {', '.join(sorted(unknown))}; allowed are {', '.join(keys)}")
    return value


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both; where both have a value the new one counts, and dictionaries are merged."""
    both = {key: _merged(old[key], new[key]) for key in old.keys() & new.keys() if isinstance(old[key], dict)}
    return {**old, **new, **both}


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _read(_TABLE)}


def find(name: str) -> Recipe:
    """ValueError with names that are near, for one that is not there."""
    if name not in RECIPES:
        near = [known for known in RECIPES if known.split("-")[0] == name.split("-")[0]]
        near = near or difflib.get_close_matches(name, RECIPES, n=5, cutoff=0.3)
        there = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"no recipe is named {name!r}{there} (all of them: selmatch recipes)")
    return RECIPES[name]


# --- reduced scale ----------------------------------------------------------------------------------------------------
#
# For all: a tenth of the training images (of data sets with more than 50 classes a fifth), networks of width 32 in
# place of wider ones and of ResNet18, 3 experts of 15 epochs, at most 3 evaluated networks of 60 epochs. Recipes of 5 %
# of the images and more have as large a share of them; scores are computed. Trajectory matching: 100 iterations of at
# most 20 steps. DC and DSA: 20 networks; DM: 200 iterations; all with 64 real images of a class. DD: 40 passes over the
# images. KIP and FRePo: 300 iterations. The figures are no reproduction, but compare methods.

_MANY_CLASSES = {"CIFAR100": 500, "tinyimagenet": 500}
_CLASS_SIZE = {
    "CIFAR10": 5000,
    "MNIST": 5421,
    "FashionMNIST": 6000,
    "SVHN": 4659,
    **_MANY_CLASSES,
}  # the smallest class


def narrow(model: str) -> str:
    """The name of a smaller network for --reduced: a ConvNet keeps depth and norm and gets width 32, a ResNet becomes
    a ConvNet of width 32 with the same norm, FRePo's network gets width 16. Other names stay as they are."""
    if model.startswith("ResNet"):
        return "ConvNetW32BN" if "BN" in model else "ConvNetW32"
    if model.startswith("ConvNet"):
        return "ConvNetW32" + re.sub(r"W\d+", "", model.removeprefix("ConvNet"))
    if model.startswith("FRePoNet"):
        return re.sub(r"(FRePoNet(?:D\d+)?)(?:W\d+)?", r"\1W16", model)
    return model


def reduced(settings: Run) -> Run:
    """The same at the scale described above."""
    kind = settings.data.dataset.partition(":")[0]
    if kind not in _CLASS_SIZE:
        raise ValueError(f"--reduced goes with the data sets {', '.join(_CLASS_SIZE)}; the settings have {kind}")
    per_class = _CLASS_SIZE[kind] // (5 if kind in _MANY_CLASSES else 10)
    training = Training(epochs=15, lr=0.02, momentum=0.9, batch=128)
    start, scores = settings.start, settings.start.scores
    if start.ipc >= 0.05 * _CLASS_SIZE[kind]:
        start = replace(start, ipc=max(2, round(start.ipc / _CLASS_SIZE[kind] * per_class)))
    if start.select in coreset.BY_DIFFICULTY:
        source = scores.source if scores.source in COMPUTED else "forgetting"
        start = replace(start, scores=Scores(source, narrow(scores.model), runs=1, training=training))
    if start.select in coreset.BY_NETWORK:
        model = narrow(start.features.model)
        start = replace(start, features=replace(start.features, model=model, training=training))
    brief = _BRIEF.get(settings.method)
    experts = replace(settings.experts, model=narrow(settings.experts.model), count=3, training=training)
    return replace(
        settings,
        data=replace(settings.data, per_class=per_class),
        start=start,
        experts=experts,
        settings=settings.settings if brief is None else brief(settings.settings, start.ipc),
        evaluation=_brief(settings.evaluation),
    )


def _brief_matching(settings: MTTSettings, ipc: int) -> MTTSettings:
    first = None if settings.first_max_start_epoch is None else 6
    return replace(
        settings,
        iterations=100,
        inner_steps=min(20, settings.inner_steps),
        expert_epochs=1,
        min_start_epoch=0,
        first_max_start_epoch=first,
        max_start_epoch=12,
        batch_syn=50,
        lr_images=300.0,
        lr_init=0.02,
        keep="activations",
    )


def _brief_gradients(settings: DCSettings, ipc: int) -> DCSettings:
    loops: dict[str, Any] = {} if ipc == 1 else {"outer_loop": 4, "inner_loop": 10}
    return replace(settings, model=narrow(settings.model), batch_real=64, iterations=20, **loops)


def _brief_features(settings: DMSettings, ipc: int) -> DMSettings:
    return replace(settings, model=narrow(settings.model), batch_real=64, iterations=200)


def _brief_unrolled(settings: DDSettings, ipc: int) -> DDSettings:
    return replace(settings, passes=40, halve_every=10, networks=1)


def _brief_kernels(settings: KIPSettings, ipc: int) -> KIPSettings:
    return replace(settings, iterations=300, batch_real=1000)


def _brief_pool(settings: FRePoSettings, ipc: int) -> FRePoSettings:
    return replace(
        settings, model=narrow(settings.model), iterations=300, batch_real=256, optimizer="adam", lr_images=0.01
    )


_BRIEF: dict[str, Callable[[Any, int], LoopSettings]] = {
    **dict.fromkeys(("mtt", "datm", "selmatch"), _brief_matching),
    **dict.fromkeys(("dc", "dsa"), _brief_gradients),
    "dm": _brief_features,
    "dd": _brief_unrolled,
    "kip": _brief_kernels,
    "frepo": _brief_pool,
}


def _brief(evaluation: Evaluation) -> Evaluation:
    training = replace(evaluation.training, epochs=60, batch=64, lr=min(evaluation.training.lr, 0.05))
    return replace(evaluation, model=narrow(evaluation.model), networks=min(3, evaluation.networks), training=training)


def listing(method: str | None = None, data: str | None = None) -> list[list[str]]:
    """The table of the recipes, header first. method: only rows of that name, and those that run that method; data:
    only those of that data set. Raises ValueError, with those that there are, for one that no recipe has."""
    found = list(RECIPES.values())
    methods, sets = ({r.row for r in found} | {r.method for r in found}), {r.data for r in found}
    for what, asked, known in (("method", method, methods), ("data", data, sets)):
        if asked is not None and asked.lower() not in known:
            raise ValueError(f"{what} is {asked!r}; there are {', '.join(sorted(known))}")
    rows = [["recipe", "method", "data", "published (%)", "source", "ours (%)", "scale and machine of ours"]]
    for r in found:
        if (method is None or method.lower() in (r.row, r.method)) and (data is None or data.lower() == r.data):
            shown = ["", ""]
            if r.ours is not None:
                shown = [f"{r.ours.mean:.1f} ± {r.ours.std:.1f}", f"{r.ours.scale}; {r.ours.machine}"]
            published = "" if r.published is None else str(r.published)
            rows.append([r.name, r.method, r.data, published, r.source, *shown])
    return rows
