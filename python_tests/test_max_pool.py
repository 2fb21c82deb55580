"""Values in a block's max pooling that are not finite, on the CPU: they go where torch's pooling sends them."""

import math

import pytest
import torch
from torch.nn import functional as F

from selmatch_ext.ops import block

KIND = block.BlockKind(block.NO_NORM, activation=block.PIECEWISE, slope=0.5, pool=block.MAX_POOL)
NONE = (None, None)
CHANNELS = 37  # two vectors and a part of one


def with_value(value, pixel):
    z = torch.randn(2, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    z[:, :, pixel // 2, pixel % 2] = value
    return z.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pixel", range(4))
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_value_that_is_not_finite(value, pixel):
    z = with_value(value, pixel)
    expected = F.max_pool2d(F.leaky_relu(z, 0.5), 2)
    result = block.block_forward(z, None, None, KIND)[0]
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    dual = block.block_dual_forward(block.DualTensor(z, torch.ones_like(z)), NONE, NONE, KIND)[0]
    torch.testing.assert_close(dual[:2], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pixel", range(4))
def test_an_infinite_loser_leaves_the_gradients_of_its_cell_alone(pixel):
    z = with_value(-math.inf, pixel)
    low = with_value(-1e4, pixel)
    others = [k for k in range(4) if k != pixel]
    g, ones = torch.ones(2, CHANNELS, 2, 2), torch.ones_like(z)
    results = []
    for x in (z, low):
        stats = block.block_forward(x, None, None, KIND)[1]
        dual_x, dual_g = block.DualTensor(x, ones), block.DualTensor(g, g)
        dual_y, dual_stats = block.block_dual_forward(dual_x, NONE, NONE, KIND)
        gz = block.block_backward(g, x, stats, None, None, KIND)[0]
        both = block.block_dual_backward(dual_g, dual_x, dual_stats, NONE, NONE, KIND)[0]
        cells = [t[:, :, :2, :2].flatten(2)[..., others] for t in (gz, both)]
        results.append([dual_y, *cells])
    assert all(t.isfinite().all() for t in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
