"""What a network is read into: a list of operations, each a rule and the earlier results that go in."""

from __future__ import annotations

from dataclasses import dataclass

from selmatch_ext.fused.rules import Rule


class Unsupported(Exception):
    """The fused engine cannot compute the network; the message says why, in a sentence."""


def no_rule(what: str) -> Unsupported:
    return Unsupported(f"the fused engine has no rule for {what}")


@dataclass
class Operation:
    """One operation: which earlier results go in (-1 is the images), and how many later ones take its own."""

    rule: Rule
    inputs: tuple[int, ...]
    users: int = 0
