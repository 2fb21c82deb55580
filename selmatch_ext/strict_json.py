"""JSON from files that others may have written or damaged: values of bounded number and depth, fields of known type.

Python's own parser makes 60 times as much memory of a text as the text has, returns NaN and infinities, and ends deep
nesting in a RecursionError, at once or in whatever later walks through the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

DEPTH = 32  # our own files have five levels
VALUES = 2**21  # at up to 72 bytes each; the paths of ImageNet's images are 1.3 million


def parse(text: str, where: str) -> Any:
    """The value of a JSON text. Raises ValueError naming `where` for what is no JSON, more than VALUES values, more
    than DEPTH levels, and for numbers that are NaN or infinite."""
    if sum(map(text.count, ",[{:")) > VALUES:
        raise ValueError(f"{where} holds more than {VALUES} values")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"{where} is nested more than {DEPTH} levels deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is no valid JSON: {error}") from None
    level, depth = [value], 0
    if text.count("[") + text.count("{") <= DEPTH:
        return value
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        if depth > DEPTH:
            raise ValueError(f"{where} is nested more than {DEPTH} levels deep")
    return value


def _children(value: Any) -> Iterable[Any]:
    """The containers in a container: only these can go deeper."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in inside if isinstance(child, dict | list))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def numbers(value: Any, where: str, count: int | None = None) -> list[float]:
    """`value` as a list of finite numbers, `count` of them. Raises ValueError naming `where` for anything else."""
    if not isinstance(value, list) or not all(map(_is_number, value)) or count not in (None, len(value)):
        raise ValueError(
            f"{where} is {shown(value)}; it must be a list of {count or ''} finite numbers".replace("  ", " ")
        )
    return [float(number) for number in value]


def strings(value: Any, where: str) -> list[str]:
    """`value`, a list of strings. Raises ValueError naming `where` for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where} is {shown(value)}; it must be a list of strings")
    return value


def string(value: Any, where: str) -> str:
    """`value`, a string. Raises ValueError naming `where` for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {shown(value)}; it must be a string")
    return value


def mapping(value: Any, where: str) -> dict[str, Any]:
    """`value`, a JSON object. Raises ValueError naming `where` for anything else."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; it must be an object")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000


def shown(value: Any) -> str:
    """`value` in an error message: a short one as it is, a long one by its type and length."""
    if isinstance(value, list | dict | str) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
