"""What surrounds a command: options that go with every verb, signals, the device, and errors as one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import torch

from selmatch_ext import ranks
from selmatch_ext.files import one_line
from selmatch_ext.output import safe_streams
from selmatch_ext.precision import insist_on_bfloat16
from selmatch_ext.ranges import SettingError
from selmatch_ext.stages import describe_error

T = TypeVar("T")


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be."""


class UsageError(Exception):
    """A command that was not understood; the message is all there is to say."""


@dataclass(frozen=True)
class CommonOptions:
    """What goes with every verb."""

    debug: bool
    insist: bool


def split_options(arguments: list[str]) -> tuple[CommonOptions, list[str]]:
    """Separates the options that every verb has (--debug, --insist-on-bfloat16) from the rest of the command, wherever
    they stand in it. Returns their values and the remaining arguments."""
    flags = {"--debug": "debug", "--insist-on-bfloat16": "insist"}
    given = {name: flag in arguments for flag, name in flags.items()}
    return CommonOptions(**given), [a for a in arguments if a not in flags]


def device_of(name: str) -> torch.device:
    """auto = a GPU where there is one; of several processes on a machine each takes the next.

    Raises ValueError for a device that this machine does not have, naming those that it has."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    there = "auto, cpu" + "".join(
        f", cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())
    )
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device {name!r} is not supported; there are {there}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available here; there are {there} ({one_line(error)})") from error
    return device


def guarded(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs a command and returns its exit status. An error is one line on standard error: 1 for one that the user can
    mend, 2 for a command that was not understood, 130 after Ctrl-C, 143 after SIGTERM."""
    options, rest = split_options(arguments)
    with safe_streams(), _sigterm(), insist_on_bfloat16(options.insist):
        try:
            with ranks.processes(), _quiet_unless_first():
                command(rest)
            return 0
        except UsageError as error:
            return _end(error, one_line(error), 2, options)
        except Terminated as error:
            return _end(error, "terminated; the same command continues", 143, options)
        except KeyboardInterrupt as error:
            return _end(error, "interrupted; the same command continues", 130, options)
        except NotImplementedError as error:
            return _end(error, one_line(error), 1, options)
        except (RuntimeError, MemoryError) as error:
            return _end(error, describe_error(error), 1, options)
        except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
            return _end(error, one_line(error), 1, options)


def _end(error: BaseException, line: str, status: int, options: CommonOptions) -> int:
    if options.debug:
        traceback.print_exception(error)
    print(f"selmatch: {line}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated` in the main thread, as Ctrl-C raises KeyboardInterrupt."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    """Of several processes one reports."""
    with contextlib.ExitStack() as stack:
        if not ranks.first():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


class _Held(io.StringIO):
    """Takes the place of standard error while a command is parsed, and stores what tyro writes there. It reports the
    real stream's isatty, by which tyro decides about colors."""

    def isatty(self) -> bool:
        return sys.__stderr__ is not None and not sys.__stderr__.closed and sys.__stderr__.isatty()


def parsed(parse: Callable[[], T], arguments: list[str], prog: str = "selmatch") -> T:
    """What `parse`, a call of tyro, returns. UsageError, one line that names the option as it was typed, for a setting
    that is not in its range; other mistakes in the command are shown as tyro shows them, but that the command in its
    hints is one that exists. prog: what stands before `arguments`."""
    held = _Held()
    try:
        with contextlib.redirect_stderr(held):
            return parse()
    except (SystemExit, SettingError) as stop:
        error: BaseException | None = stop
        while error is not None and not isinstance(error, SettingError):
            error = error.__cause__ or error.__context__
        if error is not None:
            raise UsageError(f"{typed(error, arguments)} is {error.given}; allowed is {error.allowed}") from error
        sys.stderr.write(_with_prog(held.getvalue(), prog, arguments))
        raise


def _with_prog(text: str, prog: str, arguments: list[str]) -> str:
    """tyro's text, where it names `selmatch dm --help` for `selmatch run dm --help`. The box keeps its width."""
    first, _, verb = prog.partition(" ")
    if not verb or not arguments:
        return text
    command = f"{re.escape(first)} ({re.escape(arguments[0])} --help(?:\x1b\\[[\\d;]*m)*)" + " " * (len(verb) + 1)
    return re.sub(command, lambda found: f"{prog} {found[1]}", text)


def typed(error: SettingError, arguments: list[str]) -> str:
    """The option that gave a setting its value, as it stands in `arguments`; else the setting's name."""
    named = []
    for option, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = option.partition("=")
        if name.startswith("-") and name.lstrip("-").rpartition(".")[2].replace("-", "_") == error.name:
            named.append((name, value or following))
    same = [name for name, value in named if _same(value, error.given)]
    return (same or [name for name, _ in named] or [error.name])[0]


def _same(text: str, value: object) -> bool:
    try:
        return text == str(value) or float(text) == value
    except ValueError:
        return False
