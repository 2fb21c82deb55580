"""Files that are either whole or not there, and what is read back from them: atomic writes; JSON; and safetensors files
with a kind, whose tensors and metadata have checksums."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from selmatch_ext import strict_json

FORMAT = "selmatch_ext."
VERSION = "2"
CHECKSUMS = "checksums"
JSON_BYTES = 2**26  # of a record; its number of values is limited as well
HEADER_BYTES = 2**24  # of a safetensors file: names, shapes and metadata
IMAGES_HEADER_BYTES = 10**8  # the paths of all images; what safetensors itself allows
MOST_TENSORS = 20_000


def _safetensors() -> Any:
    """The package. It is imported at the first such file, so that the operations work where it is not installed."""
    import safetensors.torch

    return safetensors


def _host() -> str:
    return socket.gethostname().replace("-", "_") or "host"


def remove_abandoned(folder: str | os.PathLike) -> None:
    """Removes what writers of files in `folder` and below it left behind when they were killed on this host."""
    # Not rglob: a folder that another process removes meanwhile is an error to it.
    folders = (Path(root, name) for root, names, _ in os.walk(Path(folder)) for name in names)
    _remove_dead(path for path in folders if path.match(f".*.{_host()}-*.tmp"))


def _remove_dead(temporaries: Iterable[Path]) -> None:
    for left in list(temporaries):
        try:
            os.kill(int(left.name.rsplit("-", 2)[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, OverflowError, OSError):
            continue


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: BaseException) -> OSError:
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, f"cannot write {path}: {error.strerror}")  # Python picks the subclass
    return OSError(f"cannot write {path}: {error}")


def _make_folder(folder: Path) -> None:
    in_the_way = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if in_the_way is not None:
        raise NotADirectoryError(errno.ENOTDIR, f"{in_the_way} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)


def _make_temporary(path: Path) -> Path:
    folder = path.parent / f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        _make_folder(path.parent)
        _remove_dead(path.parent.glob(f".{glob.escape(path.name)}.{_host()}-*.tmp"))
        folder.mkdir()
    except OSError as error:
        raise _cannot_write(path, error) from error
    return folder


def check_writable(path: str | os.PathLike) -> None:
    """Raises what `atomic_write` would, before the hours of work whose result goes to `path`. Makes its folder."""
    _make_temporary(Path(path)).rmdir()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Replace the file or the (empty or absent) folder `path` in one step: afterwards it is either the old one or the
    whole new one.

    Yields a temporary path of the same name, inside a hidden folder `.NAME.HOST-PID-RANDOM.tmp` beside the target; the
    block writes a file or a folder there. On success it is flushed to the disk and renamed to `path`; on any failure,
    keyboard interrupts included, it is removed. A killed process leaves that hidden folder, which nothing reads and
    which the next write of the same `path` on the same host removes, and `remove_abandoned`.

    Folders above `path` are made. Raises OSError (with the usual errno and subclass) naming `path` when it cannot be
    written: no permission, no such device, disk full.
    """
    path = Path(path)
    folder = _make_temporary(path)
    temporary = folder / path.name
    try:
        yield temporary
        if temporary.is_file():
            temporary.chmod(folder.stat().st_mode & 0o666)  # what the umask allows, whatever the writer chose
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def open_for_reading(path: str | os.PathLike, what: str) -> BinaryIO:
    """The regular file `path`, opened for reading bytes. Raises FileNotFoundError where there is none (a folder or a
    pipe is none), saying that `what` is expected, and the OSError of another failure, such as a lack of permission,
    naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; expected {what}")
    try:
        return open(path, "rb")
    except OSError as error:
        raise OSError(error.errno, f"cannot read {path}: {error.strerror}") from error


def read_json(path: str | os.PathLike, *required: str) -> dict[str, Any]:
    """The object in a file of `write_json`.

    Raises ValueError naming the file when it is damaged, too large, too deep, or lacks a `required` key;
    FileNotFoundError and other OSErrors naming it when it cannot be read."""
    with open_for_reading(path, "a JSON file") as file:
        content = file.read(JSON_BYTES + 1)
    if len(content) > JSON_BYTES:
        raise ValueError(f"{path} is damaged: it has more than {JSON_BYTES >> 20} MiB; delete it")
    try:
        value = strict_json.parse(content.decode(), "it")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error
    if not isinstance(value, dict) or not all(key in value for key in required):
        raise ValueError(f"{path} is damaged: it is no object with {', '.join(required) or 'settings'}; delete it")
    return value


def save_tensors(
    path: str | os.PathLike,
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    by_row: Collection[str] = (),
) -> None:
    """Write `tensors` to the safetensors file `path` atomically.

    `kind` goes into the metadata as format "selmatch_ext.KIND" and is checked when the file is read; `metadata` holds
    further strings. Tensors may be views, share memory or lie on any device. The metadata also gets a checksum of each
    tensor and each string; a tensor named in `by_row` gets one for each row, so that a row can be checked alone.
    """
    own = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    texts = {name: text for name, text in (metadata or {}).items() if name not in ("format", "version", CHECKSUMS)}
    checksums = {
        "tensors": {n: [checksum(row) for row in t] if n in by_row else checksum(t) for n, t in sorted(own.items())},
        "metadata": {name: _text_checksum(text) for name, text in sorted(texts.items())},
    }
    header = {**texts, "format": FORMAT + kind, "version": VERSION, CHECKSUMS: json.dumps(checksums)}
    with atomic_write(path) as temporary:
        try:
            _safetensors().torch.save_file(own, temporary, metadata=header)
        except _safetensors().SafetensorError as error:  # such as for a full disk
            raise OSError(str(error)) from error
        _sort_metadata(temporary)


def checksum(tensor: Tensor) -> str:
    """32 hexadecimal digits of SHA-256 over type, shape and bytes of a contiguous CPU tensor. It finds damage; whoever
    means to change a file can also change its checksums."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _text_checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in a random order; sorted, the same content is the same file."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))


