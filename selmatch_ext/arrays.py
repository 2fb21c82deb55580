"""NumPy files (.npy, .npz) whose declared sizes are compared with what is there, or wanted, before memory is taken.

numpy.load allocates what a header of 128 bytes declares, unpacks a compressed member whatever its size, and stops at
the end of an array, before the checksum of its member is compared.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from selmatch_ext.files import one_line, open_for_reading

HEADER_BYTES = 12_000  # numpy itself reads at most 10,000
TEXT_BYTES = 2**20


class Arrays:
    """The arrays of an open .npy (one, called `scores`) or .npz file, of which `names` are read one at a time."""

    def __init__(self, path: Path, archive: zipfile.ZipFile | None, file: IO[bytes]) -> None:
        self.path, self._archive, self._file = path, archive, file

    @property
    def names(self) -> list[str]:
        """Names of the arrays in the file."""
        if self._archive is None:
            return ["scores"]
        return [name[:-4] for name in self._archive.namelist() if name.endswith(".npy")]

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype that an array declares. ValueError naming it where that is no header of NumPy's."""
        with self._open(name) as (stream, _):
            return self._header(name, stream)[:2]

    def read(self, name: str, most_bytes: int) -> np.ndarray:
        """An array of at most `most_bytes`; ValueError naming it where it declares more, is shorter or longer than it
        declares, has changed since it was written (.npz alone has checksums), or holds Python objects."""
        with self._open(name) as (stream, size):
            shape, dtype, fortran, start = self._header(name, stream)
            declared = math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects, which would have to be unpickled")
            if size != start + declared:
                raise ValueError(f"{name} declares {declared} bytes, {max(0, size - start)} are there")
            if declared > most_bytes:
                raise ValueError(f"{name} declares {declared} bytes; {most_bytes} at most are needed")
            content = stream.read(declared)
            if len(content) != declared or stream.read(1):  # to the end: there is the checksum of a member
                raise ValueError(f"{name} is shorter or longer than the {declared} bytes that it declares")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")

    def text(self, name: str) -> str:
        """A string, which numpy.savez makes a 0-d array of."""
        array = self.read(name, TEXT_BYTES)
        if array.shape != () or array.dtype.kind != "U":
            raise ValueError(f"{name} has dtype {array.dtype} and shape {array.shape}; it must be one string")
        return str(array)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        """(what holds the array, its number of bytes)."""
        if self._archive is None:
            self._file.seek(0)
            yield self._file, os.fstat(self._file.fileno()).st_size
            return
        members = [member for member in self._archive.infolist() if member.filename == f"{name}.npy"]
        if len(members) != 1:
            raise ValueError(f"it holds {len(members)} arrays called {name}")
        if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or members[0].flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted in a way that NumPy does not use")
        with self._archive.open(members[0]) as stream:
            yield stream, members[0].file_size

    def _header(self, name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool, int]:
        """Shape, dtype, whether in Fortran order, and where the values begin; `stream` is then there."""
        start = stream.read(10)
        length = int.from_bytes(start[8:10], "little")
        if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\x01\x00", b"\x02\x00"):
            raise ValueError(f"{name} is no array of NumPy's format, versions 1 and 2")
        if start[6:7] == b"\x02":
            start += stream.read(2)
            length = int.from_bytes(start[8:12], "little")
        if length > HEADER_BYTES:
            raise ValueError(f"{name} has a header of {length} bytes; allowed are {HEADER_BYTES}")
        read = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
        try:
            shape, fortran, dtype = read(io.BytesIO(start[8:] + stream.read(length)))
        except Exception as error:  # it is evaluated as a Python literal, which may fail in any way
            raise ValueError(f"{name} has no readable header: {one_line(error)}") from None
        if any(isinstance(side, bool) or side < 0 for side in shape):
            raise ValueError(f"{name} declares the shape {shape}")
        return shape, dtype, fortran, len(start) + length


def _check_directory(file: IO[bytes], archive: zipfile.ZipFile) -> None:
    """Raises ValueError or BadZipFile for a damaged directory, in which an array would seem to be missing.

    Such a directory lists fewer members than its end record says, or one under another name than the member has."""
    file.seek(-min(2**16 + 22, file.seek(0, os.SEEK_END)), os.SEEK_END)
    end = file.read().rpartition(b"PK\x05\x06")[2]
    count = int.from_bytes(end[6:8], "little")
    if count not in (len(archive.infolist()), 2**16 - 1):
        raise ValueError(f"its directory lists {len(archive.infolist())} members; its end says {count}")
    for member in archive.infolist():
        archive.open(member).close()


@contextlib.contextmanager
def open_arrays(path: str | os.PathLike, what: str) -> Iterator[Arrays]:
    """Open a .npy or .npz file, whatever its name ends in. what: what the file is for, in messages.

    Raises FileNotFoundError where there is none, OSError where it cannot be read, and ValueError naming it for whatever
    is wrong with it, also while it is open."""
    path = Path(path)
    with open_for_reading(path, what) as file, contextlib.ExitStack() as stack:
        try:
            archive = None
            if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06"):
                archive = stack.enter_context(zipfile.ZipFile(file))
                _check_directory(file, archive)
            yield Arrays(path, archive, file)
        except (
            ValueError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
            RuntimeError,
            OSError,
        ) as error:
            raise ValueError(f"{path} is no {what}: {one_line(error)}") from error
