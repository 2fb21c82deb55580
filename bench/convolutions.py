"""torch's convolutions of the matching step, which the fused engine calls: in which precision and memory format each
direction of each layer is how fast.

Layers of ConvNet (width 128, depth 3) at batch 125 on a GPU, smaller on a CPU. Rows of a precision are compared with
the peak in that precision (peaks.py). On a GPU each cell is measured twice, with cuDNN's heuristic choice of algorithm,
which is the default, and with `torch.backends.cudnn.benchmark`, which measures the algorithms first.
"""

import contextlib

import torch

from bench.peaks import NAMES, precisions, product_rate, tensors_in
from bench.timing import Setting, alternate, rotations, threads

DIRECTIONS = ("forward", "input gradient", "weight gradient")
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
SETTINGS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups


def layers(width: int, depth: int, side: int, channels: int = 3) -> list[tuple[int, int, int]]:
    """(input channels, output channels, side) of each convolution of a ConvNet."""
    return [(channels if i == 0 else width, width, side >> i) for i in range(depth)]


def forward_flops(batch: int, layer: tuple[int, int, int]) -> int:
    """Of the direct sum of one convolution."""
    channels, outputs, side = layer
    return 2 * 9 * batch * channels * outputs * side * side


def _calls(setting, layer, batch, dtype, memory):
    """By direction: a call for each set of inputs."""
    channels, outputs, side = layer
    generator = setting.generator()
    sets = []
    for _ in range(rotations(setting, batch * outputs * side * side * dtype.itemsize)):
        shapes = (batch, channels, side, side), (outputs, channels, 3, 3), (batch, outputs, side, side)
        tensors = (torch.randn(shape, generator=generator, device=setting.device).to(dtype) for shape in shapes)
        sets.append([t.contiguous(memory_format=memory) for t in tensors])

    def back(x, w, g, mask):
        return torch.ops.aten.convolution_backward(g, x, w, None, *SETTINGS, mask)

    return {
        "forward": [lambda x=x, w=w: torch.conv2d(x, w, padding=1) for x, w, _ in sets],
        "input gradient": [lambda s=s: back(*s, [True, False, False]) for s in sets],
        "weight gradient": [lambda s=s: back(*s, [False, True, False]) for s in sets],
    }


@contextlib.contextmanager
def _benchmark(on: bool):
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@torch.no_grad()
def run(setting: Setting) -> dict:
    """By layer, direction, precision and memory format: seconds, FLOP per second, share of the precision's peak."""
    batch, width, side = setting.size((16, 64, 32), (125, 128, 32), (2, 8, 8))
    rows = []
    for layer in layers(width, setting.size(3, 3, 2), side):
        for precision in precisions(setting):
            for memory, chosen in FORMATS.items():
                dtype, scope = tensors_in(setting, precision)
                with scope, threads():
                    calls = _calls(setting, layer, batch, dtype, chosen)
                    with _benchmark(False):
                        seconds = alternate(setting, calls, repeats=5, in_a_row=10)
                    searched = None
                    if setting.gpu:
                        with _benchmark(True):
                            searched = alternate(setting, calls, repeats=5, in_a_row=10)
                for direction in DIRECTIONS:
                    row = {"layer": layer, "direction": direction, "precision": precision, "memory": memory}
                    row |= _figures(setting, seconds[direction], layer, batch, precision)
                    if searched is not None:
                        row["seconds_cudnn_benchmark"] = searched[direction]
                    rows.append(row)
    return {"device": setting.device, "batch": batch, "rows": rows}


def _figures(setting, seconds, layer, batch, precision):
    rate = forward_flops(batch, layer) / seconds
    return {"seconds": seconds, "flops": rate, "share_of_peak": rate / product_rate(setting, precision)}


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    rows = []
    for row in result["rows"]:
        channels, outputs, side = row["layer"]
        what = f"{result['batch']} x {channels} x {side} x {side} to {outputs}, {row['direction']}"
        figure = (
            f"{1e6 * row['seconds']:.0f} us, {row['flops'] / 1e9:.0f} GFLOP/s = {row['share_of_peak']:.0%} of the peak"
        )
        if "seconds_cudnn_benchmark" in row:
            figure += f", {1e6 * row['seconds_cudnn_benchmark']:.0f} us with cudnn.benchmark"
        rows.append((f"{what}, {NAMES[row['precision']]}, {row['memory']}", figure, ""))
    return rows
