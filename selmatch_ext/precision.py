"""Reduced precision, only where it is asked for and only as far as the `with` reaches."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

SLOW = 2.0  # times float32's: with instructions for bfloat16 it takes less than 1, without them 10 and more
_insisted: ContextVar[bool] = ContextVar("insisted", default=False)


@contextlib.contextmanager
def precision_scope(precision: str, device: torch.device) -> Iterator[None]:
    """float32 rounds nothing, also on a CUDA device, where torch by itself lets convolutions use TF32; tf32 rounds
    float32 products and convolutions there; bfloat16 runs them in bfloat16 (autocast).

    Raises ValueError for another name, or for tf32 on a device that is not CUDA."""
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision must be float32, tf32 or bfloat16, got {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision 'tf32' needs a CUDA device, got {device}")
    if precision == "bfloat16":
        warn_if_slow(device)
    if device.type != "cuda":
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
        return
    with _tf32(precision == "tf32"), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Within, TF32 is on or off in products and in cuDNN's convolutions and recurrent layers.

    torch has an older and a newer switch for each, and reading the older one raises where the two disagree. A model may
    read either, so both are set."""
    cudnn: Any = torch.backends.cudnn
    products = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    layers = [cudnn.conv, cudnn.rnn]
    newer = [(switch, switch.fp32_precision) for switch in (*products, *layers)]
    older_product = _older(torch.get_float32_matmul_precision, products)
    older_layer = _older(torch._C._get_cudnn_allow_tf32, layers)
    try:
        torch.set_float32_matmul_precision("high" if on else "highest")
        cudnn.allow_tf32 = on
        for switch, _ in newer:
            switch.fp32_precision = "tf32" if on else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(older_product)
        cudnn.allow_tf32 = older_layer
        for switch, value in newer:
            switch.fp32_precision = value


def _older(read: Callable[[], Any], newer: list[Any]) -> Any:
    """What `read`, which raises where the newer switches disagree with the older one, returns where they agree with it.
    Changes the newer ones."""
    values = ("ieee", "tf32", "bf16")
    for number, value in enumerate(values):
        for switch in newer:
            switch.fp32_precision = value
        try:
            return read()
        except RuntimeError:
            if number == len(values) - 1:
                raise


@functools.cache
def bfloat16_slowdown() -> float:
    """How many times as long as in float32 a small convolution takes in bfloat16 on this processor, measured once:
    median of 5 turns. Well below 1 with instructions for bfloat16, 10 and more without them."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn((8, 16, 16, 16), generator=draw)
    weights = torch.randn((16, 16, 3, 3), generator=draw)
    pairs = [(image.to(dtype), weights.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    ratios = []
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for turn in range(6):
            seconds = []
            for x, w in pairs:
                begin = time.perf_counter()
                torch.conv2d(x, w, padding=1)
                seconds.append(time.perf_counter() - begin)
            if turn > 0:  # the first sets up
                ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


def is_slow(device: torch.device) -> bool:
    """Whether bfloat16 is much slower than float32 on `device`: on a processor without instructions for it."""
    return device.type == "cpu" and bfloat16_slowdown() > SLOW


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"bfloat16 takes {bfloat16_slowdown():.0f} times as long as float32 on this processor, which has no "
        "instructions for it; use precision float32",
        stacklevel=3,
    )


def warn_if_slow(device: torch.device) -> None:
    """Warns, once in a process, where bfloat16 is much slower than float32."""
    if device.type == "cpu" and not _insisted.get() and is_slow(device):
        _warn_once()


@contextlib.contextmanager
def insist_on_bfloat16(insist: bool = True) -> Iterator[None]:
    """Within, a run may use bfloat16 where it is slow (to compare figures with those of another machine, say)."""
    token = _insisted.set(insist)
    try:
        yield
    finally:
        _insisted.reset(token)


def check_precision(name: str, precision: str, device: torch.device) -> None:
    """ValueError, before any work, for a precision that `device` does not have, or that is so slow there that it must
    be a mistake. name: of the setting."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"{name} is tf32, which needs a CUDA device; the device is {device}")
    if precision == "bfloat16" and not _insisted.get() and is_slow(device):
        raise ValueError(
            f"{name} is bfloat16, which takes {bfloat16_slowdown():.0f} times as long as float32 on this processor; "
            "use float32, or add --insist-on-bfloat16 (in Python: selmatch_ext.precision.insist_on_bfloat16)"
        )
