"""What `torch.compile` has to know of our functions, told without importing it: the decorators of `torch.compiler` load
`torch._dynamo`, which takes longer than torch itself, and most programs never compile."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.compiler.assume_constant_result`: compiled code calls `function` once and keeps the result."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def never_compiled(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `torch.compiler.disable(reason=reason)`: compiled code calls the function as it is, and so does whatever the
    function calls; with fullgraph=True the reason is in the error."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        disabled: list[Callable[P, R]] = []

        @functools.wraps(function)
        def call(*arguments: P.args, **options: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=reason)
            if "torch._dynamo" not in sys.modules:  # nothing is compiled
                return function(*arguments, **options)
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*arguments, **options)

        return call

    return decorate
