"""Completion of commands in a shell: `selmatch --tyro-print-completion bash` (or zsh, fish) prints a script for it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Union

import tyro

from selmatch_ext import cli_help

Verb = Callable[..., None]
FLAG = "--tyro-print-completion"
SHELLS = ("bash", "zsh", "fish")


def script(
    shell: str, verbs: Mapping[str, Verb], by: Mapping[str, Callable[[str], Verb]], methods: Iterable[str]
) -> str:
    """The script for a shell. It completes the verbs and their options, and behind each verb of `by` the methods with
    theirs. Raises ValueError for a shell that is not one of SHELLS."""
    if shell not in SHELLS:
        raise ValueError(f"{FLAG} is {shell!r}; allowed are {', '.join(SHELLS)}")
    known = {name: _before_methods(make, methods) for name, make in by.items()} | dict(verbs)
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli_help.parsed(known, "selmatch", [FLAG, shell])
    # Descriptions of several lines would be completed too, line by line.
    lines = (
        line.replace(r"\n", " ") if line.startswith("COMPLETION_SPEC") else line
        for line in printed.getvalue().splitlines()
    )
    return "\n".join(lines)


def _before_methods(make: Callable[[str], Verb], methods: Iterable[str]) -> Verb:
    def verb(method: Any) -> None:
        pass

    kinds = tuple(Annotated[Any, tyro.conf.subcommand(name=name, constructor=make(name))] for name in methods)
    # The methods are known at run time only: `a | b` cannot be written for them.
    verb.__annotations__["method"] = Annotated[Union[kinds], tyro.conf.arg(name="")]  # noqa: UP007
    return verb
