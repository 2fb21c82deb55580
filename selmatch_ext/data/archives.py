"""Tar and zip archives of images, read into memory without unpacking them; sizes are checked before memory is taken."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tqdm import tqdm

from selmatch_ext.data.memory import available_memory, size_text
from selmatch_ext.data.names import readable, reason
from selmatch_ext.data.tree import ArchiveTree, is_junk

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
MOST_OF_A_FILE = 512 << 20  # bytes of one unpacked image
MOST_OF_A_HEADER = 16 << 20  # bytes of a name or another header that tarfile reads in one piece
RATIO, ALLOWANCE = 200, 1 << 30  # an archive may unpack to RATIO times its size and ALLOWANCE bytes
COMPRESSED: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Refused(ValueError):
    """The archive is well-formed, and is not read for the reason that the message gives."""


class Member(NamedTuple):
    """kind: file, folder, link. target: of a link, relative to its folder; read: its content."""

    name: str
    kind: str
    size: int
    target: str
    read: Callable[[], bytes]


def read_archive(path: Path, wanted: Callable[[str], bool]) -> ArchiveTree:
    """The members of an archive. Contents are read of the files for whose name `wanted` returns True, and of the files
    that links with such a name point to.

    Raises ValueError naming the archive, and the member that is too large, sparse or encrypted; OSError when it cannot
    be opened."""
    if not path.name.lower().endswith(ARCHIVES):
        raise ValueError(f"{path} is neither a folder nor an archive; allowed endings are {', '.join(ARCHIVES)}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    open(path, "rb").close()  # no permission is an error of its own
    try:
        tree = _read(path, wanted)
        targets = {tree.resolve(link) for link in tree.links if wanted(link)}
        missing = {name for name in targets if name in tree.files and tree.files[name] is None}
        if missing:  # names that say nothing of images, as in a store of contents by their hash
            again = _read(path, missing.__contains__)
            tree.files.update({name: again.files[name] for name in missing})
        return tree
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # the readers of archives raise nearly any exception on damaged ones
        raise ValueError(f"{path} is truncated or is no archive ({reason(error)})") from error


def _read(path: Path, wanted: Callable[[str], bool]) -> ArchiveTree:
    files: dict[str, bytes | None] = {}
    links: dict[str, str] = {}
    folders: set[str] = set()
    skipped: Counter = Counter()
    members = _zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path)
    free, taken = available_memory(), 0
    bar = tqdm(members, desc=f"reading {readable(path.name)}", unit="file", disable=None, delay=1, leave=False)
    for member in bar:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if not parts or any(map(is_junk, parts)):
            continue
        if ".." in parts:
            skipped["with .. in the path"] += 1
            continue
        name = "/".join(parts)
        files.pop(name, None)  # the last member of a name counts, as when it is unpacked
        links.pop(name, None)
        if member.kind == "folder":
            folders.add(name)
        elif member.kind == "link":
            links[name] = member.target
        elif wanted(name):
            taken += member.size
            _check_size(name, member.size, taken, free)
            files[name] = member.read()
        else:
            files[name] = None
    return ArchiveTree(files, links, folders, skipped)


def _check_size(name: str, size: int, taken: int, free: int | None) -> None:
    if size > MOST_OF_A_FILE:
        raise Refused(
            f"{readable(name)} unpacks to {size_text(size)}; allowed are {size_text(MOST_OF_A_FILE)} for an image"
        )
    if free is not None and taken > free:
        raise Refused(f"its images take more than the {size_text(free)} of memory that are free; unpack it to a folder")


def _tar_members(path: Path) -> Iterator[Member]:
    with open(path, "rb") as raw:
        start = raw.read(8)
        raw.seek(0)
        size = os.path.getsize(path)
        opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
        most = size if opener is None else RATIO * size + ALLOWANCE
        file = _Bounded(raw if opener is None else opener(raw))
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as archive:  # it reads, seeks and tells only
            for member in archive:
                if member.isfile() and not member.issparse() and member.offset_data + member.size > most:
                    if opener is not None:
                        raise Refused(f"it unpacks to more than {size_text(most)}, of {size_text(size)}")
                    raise tarfile.ReadError(f"{member.name} declares {size_text(member.size)}, more than it has")
                yield _tar_member(archive, member, file)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it has no end mark")  # iteration ends silently where a header is cut
            while file.read(tarfile.RECORDSIZE):
                if file.tell() > most:
                    raise Refused(f"it unpacks to more than {size_text(most)}")
                # to the end: there the compressed ones have their checksum


def _tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo, file: _Bounded) -> Member:
    def read() -> bytes:
        if member.issparse():
            raise Refused(f"{readable(member.name)} is a sparse file of {size_text(member.size)}; no image is one")
        file.most = max(MOST_OF_A_HEADER, member.size)
        try:
            content = archive.extractfile(member)
            if content is None:
                raise tarfile.ReadError(f"{member.name} has no content")
            return content.read()
        finally:
            file.most = MOST_OF_A_HEADER

    kind, target = "other", ""
    if member.isdir():
        kind = "folder"
    elif member.isfile():
        kind = "file"
    elif member.issym():
        kind, target = "link", member.linkname
    elif member.islnk():  # its target counts from the top of the archive
        depth = len([part for part in member.name.split("/")[:-1] if part not in ("", ".")])
        kind, target = "link", "../" * depth + member.linkname.lstrip("/")
    return Member(member.name, kind, 0 if member.issparse() else member.size, target, read)


class _Bounded:
    """A file of which at most `most` bytes are read at once. tarfile reads as many bytes as a header declares."""

    def __init__(self, file: Any) -> None:
        self.file, self.most = file, MOST_OF_A_HEADER
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > self.most:
            raise tarfile.ReadError(f"a header declares {size} bytes")
        return self.file.read(size)


def _zip_members(path: Path) -> Iterable[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename
            if "\\" in name and (info.create_system == 0 or "/" not in name):
                name = name.replace("\\", "/")  # written on Windows by a program that does not know zip's separator
            kind, target = "folder" if name.endswith("/") else "file", ""
            if kind == "file" and stat.S_ISLNK(info.external_attr >> 16):
                if info.file_size > MOST_OF_A_HEADER:
                    raise Refused(f"{readable(name)} is a link of {size_text(info.file_size)}")
                kind, target = "link", os.fsdecode(_zip_read(archive, info))
            yield Member(name, kind, info.file_size, target, functools.partial(_zip_read, archive, info))


def _zip_read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.flag_bits & 1:
        raise Refused(f"{readable(info.filename)} is encrypted; unpack the archive to a folder")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile unpacks others without a bound
        raise Refused(f"{readable(info.filename)} is not packed by deflate; unpack the archive to a folder")
    with archive.open(info) as file:
        content = file.read(info.file_size + 1)  # no more is unpacked, whatever the member holds
        if len(content) < info.file_size or file.read(1):
            raise zipfile.BadZipFile(f"{info.filename} has another size than it declares")
        return content
