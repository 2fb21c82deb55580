"""What a file or folder was made from, and whether that is what is asked for now.

A run's folder holds its settings (`claim`) and what its images are (`record_images`); every other file holds what it
was made from (`check_same`).
"""

from __future__ import annotations

import functools
import itertools
import json
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from selmatch_ext import ranks, strict_json
from selmatch_ext.files import check_writable, plain, read_json, remove_abandoned, write_json
from selmatch_ext.output import say
from selmatch_ext.ranges import SettingError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from selmatch_ext.data.images import ImageData

Settings = TypeVar("Settings", bound="DataclassInstance")
NAMES = ("data", "dataset")
"""Keys of the data set's name in what a file was made from."""
CONTENT = "images"
"""Key of the digest, or digests, of its images."""

PLACES = ("data.dataset", "data.root", "data.download", "data.cache")
"""Settings that say where the images are stored. Whether the images are the same is decided by their digests."""

_LEARNED = ("checkpoint.safetensors", "stopped.safetensors", "distilled.safetensors", "snapshots/*.safetensors")
_END = ("results.json",)
_CHOSEN = ("*.safetensors", *_LEARNED, *_END)
DEPEND = {
    "start": ("window/*.json", *_CHOSEN),
    "start.scores": ("scores.npz", "window/*.json", *_CHOSEN),
    "start.window": ("window/*.json", *_CHOSEN),
    "start.features": ("features/*.safetensors", *_CHOSEN),
    "experts": ("experts/*.safetensors", *_LEARNED, *_END),
    "settings": (*_LEARNED, *_END),
    "method": (*_LEARNED, *_END),
    "evaluation": ("window/*.json", "evaluation_*.json", *_END),
}
"""Of each part of the settings, the files that depend on it. What is not here (data, seed) all files depend on."""
_ALL = tuple(dict.fromkeys(pattern for patterns in DEPEND.values() for pattern in patterns))


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Checks, before any work, that `folder` can be written, and that no stage that has begun there was made with
    other settings: ValueError naming what differs. Where images lie is left to `record_images`."""
    check_writable(folder / "settings.json")
    changed = [line for line in other_settings(folder, settings) if _name(line) not in PLACES]
    changed = [line for line in changed if has_begun(folder, _name(line))]
    if changed:
        raise ValueError(f"{folder} holds a run with other settings ({listed(changed)}); choose another --out")
    if ranks.first():
        remove_abandoned(folder)


def record_images(folder: Path, settings: dict[str, Any], data: ImageData) -> ImageData:
    """Writes folder/settings.json and data.json, which says what the images are, after `claim`; says in a line what
    was corrected. Returns `data` under the name that the run knows it by.

    Raises ValueError when the images are others than the run was begun with."""
    path, now = folder / "data.json", {"name": data.name, "train": data.train.digest(), "test": data.test.digest()}
    changed = other_settings(folder, settings)
    if has_begun(folder, "data"):
        places = [line for line in changed if _name(line) in PLACES[:2]]
        known = read_json(path, "name", "train", "test") if path.exists() else None
        if known is None and places:
            raise ValueError(f"{folder} holds a run with other settings ({listed(places)}); choose another --out")
        if known is not None and (known["train"], known["test"]) != (now["train"], now["test"]):
            moved = f" ({listed(places)})" if places else ""
            raise ValueError(
                f"{folder} holds a run on other images than those of {data.name}{moved}; choose another --out"
            )
        if known is not None:
            now["name"] = known["name"]
    if changed and ranks.first():
        say(f"{folder} continues with other settings: {listed(changed)}")
    ranks.barrier()
    if ranks.first():
        write_json(path, now)
        write_json(folder / "settings.json", settings)
    return replace(data, name=now["name"])


def has_begun(folder: Path, name: str) -> bool:
    """Whether `folder` has files that depend on the setting of that name, such as experts.training.lr."""
    parts = [part for part in DEPEND if name == part or name.startswith(f"{part}.")]
    return any(next(folder.glob(pattern), None) for pattern in (DEPEND[max(parts, key=len)] if parts else _ALL))


def set_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Renames `folder` to folder.1, folder.2 and so on where it holds a run with other settings."""
    if ranks.first() and other_settings(folder, settings):
        names = (folder.with_name(f"{folder.name}.{n}") for n in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))
    ranks.barrier()


