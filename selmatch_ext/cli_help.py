"""What the command line answers without torch, whose import takes seconds: `selmatch --help` and `selmatch --version`.

The verbs and their docstrings stand in cli.py and beside it, which import torch. They are read from the source here, so
that there is one list of verbs.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selmatch_ext import built_for
from selmatch_ext.output import safe_streams, say

ABOUT = """Dataset distillation, from data set to evaluated distilled set. `selmatch VERB --help` lists the settings of
a verb, `selmatch run METHOD --help` those of a method.
Options of every verb: --debug shows where an error comes from; --insist-on-bfloat16 lets a run use bfloat16 on a
processor without instructions for it. `selmatch --version` shows the version, and
`selmatch --tyro-print-completion bash` (zsh, fish) prints a script that completes commands in the shell.
"""


def asked(arguments: Sequence[str]) -> bool:
    """Whether the words after `selmatch` are a question that `answer` answers."""
    return list(arguments) in (["--help"], ["-h"], ["--version"])


def answer(arguments: Sequence[str]) -> int:
    """Prints the answer to a question that was `asked`, and returns the exit status."""
    with safe_streams():
        if list(arguments) == ["--version"]:
            say(f"selmatch {version()}")
        else:
            parsed({name: _stub(text) for name, text in docstrings().items()}, "selmatch", ["--help"])
    return 0


def parsed(verbs: dict[str, Callable], prog: str, words: list[str]) -> Any:
    """What the verb returns that the words name, called with the options that follow. Raises SystemExit after a help
    text, and for words that are not understood."""
    import tyro

    return tyro.extras.subcommand_cli_from_dict(verbs, prog=prog, args=words, description=ABOUT)


def version() -> str:
    """The version of what was compiled."""
    known = built_for.read()
    if known is not None:
        return known["version"]
    import torch  # noqa: F401  (the extension needs torch's libraries loaded)

    from selmatch_ext._C import build_info

    return build_info()["version"]


def of_methods(name: str, text: str) -> str:
    """What the help says of a verb that is followed by a method; text: its docstring."""
    return f"{text.removesuffix('.')}; `selmatch {name} --help` lists the methods."


def docstrings() -> dict[str, str]:
    """The docstring of each verb by its name, in the order of the help."""
    tables = {
        node.target.id: node.value
        for node in _source("cli").body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    methods = {name: of_methods(name, text) for name, text in _entries(tables["METHOD_VERBS"])}
    return methods | dict(_entries(tables["VERBS"]))


def _entries(table: ast.expr | None) -> Iterator[tuple[str, str]]:
    """(name, docstring of the function) of each entry of a dict of functions, given as `function` or as
    `module.function`."""
    assert isinstance(table, ast.Dict)
    for key, value in zip(table.keys, table.values, strict=True):
        module, _, function = ast.unparse(value).rpartition(".")
        assert isinstance(key, ast.Constant)
        yield str(key.value), _docstring(module or "cli", function)


def _docstring(module: str, function: str) -> str:
    body = _source(module).body
    found = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == function)
    return ast.get_docstring(found, clean=False) or ""


@functools.cache
def _source(module: str) -> ast.Module:
    return ast.parse(Path(__file__).with_name(f"{module}.py").read_bytes())


def _stub(text: str) -> Callable[[], None]:
    def verb() -> None:
        pass

    verb.__doc__ = text
    return verb
