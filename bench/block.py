"""The block operations (norm + activation + pooling) against a copy: each pass's time and share of memory bandwidth.

    python -m bench.block [--device cuda] [--json]

Bytes are those that have to move: each tensor that a pass takes is read once, each one that it gives is written once.
The copy is torch's, of z, and its bandwidth counts reading and writing; the share is how near a pass comes to that.
Passes of the papers' ConvNet: instance norm, relu and average pooling after convolutions of width 128.
"""

import argparse
import json
from functools import partial

import torch

from bench.timing import alternate, machine, threads
from selmatch_ext.ops import block

THREADS = 2
CHANNELS = 128
BATCHES = {"cpu": (50,), "cuda": (50, 500, 2500)}
SIZES = (32, 16, 8)
DTYPES = (torch.float32, torch.bfloat16)
KIND = block.BlockKind(
    block.SAMPLE_NORM, groups=CHANNELS, activation=block.PIECEWISE, slope=0.0, pool=block.AVERAGE_POOL
)


class Passes:
    """The four passes on one shape, and how many bytes each has to move."""

    def __init__(self, batch, size, dtype, device):
        generator = torch.Generator().manual_seed(0)

        def images(side):
            x = torch.randn(batch, CHANNELS, side, side, generator=generator).to(device, dtype)
            return x.contiguous(memory_format=torch.channels_last)

        dual_z, dual_g = (block.DualTensor(*(images(side) for _ in range(3))) for side in (size, size // 2))
        self.z, g = dual_z.value, dual_g.value
        gamma, beta, gamma_t, beta_t = (torch.randn(CHANNELS, generator=generator).to(device) for _ in range(4))
        stats = block.block_forward(self.z, gamma, beta, KIND)[1]
        affine = ((gamma, beta), (gamma_t, beta_t), KIND)
        dual_stats = block.block_dual_forward(dual_z, *affine)[1]
        self.calls = {
            "forward": partial(block.block_forward, self.z, gamma, beta, KIND),
            "backward": partial(block.block_backward, g, self.z, stats, gamma, beta, KIND),
            "dual forward": partial(block.block_dual_forward, dual_z, *affine),
            "dual backward": partial(block.block_dual_backward, dual_g, dual_z, dual_stats, *affine),
        }
        full, pooled = self.z.nbytes, g.nbytes
        self.bytes = {
            "forward": full + pooled,  # z; y
            "backward": 2 * full + pooled,  # z, g; gz
            "dual forward": 3 * full + 2 * pooled,  # z and the tangent's two parts; y and its tangent
            "dual backward": 5 * full + 3 * pooled,  # besides, g and its tangent's two parts; gz and its tangent
            "copy": 2 * full,
        }


def _case(batch, size, dtype, device):
    passes = Passes(batch, size, dtype, device)
    calls = {**passes.calls, "copy": passes.z.clone}  # into memory of its own, as each pass writes
    seconds = alternate(calls, calls=20 if device == "cuda" else 3)
    rate = {name: passes.bytes[name] / seconds[name] for name in calls}
    return {
        name: {
            "seconds": seconds[name],
            "bytes": passes.bytes[name],
            "bytes_per_second": rate[name],
            "share_of_copy": rate[name] / rate["copy"],
        }
        for name in calls
    }


def run(device: str = "cpu") -> dict:
    """By shape and pass: seconds, bytes that have to move, bytes per second, share of a copy's bytes per second."""
    cases = {}
    with threads(THREADS):
        for batch in BATCHES[device]:
            for size in SIZES:
                for dtype in DTYPES:
                    label = f"{batch} x {CHANNELS} x {size} x {size}, {str(dtype).removeprefix('torch.')}"
                    cases[label] = _case(batch, size, dtype, device)
    return {"machine": machine(), "device": device, "threads": THREADS, "cases": cases}


def show(result: dict) -> str:
    """The figures as a table."""
    state = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value)
    names = list(next(iter(result["cases"].values())))
    lines = [
        f"blocks (instance norm, relu, average pooling) on {result['device']}, {result['threads']} threads ({state})",
        "microseconds, and the share of the copy's bandwidth",
        f"{'':<32}" + "".join(f"{name:>21}" for name in names),
    ]
    for label, case in result["cases"].items():
        cells = (f"{1e6 * c['seconds']:>13.1f} us {c['share_of_copy']:>4.0%}" for c in case.values())
        lines.append(f"{label:<32}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    label, case = max(result["cases"].items(), key=lambda item: item[1]["copy"]["bytes"])
    goal = "at least 70 % of a copy" if result["device"] == "cuda" else ""
    return [
        (f"{name}, {label}", f"{c['share_of_copy']:.0%} of a copy's bandwidth", goal)
        for name, c in case.items()
        if name != "copy"
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    result = run(options.device)
    print(json.dumps(result, indent=1) if options.json else show(result))
