"""Our 3 x 3 convolutions on the CPU against torch's: forward, gradient of the input, gradient of the weight.

The shapes are those of ConvNet (width 128, depth 3) at batch 50, images in channels-last memory, float32 in both. GFLOP
per second are those of the direct sum, 2 x 9 multiplications and additions for every output, channel and input channel,
whatever the algorithm: Winograd's filtering does fewer, so that its share of the peak (peaks.py) may pass 100 %. Errors
are the distance to torch's convolution in float64, relative to its norm.
"""

from functools import partial

import torch

from bench.peaks import product_rate
from bench.timing import Setting, alternate, threads
from selmatch_ext.ops.conv3x3 import conv3x3, conv3x3_input_gradient, conv3x3_weight_gradient

DEVICES = ("cpu",)
BACKWARD = torch.ops.aten.convolution_backward
SETTINGS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups


def _by_torch(name, x, weight, g):
    if name == "forward":
        return torch.conv2d(x, weight, padding=1)
    of_input = name == "input gradient"
    return BACKWARD(g, x, weight, None, *SETTINGS, [of_input, not of_input, False])[0 if of_input else 1]


def _case(setting, batch, channels, outputs, side):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        x = torch.randn(shape, generator=generator)
        return x.contiguous(memory_format=torch.channels_last)

    x, g = normal(batch, channels, side, side), normal(batch, outputs, side, side)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator)
    ours = {
        "forward": lambda: conv3x3(x, weight),
        "input gradient": lambda: conv3x3_input_gradient(g, weight),
        "weight gradient": lambda: conv3x3_weight_gradient(x, g),
    }
    plain = {name: partial(_by_torch, name, x, weight, g) for name in ours}
    wide = [t.double() for t in (x, weight, g)]
    flops = 2 * 9 * batch * side * side * channels * outputs
    cases = {}
    for name in sorted(ours):
        exact = _by_torch(name, *wide)
        errors = {
            f"{whose}_error": ((call().double() - exact).norm() / exact.norm()).item()
            for whose, call in (("ours", ours[name]), ("torch", plain[name]))
        }
        if errors["ours_error"] > 1e-5:
            raise RuntimeError(f"{name}: wrong by {errors['ours_error']}")
        seconds = alternate(setting, {"ours": ours[name], "torch": plain[name]}, repeats=9, in_a_row=2)
        cases[name] = {**seconds, "speedup": seconds["torch"] / seconds["ours"], **errors}
        for whose, s in seconds.items():
            cases[name] |= {f"{whose}_flops": flops / s, f"{whose}_share": flops / s / product_rate(setting)}
    return cases


@torch.no_grad()
def run(setting: Setting) -> dict:
    """By shape and direction: seconds, direct-equivalent FLOP per second and their share of the peak, of both."""
    shapes = [(50, 3, 128, 32), (50, 128, 128, 16), (50, 128, 128, 8), (50, 64, 64, 8)]
    if setting.quick:
        shapes = [(2, 3, 32, 8), (2, 32, 32, 8)]
    with threads():
        cases = {f"{b} x {c} x {s} x {s} to {k} channels": _case(setting, b, c, k, s) for b, c, k, s in shapes}
    return {"device": setting.device, "peak": product_rate(setting), "cases": cases}


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    rows = []
    for shape, cases in result["cases"].items():
        for name, case in cases.items():
            figure = f"{1e3 * case['ours']:.2f} ms, {case['ours_flops'] / 1e9:.0f} GFLOP/s = {case['ours_share']:.0%}"
            figure += f" of the peak, {case['speedup']:.2f}x torch ({case['torch_share']:.0%})"
            figure += f", error {case['ours_error']:.1e} (torch {case['torch_error']:.1e})"
            rows.append((f"{name}, {shape}", figure, ""))
    return rows
