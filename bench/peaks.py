"""What the machine can do, measured in the same run as everything that is compared with it: how fast memory is copied,
and how fast products of large matrices are in a precision."""

from __future__ import annotations

import functools
import time
from contextlib import AbstractContextManager

import torch

from bench.timing import Setting, alternate, threads
from selmatch_ext.precision import is_slow, precision_scope

NAMES = {"float32": "IEEE float32", "tf32": "TF32", "bfloat16": "bfloat16"}


def precisions(setting: Setting) -> list[str]:
    """Those that are measured: all three on a GPU; on a CPU float32, and bfloat16 where it has instructions for it."""
    if setting.gpu:
        return list(NAMES)
    return ["float32"] if is_slow(torch.device("cpu")) else ["float32", "bfloat16"]


def tensors_in(setting: Setting, precision: str) -> tuple[torch.dtype, AbstractContextManager]:
    """The dtype of tensors, and the scope to use them in, so that products and convolutions have that precision."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return dtype, precision_scope("tf32" if precision == "tf32" else "float32", torch.device(setting.device))


@functools.cache
def copy_rate(setting: Setting) -> float:
    """Bytes per second of a copy from memory to memory on the device, read and written bytes together; of tensors far
    larger than the caches."""
    count = setting.size(2**26, 2**28, 2**16)
    source = torch.ones(count, device=setting.device)
    target = torch.empty_like(source)
    with threads():
        seconds = alternate(setting, {"copy": lambda: target.copy_(source)}, repeats=9)["copy"]
    return 2 * source.nbytes / seconds


@functools.cache
def product_rate(setting: Setting, precision: str = "float32") -> float:
    """FLOP per second (a multiplication and an addition are two) of the fastest of several products of matrices in
    `precision`. torch's products come near the multiply-add peak of a processor; which size does best differs."""
    dtype, scope = tensors_in(setting, precision)
    sizes = setting.size([(1, 512), (1, 1024), (1, 2048), (8, 512)], [(1, 4096), (1, 8192)], [(1, 64)])
    best = 0.0
    with scope, threads():
        for batch, n in sizes:
            a, b = (torch.randn(batch, n, n, device=setting.device).to(dtype) for _ in range(2))
            if batch == 1:
                function = functools.partial(torch.mm, a[0], b[0], out=torch.empty_like(a[0]))
            else:
                function = functools.partial(torch.bmm, a, b, out=torch.empty_like(a))
            best = max(best, 2 * batch * n**3 / _least_seconds(setting, function))
    return best


def _least_seconds(setting: Setting, function) -> float:
    """The shortest of several calls: other processes only make a call longer."""
    if setting.gpu:
        return min(alternate(setting, {"product": function}, repeats=3, in_a_row=5)["product"] for _ in range(2))
    seconds = []
    for _ in range(2 if setting.quick else 8):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def measured(setting: Setting) -> dict:
    """Both, for the figures of a run."""
    return {
        "copy_bytes_per_second": copy_rate(setting),
        "product_flops": {precision: product_rate(setting, precision) for precision in precisions(setting)},
    }


def rows(figures: dict) -> list[tuple[str, str, str]]:
    found = [("copy in memory", f"{figures['copy_bytes_per_second'] / 1e9:.1f} GB/s", "")]
    for precision, rate in figures["product_flops"].items():
        what = f"peak: fastest of several products of matrices, {NAMES[precision]}"
        found.append((what, f"{rate / 1e9:.0f} GFLOP/s", ""))
    return found
