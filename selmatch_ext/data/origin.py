"""Which images a file was made from. Their content decides; the data set's name is only for people to read, and it
changes when a folder is moved or renamed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selmatch_ext.files import plain
from selmatch_ext.output import say
from selmatch_ext.settings import differences

NAMES = ("data", "dataset")  # keys of the data set's name
CONTENT = "images"  # key of the digest, or digests, of its images


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines of `differences` between what a file says of how it was made and `now`, for the keys of `now`. Where both
    say the digest of the images, the name of the data set does not count; where one of them does not say it, as
    imported experts and files of earlier versions, the name has to do."""
    unused = NAMES if CONTENT in saved and CONTENT in now else (CONTENT,)
    compared = {key: value for key, value in now.items() if key not in unused}
    return differences({key: saved.get(key) for key in compared}, compared)


def known_name(saved: Mapping[str, Any], name: str, where: Path) -> str:
    """The name under which a file without `changes` knows the data set; says so in a line, once for each `where`, if it
    is not `name`. Files that are added to it keep that name."""
    known = next((saved[key] for key in NAMES if isinstance(saved.get(key), str)), name)
    if known != name:
        _say_once(str(where), known, name)
    return known


@functools.cache
def _say_once(where: str, known: str, name: str) -> None:
    say(f"{where} knows the images of {plain(name)} as those of {plain(known)}: they are the same")