def other_settings(folder: Path, settings: dict[str, Any]) -> list[str]:
    """What the run in `folder` was begun with that differs from `settings`; nothing if there is no run."""
    path = folder / "settings.json"
    return differences(read_json(path), settings) if path.exists() else []


def _name(line: str) -> str:
    """The setting that a line of `differences` is about."""
    return line.partition(":")[0]


def changes(made_from: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines of `differences` between what a file was made from and `now`, for the keys of `now`. Where both say the
    digest of the images, the name of the data set does not count: a folder may have moved. Where one of them does not
    say it, as imported experts, the name has to do."""
    unused = NAMES if CONTENT in made_from and CONTENT in now else (CONTENT,)
    compared = {key: value for key, value in now.items() if key not in unused}
    as_read = json.loads(json.dumps(compared))  # tuples are lists
    return differences({key: made_from.get(key) for key in as_read}, as_read)


def check_same(path: str | Path, made_from: Any, now: Mapping[str, Any]) -> dict[str, Any]:
    """ValueError naming what differs unless the file at `path` was made from what is asked for now (`changes`).

    made_from: what the file says, a dictionary, which is returned."""
    saved = strict_json.mapping(made_from, f"{path}: what it was made from")
    changed = changes(saved, now)
    if changed:
        raise ValueError(f"{path} was made with other settings ({listed(changed)}); choose another --out or delete it")
    return saved


def known_name(made_from: Mapping[str, Any], name: str, where: Path) -> str:
    """The name under which a file without `changes` knows the data set; says so in a line, once for each `where`, if it
    is not `name`. Files that are added to it keep that name."""
    known = next((made_from[key] for key in NAMES if isinstance(made_from.get(key), str)), name)
    if known != name:
        _say_once(str(where), known, name)
    return known


@functools.cache
def _say_once(where: str, known: str, name: str) -> None:
    say(f"{where} knows the images of {plain(name)} as those of {plain(known)}: they are the same")


def of_images(data: ImageData) -> dict[str, Any]:
    """What identifies a data set's training images in what a file was made from, wherever they lie and however they are
    called."""
    return {"images": data.train.digest(), "zca": data.whitening is not None}


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested plain dictionary of a settings object as JSON has it, with lists for tuples."""
    return asdict(settings, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items})


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values of the settings in which two `to_dict` results differ, as 'name: old → new' lines."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{_shown(key)}: {_shown(a)} → {_shown(b)}")
    return lines


def listed(lines: list[str]) -> str:
    """Lines of `differences` in one, the first 20 of them."""
    return "; ".join(lines if len(lines) <= 20 else [*lines[:20], f"and {len(lines) - 20} more"])


def _shown(value: Any) -> str:
    """`value` as printable text of at most 500 characters, for a one-line message."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 500 else f"{text[:500]}..."


def from_dict(kind: type[Settings], given: Any, where: str, default: Settings | None = None) -> Settings:
    """The settings object of class `kind` whose `to_dict` is `given`. What is missing is as in `default`, or as in the
    class. where: the file, for messages.

    Raises ValueError naming the setting where it is unknown, and where its value has the wrong type or is out of
    range."""
    unknown = strict_json.mapping(given, where).keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{where}: {', '.join(sorted(map(_shown, unknown)))} is no setting of {kind.__name__}")
    hints, base = get_type_hints(kind), kind() if default is None else default
    values: dict[str, Any] = {}
    for name, value in given.items():
        place, now = f"{where}: {name}", getattr(base, name)
        if is_dataclass(now) and not isinstance(now, type):
            values[name] = from_dict(type(now), value, place, now)
        elif _fits(value, hints[name]):
            values[name] = tuple(value) if isinstance(value, list) else value
        else:
            raise ValueError(f"{place} is {_shown(value)}, which is not of its type, {_type_name(hints[name])}")
    try:
        return replace(base, **values)
    except SettingError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a setting's type. Ranges are not looked at."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inside)
    if origin is Literal:
        return value in inside
    if origin is tuple:
        return isinstance(value, list) and all(_fits(v, inside[0]) for v in value)
    allowed = (int, float) if hint is float else origin or hint
    return isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)).replace("typing.", "")
