"""Names of files and classes, whatever bytes they consist of, as text that can be printed, saved as JSON and drawn."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from difflib import get_close_matches

UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, surrogates, line and paragraph ends


def readable(name: str) -> str:
    r"""`name` with what cannot be printed written as escapes.

    Python decodes a byte of a file name that is not UTF-8 to a lone surrogate, which can be neither printed nor
    encoded. Here the bytes caf\xe9 become the text "caf\xe9" with a backslash, a newline becomes \x0a, and other text
    stays as it is.
    """
    return name if name.isprintable() else "".join(map(_escaped, name))


def unique_names(names: Iterable[str]) -> list[str]:
    """`readable` names in the same order; where two of them would be equal, the later ones end in (2), (3) …"""
    found: dict[str, None] = {}
    for name in map(readable, names):
        candidate, number = name, 1
        while candidate in found:
            number += 1
            candidate = f"{name} ({number})"
        found[candidate] = None
    return list(found)


def positions(wanted: Collection[str], names: list[str], where: str) -> list[int]:
    """Where the classes `wanted` are among `names`, ascending. Raises ValueError for one that is not there, with those
    that are spelled nearly alike, and for fewer than two."""
    plain = {name.lower(): name for name in reversed(names)}
    unknown = [name for name in wanted if name not in names]
    if unknown:
        near = list({plain[match]: 0 for name in unknown for match in get_close_matches(name.lower(), plain)})
        hint = f"nearly alike are {shortened(near, 6)}" if near else f"there are {shortened(names, 10)}"
        raise ValueError(f"classes: {where} has no class {shortened(unknown, 10)}; {hint}")
    found = sorted({names.index(name) for name in wanted})
    if len(found) < 2:
        raise ValueError(f"classes names {len(found)} class of {where}; at least two are needed")
    return found


def shortened(items: list[str], most: int = 3) -> str:
    """The first `most` of some names, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(readable, items[:most])) + more


def reason(error: BaseException) -> str:
    """What an exception of another library says, on one line of bounded length; its type where it says nothing."""
    text = readable(str(error)) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in UNPRINTABLE:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: the low byte is the byte of the file name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
