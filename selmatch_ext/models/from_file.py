"""Networks whose names come from a data file. A data file never chooses which code runs.

It may name our own networks, torchvision's and timm's; a function of the user's own (package.module:function) only
where the user has named it too."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from selmatch_ext.models import zoo
from selmatch_ext.models.flat import parameter_count

MOST_PARAMETERS = 10**8
"""Of a network that a file names without holding parameters of it."""


def checked_name(name: Any, where: str, option: str, trusted: Collection[str] = ()) -> str:
    """`name`, which a file holds for the name of a network.

    where: the file and the field, for messages. option: what the user adds to name the network, for example
    "--evaluation.model". trusted: the names that stand on the command line or in Python.
    Raises ValueError where it is no string, or names a function of a module and is not in `trusted`.
    """
    if not isinstance(name, str):
        raise ValueError(f"{where} must be the name of a network, got {type(name).__name__}")
    if name in trusted or not zoo.is_user_code(name):
        return name
    shown = name if name.isprintable() and len(name) <= 100 else repr(name[:100])
    raise ValueError(
        f"{where} is {shown}, a function in a module of Python: a data file does not choose which code runs. If you "
        f"know this code and want it to run, add {option} {shown}"
    )


def check_size(
    name: str,
    like: tuple[int, int, tuple[int, int]],
    where: str,
    option: str,
    parameters: int | None = None,
    trusted: Collection[str] = (),
) -> None:
    """Raises ValueError where the network, whose name comes from a file, does not have `parameters` parameters, those
    that the file holds; or, for None, where it has more than MOST_PARAMETERS and is not in `trusted`.

    like: channels, classes and (height, width) of the data. Nothing of the network's size is allocated. A function of
    the user's own is not called: see `checked_name`."""
    if zoo.is_user_code(name):
        return
    try:
        count = parameter_count(zoo.build_without_memory(name, *like))
    except (RuntimeError, TypeError):  # torchvision's RegNets compute their shapes with tensors
        if name in trusted:
            return
        raise ValueError(
            f"{where} is {name}, whose size is not known before it is made; to make it, add {option} {name}"
        ) from None
    if parameters is not None and count != parameters:
        raise ValueError(f"{where} is {name}, which has {count} parameters, but the file holds {parameters}")
    if parameters is None and count > MOST_PARAMETERS and name not in trusted:
        raise ValueError(
            f"{where} is {name}, which has {count} parameters, more than {MOST_PARAMETERS}; to make it, add {option} "
            f"{name}"
        )
