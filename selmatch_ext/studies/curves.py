"""Curves of a sweep: what a user writes for one, and the runs that it stands for, one for each share."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from selmatch_ext.data.images import ImageData
from selmatch_ext.methods import find_method
from selmatch_ext.provenance import from_dict, to_dict
from selmatch_ext.runner import Run
from selmatch_ext.settings import SELECTIONS, Start, Sweep, Training

SELECT = "select"
ALL = "all"
"""The name of the line that all training images are."""
OF_ALL = ("data", "seed", "start.ipc")
"""Settings that all curves have in common."""


@dataclass(frozen=True)
class Curve:
    """One curve as a user writes it. kind: a method as `find_method` takes it, or SELECT. given: (setting, value as
    text), settings by the names of their options without the dashes in front."""

    name: str
    kind: str
    given: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Curve:
        """From [NAME=]KIND[,SETTING=VALUE]…; the name is the method's where none is given. Raises ValueError for
        another form, for a setting that is named twice or belongs to all curves, and as `find_method` does."""
        head, *parts = text.split(",")
        name, equals, kind = head.partition("=")
        kind = kind if equals else head
        method = kind if kind == SELECT else find_method(kind).name
        name = name if equals else method
        if not re.fullmatch(r"[\w.+-]+", name) or name in (ALL, ".", ".."):
            raise ValueError(
                f"the curve {text!r} is called {name!r}; a name consists of letters, digits, '.', '_', '+' and '-', "
                f"and {ALL} is the line of all training images"
            )
        given = dict[str, str]()
        for part in parts:
            setting, equals, value = part.partition("=")
            setting = setting.strip().replace("-", "_")
            if not equals or not setting or setting in given:
                what = "is given twice" if setting in given else "is not of the form SETTING=VALUE"
                raise ValueError(f"curve {name}: {part!r} {what}")
            if any(setting == own or setting.startswith(f"{own}.") for own in OF_ALL):
                raise ValueError(f"curve {name}: {setting} is the same for all curves; shares say how many images")
            if kind == SELECT and not setting.startswith(("start.", "evaluation.")):
                raise ValueError(f"curve {name} learns no images, so that {setting} has no effect")
            given[setting] = value
        return cls(name, kind, tuple(given.items()))

    def run(self, base: Run, ipc: int, number: int, shares: int) -> Run:
        """The run for share `number` of `shares`: the method's defaults for the choice of the start and the learned
        share, `base` for everything else, and the curve's own settings above both. Raises ValueError for a setting or
        a value that does not exist."""
        method = base.method if self.kind == SELECT else self.kind
        own = Start() if self.kind == SELECT else find_method(method).defaults.start
        parts = {name: getattr(base, name) for name in ("data", "experts", "evaluation", "seed")}
        start = replace(base.start, select=own.select, alpha=own.alpha, ipc=ipc)
        values = dict[str, Any]()
        for setting, text in self.given:
            of_share = _values(text)
            if len(of_share) not in (1, shares):
                raise ValueError(f"curve {self.name}: {setting} has {len(of_share)} values for {shares} shares")
            *path, last = setting.split(".") if "." in setting else ("settings", setting)
            place = values
            for part in path:
                place = place.setdefault(part, {})
            place[last] = of_share[number % len(of_share)]
        run = from_dict(Run, values, f"curve {self.name}", Run.of(method, start=start, **parts))
        if self.kind == SELECT and run.start.select not in SELECTIONS:
            raise ValueError(
                f"curve {self.name}: start.select is {run.start.select!r}; real images are selected by one of "
                f"{', '.join(SELECTIONS)}"
            )
        return run

    def has_epochs(self) -> bool:
        """Whether the curve says for each share how many epochs the evaluation has."""
        return any(name == "evaluation.training.epochs" and len(_values(text)) > 1 for name, text in self.given)


@dataclass(frozen=True)
class Cell:
    """One curve at one share. kind: whether its images are learned by the run's method, selected by the run's start, or
    all training images."""

    curve: str
    share: float
    kind: Literal["learned", "selected", "all"]
    run: Run

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.curve} at {100 * self.share:g} %"

    def settings(self) -> dict[str, Any]:
        """What its results are made from: the settings of the run that it uses."""
        whole = to_dict(self.run)
        unused = {"learned": (), "selected": ("method", "settings", "experts")}.get(
            self.kind, ("method", "settings", "experts", "start")
        )
        return {name: value for name, value in whole.items() if name not in unused}


def cells(settings: Sweep, base: Run, data: ImageData) -> list[Cell]:
    """All cells, curve by curve with the shares ascending, and the one of all training images at the end.

    base: what all have in common (its method and settings are not used). Networks are trained on every set with the
    same number of updates, within half an epoch: that of base.evaluation on the smallest set. Raises ValueError for
    curves and shares that make no sense together, or that need more images than a class has."""
    shares, size = settings.shares, len(data.train) / data.classes
    curves = [Curve.parse(text) for text in settings.curves]
    names = [curve.name for curve in curves]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not curves or twice is not None:
        raise ValueError("curves is empty" if twice is None else f"two curves are called {twice}; write NAME={twice},…")
    if not shares or any(a >= b for a, b in zip(shares, shares[1:], strict=False)):
        raise ValueError(f"shares are {', '.join(f'{s:g}' for s in shares) or 'none'}; they must ascend")
    ipcs = [max(1, round(share * size)) for share in shares]
    found = []
    for curve in curves:
        for i, (share, ipc) in enumerate(zip(shares, ipcs, strict=True)):
            run = curve.run(base, ipc, i, len(shares))
            if not curve.has_epochs():
                run = _with_updates(run, ipcs[0] * data.classes, ipc * data.classes)
            found.append(Cell(curve.name, share, "selected" if curve.kind == SELECT else "learned", run))
    return [*found, Cell(ALL, 1.0, "all", _with_updates(base, ipcs[0] * data.classes, len(data.train)))]


def _with_updates(run: Run, smallest: int, images: int) -> Run:
    """The run with as many epochs of evaluation as give a set of `images` the updates that its own number of epochs
    gives a set of `smallest`."""
    training = run.evaluation.training
    training = replace(training, epochs=same_updates(training, smallest, images))
    return replace(run, evaluation=replace(run.evaluation, training=training))


def same_updates(training: Training, smallest: int, images: int) -> int:
    """Epochs on `images` images with as many updates as `training` makes on `smallest` images, rounded."""
    updates = training.epochs * -(-smallest // training.batch)
    return max(1, round(updates / -(-images // training.batch)))


def _values(text: str) -> list[Any]:
    """The value that is meant by `text`, or one for each share where it is numbers between colons."""
    several = [_value(part) for part in text.split(":")]
    if len(several) > 1 and not any(isinstance(value, str) for value in several):
        return several
    return [_value(text)]


def _value(text: str) -> Any:
    """A number, True, False or None where `text` is one, else the text itself."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text
    return value if value is None or isinstance(value, bool | int | float) else text
