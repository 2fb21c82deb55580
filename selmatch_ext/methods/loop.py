"""The one loop that every distillation method runs in: draw, loss, backward, update, checkpoint.

A method is a subclass of `base.Method`; the loop owns the optimizer, the checkpoints, the random streams and the
checks, so a method is little more than its loss.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selmatch_ext import ranks
from selmatch_ext.methods.base import Method
from selmatch_ext.methods.checkpoint import Checkpoint, LoopState, Snapshots
from selmatch_ext.methods.log import Log
from selmatch_ext.output import say
from selmatch_ext.precision import precision_scope
from selmatch_ext.second_order import twice_differentiable
from selmatch_ext.seeds import global_stream
from selmatch_ext.threads import threads_for, using


def run_method(
    method: Method, folder: str | Path, made_from: dict[str, Any], identity: dict[str, Any] | None = None
) -> list[float]:
    """Runs `method` up to its `iterations` and returns the losses of all of them.

    The state is saved to `folder`/checkpoint.safetensors as often as the method's settings say, at the end and before
    an error. The same call continues from there; on the CPU it ends with the same bits as a run that was never stopped,
    since iteration i draws from the stream (seed, method.name, i).

    Where the method averages several draws, each comes from its own stream, and several processes (ranks.py) share them
    and end with the same bits as one. Where it does not, the first process does all of the work and the others wait.

    With settings.snapshot_every the set as it is before the first iteration, after every so many and at the end goes to
    `folder`/snapshots/iteration_000100.safetensors and so on. Losses and learning rates go to `folder`/losses.csv.

    made_from: what snapshots are saved with as their settings. identity: what a checkpoint must have been made from to
    be continued; None: `made_from`.

    Raises ValueError when the checkpoint was made from something else, or the processes cannot share the draws equally;
    FloatingPointError (after saving the last good state) when a loss or gradient is not finite or the loss exceeds
    `method.max_loss`."""
    seed = method.task.context.seed
    known = {**(made_from if identity is None else identity), "seed": seed, "method": method.name}
    checkpoint = Checkpoint(Path(folder) / "checkpoint.safetensors", known)
    check_shares(method)
    optimizer = method.optimizer()
    if ranks.world() == 1 or method.losses_per_iteration > 1:
        losses = _run(method, optimizer, checkpoint, Path(folder), made_from)
        ranks.barrier()
        return losses
    return _run_by_first(method, optimizer, checkpoint, Path(folder), made_from)


def _run_by_first(
    method: Method, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, folder: Path, made_from: dict[str, Any]
) -> list[float]:
    """`_run` of the first process, whose last state the others read; all of them raise where its loss explodes."""
    losses, problem = list[float](), ""
    if ranks.first():
        say(
            f"{method.name} has one loss an iteration, so that the first of the {ranks.world()} processes distills and "
            "the others wait (MTT, DATM and SelMatch: experts_per_iteration)"
        )
        with ranks.alone(bars=True):
            try:
                losses = _run(method, optimizer, checkpoint, folder, made_from)
            except FloatingPointError as error:
                problem = str(error)
    stopped = any(flag.item() for flag in ranks.gather(torch.tensor(bool(problem))))
    if not ranks.first():
        losses = checkpoint.restore(method, optimizer)
    if stopped:
        raise FloatingPointError(problem or f"{method.name} stopped in the first process, which says why")
    if len(losses) < method.iterations:
        raise OSError(
            f"process {ranks.rank()} finds {len(losses)} of {method.iterations} iterations in {checkpoint.path}; all "
            "processes must see one file system"
        )
    return losses


def _run(
    method: Method, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, folder: Path, made_from: dict[str, Any]
) -> list[float]:
    """The iterations that are left; returns the losses of all."""
    settings, iterations = method.settings, method.iterations
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = checkpoint.restore(method, optimizer)
    keep = Snapshots(folder / "snapshots", settings.snapshot_every, iterations, made_from)
    log = Log(folder, method, optimizer, losses)
    log.show(keep(method, len(losses)), len(losses))
    saved_at = time.monotonic()
    good = None
    done = min(len(losses), iterations)
    work = {"unit": "iteration", "kind": "iterations"}
    bar = ranks.progress(total=iterations, initial=done, desc=method.name, **work)
    with using(_threads(method)), bar as progress:
        while len(losses) < iterations:
            iteration, learned = len(losses), method.learned_rates()
            good, problem = _iterate(method, optimizer, rates, losses, good)
            if problem is not None:
                _save(checkpoint, log, method, optimizer, losses)
                raise _stopped(method, iteration, losses, checkpoint, problem)
            log.add(len(losses), losses[-1], learned)
            log.show(keep(method, len(losses)), len(losses))
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if time.monotonic() - saved_at > settings.checkpoint_seconds:
                _save(checkpoint, log, method, optimizer, losses)
                saved_at = time.monotonic()
    _save(checkpoint, log, method, optimizer, losses)
    log.close()
    return losses


def _save(
    checkpoint: Checkpoint, log: Log, method: Method, optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    log.hold(len(losses))
    checkpoint.save(method, optimizer, losses)


def _threads(method: Method) -> int:
    batch = method.largest_batch()
    return torch.get_num_threads() if batch is None else threads_for(batch[0], method.combined().detach(), batch[1])


def _stopped(
    method: Method, iteration: int, losses: list[float], checkpoint: Checkpoint, problem: str
) -> FloatingPointError:
    return FloatingPointError(
        f"{method.name} stopped at iteration {iteration + 1}: {problem}. The last good state, after {len(losses)} "
        f"iterations, is in {checkpoint.path}. {method.advice()} Changed settings need a new folder."
    )


def _iterate(
    method: Method,
    optimizer: torch.optim.Optimizer,
    rates: list[float],
    losses: list[float],
    good: LoopState | None,
) -> tuple[LoopState, str | None]:
    """One update of `method`, whose loss is added to `losses`. good: the state before the last update.

    Returns the state before this update, and None; or, with `method` and `losses` put back to the last good state, what
    is wrong with the loss, the gradient or what the update made."""
    iteration, before = len(losses), LoopState(method, optimizer)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * method.decay(iteration)
    optimizer.zero_grad()
    try:
        value = _backward(method, iteration)
        problem = _problem(value, method)
    except FloatingPointError as error:  # of a network that the loss trains
        problem = str(error)
    if problem is None:
        good = before
        optimizer.step()
        method.updated()
        problem = _refusal(method)
    elif good is not None:
        losses.pop()  # `good` is the state before the update that led here
    if problem is None:
        losses.append(value)
    else:
        (good or before).put_back(method, optimizer)
    return before, problem


def check_shares(method: Method) -> None:
    """ValueError where the processes cannot share the draws of an iteration equally, or the method cannot average
    several."""
    draws = method.losses_per_iteration
    if draws < 1 or (draws > 1 and draws % ranks.world()):
        raise ValueError(
            f"the number of losses of an iteration must be 1, or a multiple of the number of processes, "
            f"{ranks.world()}, which share them; got {draws} (for MTT, DATM and SelMatch it is experts_per_iteration)"
        )
    if draws > 1 and method.losses_change_state:
        raise ValueError(f"{method.name} keeps state from one loss to the next and cannot average {draws} of them")


def _backward(method: Method, iteration: int) -> float:
    """Gives what is learned the mean gradient of the iteration's draws, and returns their mean loss. Each rank computes
    every world-th; all add them up in the order of the draws, so that the bits do not depend on the number of ranks."""
    draws, context = method.losses_per_iteration, method.task.context
    if draws == 1:
        return _one_backward(method, iteration, context.generator(method.name, iteration)).item()
    found: dict[str, list[Tensor]] = {"": [], **{name: [] for name in method.learned}}
    for draw in ranks.mine(draws):
        stream = (iteration, draw) if draw else (iteration,)
        found[""].append(_one_backward(method, iteration, context.generator(method.name, *stream)))
        for name, t in method.learned.items():
            found[name].append(torch.zeros_like(t) if t.grad is None else t.grad)
            t.grad = None
    means = {name: _mean(torch.stack(values), draws) for name, values in found.items()}
    for name, t in method.learned.items():
        t.grad = means[name]
    return means[""].item()


def _one_backward(method: Method, iteration: int, generator: torch.Generator) -> Tensor:
    """Gives what is learned, and nothing else, the gradient of one loss, in float32 where the loss does not say
    otherwise; dropout too draws its masks from a stream of `generator`. Returns the loss. NotImplementedError where
    torch has no second derivative of an operation of the network."""
    leaves = list(method.learned.values())
    device = leaves[0].device
    with precision_scope("float32", device), global_stream(generator, device), twice_differentiable():
        loss = method.loss(iteration, generator)
        loss.backward(inputs=leaves)
    return loss.detach()


def _mean(mine: Tensor, draws: int) -> Tensor:
    everyone = ranks.gather(mine)
    total = torch.zeros_like(mine[0])
    for draw in range(draws):
        total += everyone[draw % len(everyone)][draw // len(everyone)]
    return total / draws


def _problem(loss: float, method: Method) -> str | None:
    if not math.isfinite(loss) or loss > method.max_loss:
        return f"the loss is {loss:.6g} (allowed: at most {method.max_loss:g})"
    bad = [name for name, t in method.learned.items() if t.grad is not None and not t.grad.isfinite().all()]
    return f"the gradient of {', '.join(bad)} is not finite" if bad else None


def _refusal(method: Method) -> str | None:
    try:
        method.check()
    except FloatingPointError as error:
        return str(error)
    return None
