"""The block operations (norm + activation + pooling): each pass's time and share of memory bandwidth.

Bytes are those that have to move: each tensor that a pass takes is read once, each one that it gives is written once.
The shares are of the bytes per second of two of torch's copies: one of large tensors (peaks.py), and one of the same z
beside the passes, which on a CPU may lie in the caches and on a GPU shows what so few bytes allow. Passes of the
papers' ConvNet: instance norm, relu and average pooling after convolutions of width 128.
"""

from functools import partial

import torch

from bench.peaks import copy_rate
from bench.timing import Setting, alternate, rotations, threads
from selmatch_ext.ops import block

DTYPES = (torch.float32, torch.bfloat16)


class Passes:
    """The four passes on one shape, and how many bytes each has to move."""

    def __init__(self, setting, shape, dtype, seed):
        generator, device = setting.generator(seed), setting.device
        batch, channels, size, _ = shape
        kind = block.BlockKind(
            block.SAMPLE_NORM, groups=channels, activation=block.PIECEWISE, slope=0.0, pool=block.AVERAGE_POOL
        )

        def images(side):
            x = torch.randn(batch, channels, side, side, generator=generator, device=device).to(dtype)
            return x.contiguous(memory_format=torch.channels_last)

        dual_z, dual_g = (block.DualTensor(*(images(side) for _ in range(3))) for side in (size, size // 2))
        self.z, g = dual_z.value, dual_g.value
        gamma, beta, gamma_t, beta_t = (torch.randn(channels, generator=generator, device=device) for _ in range(4))
        stats = block.block_forward(self.z, gamma, beta, kind)[1]
        affine = ((gamma, beta), (gamma_t, beta_t), kind)
        dual_stats = block.block_dual_forward(dual_z, *affine)[1]
        self.calls = {
            "forward": partial(block.block_forward, self.z, gamma, beta, kind),
            "backward": partial(block.block_backward, g, self.z, stats, gamma, beta, kind),
            "dual forward": partial(block.block_dual_forward, dual_z, *affine),
            "dual backward": partial(block.block_dual_backward, dual_g, dual_z, dual_stats, *affine),
            "copy": self.z.clone,  # into memory of its own, as each pass writes
        }
        full, pooled = self.z.nbytes, g.nbytes
        self.bytes = {
            "forward": full + pooled,  # z; y
            "backward": 2 * full + pooled,  # z, g; gz
            "dual forward": 3 * full + 2 * pooled,  # z and the tangent's two parts; y and its tangent
            "dual backward": 5 * full + 3 * pooled,  # besides, g and its tangent's two parts; gz and its tangent
            "copy": 2 * full,
        }


def _case(setting, shape, dtype):
    batch, channels, side, _ = shape
    sets = rotations(setting, batch * channels * side * side * dtype.itemsize)
    passes = [Passes(setting, shape, dtype, seed) for seed in range(sets)]
    calls = {name: [p.calls[name] for p in passes] for name in passes[0].calls}
    seconds = alternate(setting, calls, in_a_row=20 if setting.gpu else 3)
    moved = passes[0].bytes
    rate = {name: moved[name] / seconds[name] for name in calls}
    return {
        name: {
            "seconds": seconds[name],
            "bytes": moved[name],
            "bytes_per_second": rate[name],
            "share_of_copy": rate[name] / copy_rate(setting),
            "share_of_like_copy": rate[name] / rate["copy"],
        }
        for name in calls
    }


def run(setting: Setting) -> dict:
    """By shape and pass: seconds, bytes that have to move, bytes per second, shares of a copy's bytes per second."""
    cases = {}
    channels = setting.size(128, 128, 8)
    with threads():
        for batch in setting.size((50,), (125, 500), (2,)):
            for side in setting.size((32, 16, 8), (32, 16, 8), (8,)):
                for dtype in DTYPES:
                    label = f"{batch} x {channels} x {side} x {side}, {str(dtype).removeprefix('torch.')}"
                    cases[label] = _case(setting, (batch, channels, side, side), dtype)
    return {"device": setting.device, "cases": cases}


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    gpu = result["device"] != "cpu"
    rows = []
    for label, case in result["cases"].items():
        for name, c in case.items():
            figure = f"{1e6 * c['seconds']:.1f} us, {c['share_of_copy']:.0%} of a copy's bandwidth"
            if name != "copy":
                figure += f", {c['share_of_like_copy']:.0%} of one of this size"
            rows.append((f"{name}, {label}", figure, "at least 70 % of a copy" if gpu and name != "copy" else ""))
    return rows
