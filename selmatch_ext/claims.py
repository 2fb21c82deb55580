"""Whose run a folder holds: which settings it was begun with, and which of them may still be corrected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from selmatch_ext import ranks
from selmatch_ext.data.images import ImageData
from selmatch_ext.files import check_writable, read_json, remove_abandoned, write_json
from selmatch_ext.output import say
from selmatch_ext.settings import differences

PLACES = ("data.dataset", "data.root", "data.download", "data.cache")
"""Settings that say where the images lie. Whether they are the same is asked of the images."""

_LEARNED = ("checkpoint.safetensors", "stopped.safetensors", "distilled.safetensors", "snapshots/*.safetensors")
_END = ("results.json",)
DEPEND = {
    "scores": ("scores.npz", "window/*.json", "*.safetensors", *_LEARNED, *_END),
    "window": ("window/*.json", "*.safetensors", *_LEARNED, *_END),
    "features": ("features/*.safetensors", "*.safetensors", *_END),
    "experts": ("experts/*.safetensors", *_LEARNED, *_END),
    "matching": (*_LEARNED, *_END),
    "settings": (*_LEARNED, *_END),
    "evaluation": ("window/*.json", "evaluation_*.json", *_END),
}
"""Of each part of the settings, the files that depend on it. What is not here (data, seed) all files depend on."""
_ALL = tuple(dict.fromkeys(pattern for patterns in DEPEND.values() for pattern in patterns))


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Checks, before any work, that `folder` can be written, and that no stage that has begun there was made with
    other settings: ValueError naming what differs. Where images lie is left to `recognize`."""
    check_writable(folder / "settings.json")
    changed = [line for line in other_settings(folder, settings) if _name(line) not in PLACES]
    changed = [line for line in changed if has_begun(folder, _name(line))]
    if changed:
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(changed)}); choose another --out")
    if ranks.first():
        remove_abandoned(folder)


def recognize(folder: Path, settings: dict[str, Any], data: ImageData) -> ImageData:
    """Writes folder/settings.json and data.json, which says what the images are, after `claim`; says in a line what
    was corrected. Returns `data` under the name that the run knows it by.

    Raises ValueError when the images are others than the run was begun with."""
    path, now = folder / "data.json", {"name": data.name, "train": data.train.digest(), "test": data.test.digest()}
    changed = other_settings(folder, settings)
    if has_begun(folder, "data"):
        places = [line for line in changed if _name(line) in PLACES[:2]]
        known = read_json(path, "name", "train", "test") if path.exists() else None
        if known is None and places:
            raise ValueError(f"{folder} holds a run with other settings ({'; '.join(places)}); choose another --out")
        if known is not None and (known["train"], known["test"]) != (now["train"], now["test"]):
            moved = f" ({'; '.join(places)})" if places else ""
            raise ValueError(
                f"{folder} holds a run on other images than those of {data.name}{moved}; choose another --out"
            )
        if known is not None:
            now["name"] = known["name"]
    if changed and ranks.first():
        say(f"{folder} continues with other settings: {'; '.join(changed)}")
    ranks.barrier()
    if ranks.first():
        write_json(path, now)
        write_json(folder / "settings.json", settings)
    return replace(data, name=now["name"])


def has_begun(folder: Path, name: str) -> bool:
    """Whether `folder` has files that depend on the setting of that name, such as experts.training.lr."""
    return any(next(folder.glob(pattern), None) for pattern in DEPEND.get(name.partition(".")[0], _ALL))


def other_settings(folder: Path, settings: dict[str, Any]) -> list[str]:
    """What the run in `folder` was begun with that differs from `settings`; nothing if there is no run."""
    path = folder / "settings.json"
    return differences(read_json(path), settings) if path.exists() else []


def _name(line: str) -> str:
    """The setting that a line of `differences` is about."""
    return line.partition(":")[0]
