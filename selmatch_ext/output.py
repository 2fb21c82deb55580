"""What is shown to the user. No result may depend on it: a terminal may be ASCII, closed, full or a broken pipe."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

PLAIN = str.maketrans(
    {"β": "beta", "η": "eta", "α": "alpha", "±": "+/-", "→": "->", "…": "...", "−": "-", "–": "-", "‖": "||", "│": "|"}
    | dict.fromkeys("╭╮╰╯", "+")
    | {"─": "-", "█": "#"}
)


class SafeStream(io.TextIOBase):
    """A text stream that writes to another one and never fails: characters that it cannot encode are replaced, and
    when it cannot be written to any more, what follows is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._write(text)
        except (OSError, ValueError):  # full, ended, or closed
            self._drop()
        return len(text)

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            plain = text.translate(PLAIN)
            self._stream.write(plain.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        """Lets what is still buffered go nowhere, so that neither the interpreter's exit nor C code fails on it."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            descriptor, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read from the stream behind, where io has an attribute
        return getattr(self._stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("the stream cannot be written to")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """Flushes; the stream behind it is not ours to close."""
        self.flush()


def safe(stream: Any) -> SafeStream:
    """`stream` (None where it is closed) as one that never fails."""
    return stream if isinstance(stream, SafeStream) else SafeStream(stream)


def say(text: object = "") -> None:
    """Prints a line to standard output; what cannot be printed costs nothing but itself."""
    stream = safe(sys.stdout)
    stream.write(f"{text}\n")
    stream.flush()


def warn(text: str) -> None:
    """Prints a line to standard error."""
    stream = safe(sys.stderr)
    stream.write(f"selmatch: warning: {text}\n")
    stream.flush()


def attempt(draw: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Calls a function that draws a picture of results which are written already; a failure costs a warning."""
    try:
        draw(*arguments, **options)
    except Exception as error:  # whatever it is, no result may be lost to a picture
        path = next((str(a) for a in arguments if isinstance(a, os.PathLike)), draw.__name__)
        why = next(iter(str(error).splitlines()), "")
        warn(f"{path} could not be drawn: {type(error).__name__}: {why}")


def open_descriptors() -> None:
    """Opens those of descriptors 0 to 2 that are closed. Otherwise the next file that is opened, a result perhaps,
    would be standard output or error to C code."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Within, everything that is printed to standard output and error goes through `SafeStream`: ours, progress bars,
    help texts and warnings."""
    open_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(safe, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