class TensorFile:
    """An open file of `save_tensors`. Whatever is read of it is compared with its checksum first; ValueError naming the
    file and the tensor or metadata field when they differ."""

    def __init__(self, path: Path, handle: Any, texts: dict[str, str], checksums: dict[str, Any]) -> None:
        self.path, self._handle, self._texts, self._checksums = path, handle, texts, checksums

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._checksums)

    @property
    def metadata(self) -> dict[str, str]:
        """The strings that were given to `save_tensors`, and format and version."""
        return dict(self._texts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        return tuple(self._handle.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor: the mapped file may be replaced while the tensor is in use."""
        return self._checked(name, self._read(name, lambda: self._handle.get_tensor(name)), self._checksums[name])

    def row(self, name: str, index: int) -> Tensor:
        """A copy of a row of a tensor that was saved with its name in `by_row`; no other row is read."""
        expected = self._checksums[name]
        if not isinstance(expected, list) or len(expected) != self.shape(name)[0]:
            raise ValueError(f"{self.path}: {name!r} has no checksum for each of its rows")
        row = self._read(name, lambda: self._handle.get_slice(name)[index : index + 1][0])
        return self._checked(f"{name}[{index}]", row, expected[index])

    def _read(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        try:
            return read().clone()
        except (
            _safetensors().SafetensorError,
            RuntimeError,
            TypeError,
            KeyError,
            AttributeError,
            MemoryError,
        ) as error:
            raise ValueError(f"{self.path}: {name!r} cannot be read: {one_line(error)}") from error

    def _checked(self, name: str, tensor: Tensor, expected: Any) -> Tensor:
        rows = [checksum(row) for row in tensor] if isinstance(expected, list) else checksum(tensor)
        if rows != expected:
            raise ValueError(
                f"{self.path}: tensor {name!r} has changed since the file was written: its checksum differs"
            )
        if tensor.dtype == torch.bool and (tensor.view(torch.uint8) > 1).any():
            raise ValueError(f"{self.path}: tensor {name!r} holds bytes that are neither true nor false")
        return tensor


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike, kind: str, *required: str) -> Iterator[TensorFile]:
    """Open a file of `save_tensors` memory-mapped. The metadata's checksums are verified here, a tensor's when it is
    read.

    Raises FileNotFoundError when there is no such file; OSError naming it when it cannot be read; and ValueError when
    it is truncated, is no safetensors file, holds another kind, comes from another version, lacks one of the `required`
    tensors, or has changed since it was written.
    """
    path = Path(path)
    _check_header_size(path, kind)
    try:
        handle = _safetensors().safe_open(path, framework="pt", device="cpu")
    except (_safetensors().SafetensorError, OSError, MemoryError, ValueError) as error:
        raise ValueError(f"{path} is truncated or is no safetensors file ({one_line(error)})") from error
    with handle:
        texts = handle.metadata() or {}
        found = texts.get("format", "")
        if not found.startswith(FORMAT):
            raise ValueError(f"{path} is a safetensors file, but not one of selmatch_ext's; expected kind {kind}")
        if found != FORMAT + kind:
            raise ValueError(f"{path} is a selmatch_ext {plain(found[len(FORMAT) :])} file; expected kind {kind}")
        if texts.get("version") != VERSION:
            version = plain(texts.get("version", "none"))
            raise ValueError(f"{path} has version {version}; this selmatch_ext reads version {VERSION}")
        names = handle.keys()
        missing = [name for name in required if name not in names]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; the kind {kind} has {', '.join(required)}")
        yield TensorFile(path, handle, *_verified(path, texts, names))


def _check_header_size(path: Path, kind: str) -> None:
    with open_for_reading(path, f"a selmatch_ext file of kind {kind}") as file:
        size, allowed = (
            int.from_bytes(file.read(8), "little"),
            IMAGES_HEADER_BYTES if kind == "images" else HEADER_BYTES,
        )
        if allowed < size <= os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} has a header of {size} bytes; allowed are {allowed}")


def _verified(path: Path, texts: dict[str, str], names: Collection[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """(metadata, checksums of the tensors). ValueError unless there is a right checksum of each string, and one of each
    tensor in the file."""
    if len(names) > MOST_TENSORS:
        raise ValueError(f"{path} holds {len(names)} tensors; allowed are {MOST_TENSORS}: it may be damaged")
    where = f"{path}: metadata field {CHECKSUMS!r}"
    found = strict_json.mapping(json_field(texts, CHECKSUMS, path), where)
    tensors, strings = (strict_json.mapping(found.get(part), f"{where}, {part}") for part in ("tensors", "metadata"))
    texts = {name: text for name, text in texts.items() if name != CHECKSUMS}
    own = {name: text for name, text in texts.items() if name not in ("format", "version")}
    for what, there, expected in (("tensor", set(names), tensors), ("metadata field", own.keys(), strings)):
        for name in sorted(there ^ expected.keys()):
            raise ValueError(f"{path} {'has no checksum of' if name in there else 'lacks'} {what} {name!r}")
    for name, text in own.items():
        if _text_checksum(text) != strings[name]:
            raise ValueError(
                f"{path}: metadata field {name!r} has changed since the file was written: its checksum differs"
            )
    return texts, tensors


def plain(text: str) -> str:
    """`text` from a file, in a message of one line."""
    return text if text.isprintable() and len(text) <= 40 else repr(text[:40])


def one_line(error: BaseException) -> str:
    """The message of an error that another library raised, without what it says in further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_tensors(path: str | os.PathLike, kind: str, *required: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole file of `save_tensors`: (tensors, metadata). Errors as in `open_tensors`."""
    # safetensors opens the path twice, for the header and for the tensors: between them it may have been replaced
    for last in (False,) * 20 + (True,):
        before = _identity(path)
        try:
            with open_tensors(path, kind, *required) as file:
                return {name: file.tensor(name) for name in file.names}, file.metadata
        except ValueError:
            if last or _identity(path) == before:
                raise
    raise AssertionError("the last attempt returns or raises")


def _identity(path: str | os.PathLike) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def json_field(metadata: Mapping[str, str], name: str, path: str | os.PathLike) -> Any:
    """The JSON value of `metadata[name]`; ValueError naming the file and the field when it is missing or damaged."""
    where = f"{path}: metadata field {name!r} is missing or damaged"
    if name not in metadata:
        raise ValueError(where)
    try:
        return strict_json.parse(metadata[name], "it")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
