"""From single operations to blocks: what follows each other and one kernel can do becomes one operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from selmatch_ext.fused.first_layer import FirstLayer
from selmatch_ext.fused.operations import Operation
from selmatch_ext.fused.rules import Block, Conv, Rule
from selmatch_ext.ops.block import NO_NORM, NO_POOL, PIECEWISE
from selmatch_ext.ops.conv3x3 import FEW


def without_unused(steps: list[Operation], result: int) -> list[Operation]:
    """The steps that `result` depends on, numbered anew, with their users counted."""
    used = {result}
    for i in range(result, -1, -1):
        if i in used:
            used.update(steps[i].inputs)
    new = {old: number for number, old in enumerate(i for i in range(len(steps)) if i in used)} | {-1: -1}
    kept = [Operation(steps[i].rule, tuple(new[j] for j in steps[i].inputs)) for i in new if i >= 0]
    for step in kept:
        for j in step.inputs:
            if j >= 0:
                kept[j].users += 1
    return kept


def fuse(steps: list[Operation]) -> list[Operation]:
    """Joins norm, activation and pooling that follow each other into one block. Marks each convolution whose bias has
    no effect, because a norm that follows subtracts it again (`Conv.canceled`)."""
    fused = _with_blocks_joined(steps, lambda first, second: _one_block(first.rule, second))
    for step in fused:
        source = fused[step.inputs[0]] if step.inputs[0] >= 0 else None
        centered = isinstance(step.rule, Block) and step.rule.centers
        if source is not None and isinstance(source.rule, Conv) and source.users == 1 and centered:
            source.rule = replace(source.rule, canceled=True)
    return fused


def with_first_layer(steps: list[Operation], shapes: Mapping[str, torch.Size]) -> list[Operation]:
    """Joins a convolution of images of 1 to 4 channels with the block that alone takes its result, where the
    convolution has no bias, or one that the block's norm cancels. shapes: of the parameters by name."""

    def join(first: Operation, second: Block) -> FirstLayer | None:
        conv = first.rule
        if not isinstance(conv, Conv) or first.inputs != (-1,) or not (conv.bias is None or conv.canceled):
            return None
        return FirstLayer(conv, second) if conv.groups == 1 and shapes[conv.weight][1] <= FEW else None

    return _with_blocks_joined(steps, join)


def _with_blocks_joined(steps: list[Operation], join: Callable[[Operation, Block], Rule | None]) -> list[Operation]:
    """The steps with each block joined with the step before it, where it alone takes that one's result and `join` gives
    a rule for both."""
    place: dict[int, int] = {-1: -1}
    found: list[Operation] = []
    for i, step in enumerate(steps):
        before = step.inputs[0]
        joined = None
        if isinstance(step.rule, Block) and before >= 0 and steps[before].users == 1:
            joined = join(found[place[before]], step.rule)
        if joined is not None:
            place[i] = place[before]
            found[place[i]].rule = joined
            continue
        place[i] = len(found)
        found.append(Operation(step.rule, tuple(place[j] for j in step.inputs)))
    return without_unused(found, len(found) - 1)


def _one_block(first: Rule, second: Block) -> Block | None:
    """Both blocks as one, where the second continues what the first does."""
    if not isinstance(first, Block) or second.kind.norm != NO_NORM or first.kind.pool != NO_POOL:
        return None
    a, b = first.kind, second.kind
    plain = (PIECEWISE, 1.0)  # no activation
    if (a.activation, a.slope) != plain and (b.activation, b.slope) != plain:
        return None
    source = b if (a.activation, a.slope) == plain else a
    return replace(first, kind=a._replace(activation=source.activation, slope=source.slope, pool=b.pool))
