"""Reading what torch.save wrote elsewhere: a `replay_buffer_*.pt` of the public MTT code (arXiv 2203.11932), which is a
list of lists of tensors, or the files of a distilled set.

torch.load(weights_only=True) runs nothing from the file. Before it is called, the file is searched for what it would
still do: read damaged tensors (it verifies no checksum), unpack compressed parts and take memory for declared sizes.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from selmatch_ext.files import one_line, open_for_reading

NUMPY = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""What numbers of NumPy consist of, accuracies for example. They are skipped."""
ALLOWED = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|parameter|parameter_with_state)|collections OrderedDict|torch \w+Storage|"
    + "|".join(re.escape(" ".join(name.rsplit(".", 1))) for name in (*NUMPY, "_codecs.encode"))
)
CALLS = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
PICKLE_BYTES = 2**20
"""Upper limit of the pickled lists in bytes; in large files the limit is an eighth of the file."""


class Skipped:
    """Stands for a number of NumPy in what was read."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_torch_file(path: Path, what: str) -> tuple[Any, int]:
    """(what the file holds, which is not checked yet; the number of tensors in the file). what: for messages, such as
    "replay buffer".

    Files in the format of torch before 1.6 have no checksums; others are refused when one differs. Raises
    FileNotFoundError, OSError where the file cannot be read, and ValueError for a file that is truncated, damaged or
    something else, and for one that only unpickling could read, which can run any code."""
    if not path.exists():
        raise FileNotFoundError(f"{what} {path} does not exist")
    with open_for_reading(path, f"a {what}"):
        pass
    try:
        zipped = zipfile.is_zipfile(path)
        tensors = _check_archive(path) if zipped else _check_legacy(path)
        with torch.serialization.safe_globals([(Skipped, name) for name in NUMPY]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), tensors
    # torch.load says nowhere what it raises: unpicklers and rebuilding functions raise nearly everything
    except Exception as error:
        raise ValueError(f"{path} is truncated or is no {what} that can be read safely: {one_line(error)}") from error


def _check_archive(path: Path) -> int:
    """Number of tensors in a file of torch.save; ValueError unless its members are whole, uncompressed and no larger
    together than the file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise ValueError(
                    f"its member {member.filename!r} is compressed or encrypted, which torch.save does not do"
                )
        if sum(member.file_size for member in members) > size:
            raise ValueError(f"its members declare more than the {size} bytes that the file has")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len({member.filename for member in members}) < len(members):
            raise ValueError("its members are not those of torch.save, one of them data.pkl")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its member {damaged!r} has changed since the file was written: its checksum differs")
        if pickles[0].file_size > max(PICKLE_BYTES, size // 8):
            raise ValueError(f"its data.pkl has {pickles[0].file_size} bytes, more than lists of tensors need")
        return _scan(io.BytesIO(archive.read(pickles[0])), size)


def _check_legacy(path: Path) -> int:
    """Number of tensors in a file as torch before 1.6 wrote it: magic number, version and machine, then the lists, then
    the keys of the tensors' bytes, which follow."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(max(PICKLE_BYTES, size // 8)))
    for _ in range(3):
        _scan(start, None)
    tensors = _scan(start, size)
    _scan(start, size)
    return tensors


def _scan(pickled: io.BytesIO, size: int | None) -> int:
    """Reads a pickle's instructions without following them; the number of tensors that it refers to. ValueError where
    it names anything but dense tensors, or a number above `size`, the bytes of the file (None: any): no tensor's size,
    stride or offset is."""
    tensors = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        tensors += opcode.name == "BINPERSID"
        if opcode.name in CALLS and not (isinstance(argument, str) and ALLOWED.fullmatch(argument)):
            name = str(argument).replace(" ", ".")
            raise ValueError(
                f"it names {name!r}, which unpickling would call and which may run any code; it may hold dense "
                "tensors, numbers, strings, and lists and dicts of them"
            )
        if size is not None and type(argument) is int and not opcode.name.endswith(("GET", "PUT")) and argument > size:
            raise ValueError(f"it declares a size of {argument}; the file has {size} bytes")
    return tensors


def is_list(value: Any) -> bool:
    """Whether `value` is a list or a tuple that is not empty."""
    return isinstance(value, list | tuple) and len(value) > 0


def describe_value(value: Any) -> str:
    """The type of `value`, and its length where it has one."""
    size = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"a {type(value).__name__}{size}"
