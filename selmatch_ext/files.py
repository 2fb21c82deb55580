"""Files that are either whole or not there: atomic writes, and safetensors files with a kind and clear errors."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "selmatch_ext."
VERSION = "1"


def _host() -> str:
    return socket.gethostname().replace("-", "_") or "host"


def remove_abandoned(folder: str | os.PathLike) -> None:
    """Removes what writers of files in `folder` and below it left behind when they were killed on this host."""
    # Not rglob: a folder that another process removes meanwhile is an error to it.
    folders = (Path(root, name) for root, names, _ in os.walk(folder) for name in names)
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
    except (OSError, SafetensorError) as error:
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


def read_json(path: str | os.PathLike, *required: str) -> dict[str, Any]:
    """The object in a file of `write_json`; ValueError naming the file when it is damaged or lacks a `required` key."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error
    if not isinstance(value, dict) or not all(key in value for key in required):
        raise ValueError(f"{path} is damaged: it is no object with {', '.join(required) or 'settings'}; delete it")
    return value


def save_tensors(
    path: str | os.PathLike, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to the safetensors file `path` atomically.

    `kind` goes into the metadata as format "selmatch_ext.KIND" and is checked when the file is read; `metadata` holds
    further strings. Tensors may be views, share memory or lie on any device.
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
    header = {**(metadata or {}), "format": FORMAT + kind, "version": VERSION}
    with atomic_write(path) as temporary:
        save_file(own, temporary, metadata=header)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in a random order; sorted, the same content is the same file."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size))


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike, kind: str, *required: str) -> Iterator[Any]:
    """Open a file of `save_tensors` memory-mapped; yields safetensors' handle (`get_tensor`, `get_slice`, `metadata`).

    Raises FileNotFoundError when there is no such file, and ValueError when it is truncated, is no safetensors file,
    holds another kind, comes from a newer version, or lacks one of the `required` tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a selmatch_ext file of kind {kind}")
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or is no safetensors file ({error})") from error
    with handle:
        header = handle.metadata() or {}
        found = header.get("format", "")
        if not found.startswith(FORMAT):
            raise ValueError(f"{path} is a safetensors file, but not one of selmatch_ext's; expected kind {kind}")
        if found != FORMAT + kind:
            raise ValueError(f"{path} is a selmatch_ext {found[len(FORMAT) :]} file; expected kind {kind}")
        if header.get("version") != VERSION:
            raise ValueError(f"{path} has version {header.get('version')}; this selmatch_ext reads version {VERSION}")
        missing = [name for name in required if name not in handle.keys()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; the kind {kind} has {', '.join(required)}")
        yield handle


def load_tensors(path: str | os.PathLike, kind: str, *required: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a whole file of `save_tensors`: (tensors, metadata). Errors as in `open_tensors`."""
    with open_tensors(path, kind, *required) as handle:
        # copies: the mapped file may be replaced while the tensors are in use
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}
        return tensors, dict(handle.metadata())


def json_field(metadata: Mapping[str, str], name: str, path: str | os.PathLike) -> Any:
    """The JSON value of `metadata[name]`; ValueError naming the file when it is missing or damaged."""
    try:
        return json.loads(metadata[name])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: metadata field {name!r} is missing or damaged") from error
