"""The first layer of a ConvNet on the CPU, its convolution of the images and the block behind it: each pass in one
operation, which has no result of the convolution (ops/conv_block.py), against the two operations one after the other.

Width 128, batch 50, 32 x 32 images, relu and average pooling, float32. The share of the peak is that of the products of
matrices with the pixels' patches that a pass needs: 1 forward and 1 back, 2 and 4 with tangents, each as large as
the convolution. Memory of results is used again on both sides, as in a run.
"""

from functools import partial

import torch

from bench.convolutions import forward_flops
from bench.peaks import product_rate
from bench.timing import Setting, alternate, threads
from selmatch_ext.allocator import reused_memory
from selmatch_ext.ops import block, conv3x3, conv_block
from selmatch_ext.ops.block import BlockKind, DualTensor

DEVICES = ("cpu",)


def _calls(setting: Setting, kind: BlockKind, batch: int, width: int, side: int) -> dict[str, dict[str, partial]]:
    """By pass: in one operation and in two."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        t = torch.randn(shape, generator=draw)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    x, g = normal(batch, 3, side, side), DualTensor(*(normal(batch, width, side // 2, side // 2) for _ in range(2)))
    weights, affines = (normal(width, 3, 3, 3), normal(width, 3, 3, 3)), ((normal(width), normal(width)),) * 2
    saved = conv_block.conv_block(x, weights[0], None, affines[0], kind)[1]
    z, z_t = (conv3x3.conv3x3(x, weight) for weight in weights)
    stats = block.block_forward(z, *affines[0], kind)[1]
    dual_stats = block.block_dual_forward(DualTensor(z, z_t), *affines, kind)[1]

    def forward():
        return block.block_forward(conv3x3.conv3x3(x, weights[0]), *affines[0], kind)

    def backward():
        gz, *found = block.block_backward(g.value, z, stats, *affines[0], kind)
        return conv3x3.conv3x3_weight_gradient(x, gz), *found

    def dual_forward():
        both = conv3x3.conv3x3_dual(x, None, *weights)
        return block.block_dual_forward(DualTensor(*both.chunk(2)), *affines, kind)

    def dual_backward():
        both, *found = block.block_dual_backward(g, DualTensor(z, z_t), dual_stats, *affines, kind)
        gzt, gz = both.chunk(2)
        of_x = conv3x3.conv3x3_dual(gz, gzt, *weights, transposed=True, value=False)
        return of_x, conv3x3.conv3x3_weight_gradient(x, gzt), *found

    rest = weights, saved, affines, kind
    one = {
        "forward": partial(conv_block.conv_block, x, weights[0], None, affines[0], kind),
        "backward": partial(conv_block.conv_block_backward, g.value, x, weights[0], saved, affines[0], kind),
        "dual forward": partial(conv_block.conv_block_dual_forward, x, weights, affines, kind),
        "dual backward": partial(conv_block.conv_block_dual_backward, g[:2], x, *rest),
    }
    two = (forward, backward, dual_forward, dual_backward)
    return {name: {"one": call, "two": other} for (name, call), other in zip(one.items(), two, strict=True)}


@torch.no_grad()
def run(setting: Setting) -> dict:
    """By norm and pass: seconds in one operation and in two, and the share of the peak in one."""
    batch, width, side = setting.size((50, 128, 32), (50, 128, 32), (2, 32, 8))
    norms = {"instance norm": (block.SAMPLE_NORM, width), "batch norm": (block.BATCH_NORM, 1)}
    products = {"forward": 1, "backward": 1, "dual forward": 2, "dual backward": 4}
    cases: dict[str, dict] = {}
    with threads(), reused_memory():
        for norm, (code, groups) in norms.items():
            kind = BlockKind(code, groups, activation=block.PIECEWISE, slope=0.0, pool=block.AVERAGE_POOL)
            for name, calls in _calls(setting, kind, batch, width, side).items():
                seconds = alternate(setting, calls, repeats=15, in_a_row=2)
                flops = products[name] * forward_flops(batch, (3, width, side))
                cases[f"{name}, {norm}"] = {
                    **seconds,
                    "speedup": seconds["two"] / seconds["one"],
                    "share_of_peak": flops / seconds["one"] / product_rate(setting),
                }
    return {"device": setting.device, "batch": batch, "width": width, "side": side, "cases": cases}


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    rows = []
    for name, case in result["cases"].items():
        figure = f"{1e3 * case['one']:.2f} ms, {case['share_of_peak']:.0%} of the peak, "
        figure += f"{case['speedup']:.2f}x two operations"
        rows.append((f"{name}, {result['batch']} images", figure, ""))
    return rows
