"""Translates torch's layers and functions into rules: one table by module class, one by function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from torch.nn import functional as F

from selmatch_ext.fused.map_rules import AdaptiveAverage, Concatenate, Elementwise, MaxPool, Multiply
from selmatch_ext.fused.operations import Operation, Unsupported, no_rule
from selmatch_ext.fused.rules import Add, Average, Block, Conv, Flatten, Linear, Rule
from selmatch_ext.ops.block import (
    AVERAGE_POOL,
    BATCH_NORM,
    MAX_POOL,
    PIECEWISE,
    SAMPLE_NORM,
    SIGMOID,
    SWISH,
    BlockKind,
)

if TYPE_CHECKING:
    from selmatch_ext.fused.reader import _Reader

Read = tuple[tuple[int, ...], list[Rule]]  # (inputs, rules)
_Norm = nn.GroupNorm | nn.InstanceNorm2d | nn.LayerNorm | nn.BatchNorm2d


def _arguments(node: fx.Node, *names: str, **defaults: object) -> list[object]:
    """The arguments of a call in the order of `names`, the first being the input."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if len(node.args) > len(names) or given.keys() - set(names) or len(node.all_input_nodes) > 1:
        raise no_rule(f"{node.target} with arguments {node.args[1:]} {dict(node.kwargs)}")
    return [given.get(name, defaults.get(name)) for name in names]


def _pair(value: object) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


# --- modules ----------------------------------------------------------------------------------------------------------


def _conv(reader: _Reader, m: nn.Conv2d, name: str) -> list[Rule]:
    if m.padding_mode != "zeros" or isinstance(m.padding, str):
        raise no_rule(f"{name} with padding {m.padding!r}, padding_mode {m.padding_mode!r}")
    weight, bias = reader.parameter(m.weight), reader.parameter(m.bias)
    return [Conv(weight, bias, _pair(m.stride), _pair(m.padding), _pair(m.dilation), m.groups)]


def _norm(reader: _Reader, m: _Norm, name: str, norm: int, groups: int, centers: bool) -> list[Rule]:
    if not m.training and getattr(m, "running_mean", None) is not None:
        raise Unsupported(f"{name} is in evaluation mode, in which it uses its running statistics")
    kind = BlockKind(norm, groups, m.eps)
    return [Block(kind, reader.parameter(m.weight), reader.parameter(m.bias), centers, reader.paths[id(m)])]


def _layer_norm(reader: _Reader, m: nn.LayerNorm, name: str) -> list[Rule]:
    if len(m.normalized_shape) != 3:
        raise no_rule(f"{name} over {tuple(m.normalized_shape)}")
    return _norm(reader, m, name, SAMPLE_NORM, 1, False)


def _instance_norm(reader: _Reader, m: nn.InstanceNorm2d, name: str) -> list[Rule]:
    return _norm(reader, m, name, SAMPLE_NORM, m.num_features, True)


def _linear(reader: _Reader, m: nn.Linear, name: str) -> list[Rule]:
    return [Linear(reader.parameter(m.weight), reader.parameter(m.bias))]


def _leaky(slope: float) -> list[Rule]:
    return [Block(BlockKind(activation=PIECEWISE, slope=slope))]


def _smooth(activation: int) -> list[Rule]:
    return [Block(BlockKind(activation=activation))]


def _average(
    name: str, size: object, stride: object, padding: object, ceil: bool, count: bool, by: int | None
) -> list[Rule]:
    size = _pair(size)
    stride = size if stride is None else _pair(stride)
    rule = Average(size, stride, _pair(padding), bool(ceil), bool(count), by)
    return [Block(BlockKind(pool=AVERAGE_POOL))] if rule == Average((2, 2), (2, 2)) else [rule]


def _maximum(
    name: str, size: object, stride: object, padding: object, dilation: object, ceil: bool, indices: bool
) -> list[Rule]:
    if indices:
        raise no_rule(f"{name} with return_indices")
    stride = size if stride in (None, []) else stride
    rule = MaxPool(_pair(size), _pair(stride), _pair(padding), _pair(dilation), bool(ceil))
    if rule == MaxPool((2, 2), (2, 2), (0, 0), (1, 1), False):
        return [Block(BlockKind(pool=MAX_POOL))]
    return [rule]


def _adaptive(name: str, size: object) -> list[Rule]:
    return [Average(None) if _pair(size) == (1, 1) else AdaptiveAverage(_pair(size))]


def _flatten_module(reader: _Reader, m: nn.Flatten, name: str) -> list[Rule]:
    if (m.start_dim, m.end_dim) != (1, -1):
        raise no_rule(f"{name} of dimensions {m.start_dim} to {m.end_dim}")
    return [Flatten()]


def _undropped(name: str, p: float, training: bool) -> list[Rule]:
    """Nothing, where nothing is drawn."""
    if p > 0 and training:
        raise no_rule(name)
    return []


def _hardtanh(low: float, high: float) -> list[Rule]:
    return [Elementwise("hardtanh", (low, high))]


MODULES: dict[type, Callable] = {
    nn.Conv2d: _conv,
    nn.GroupNorm: lambda r, m, name: _norm(r, m, name, SAMPLE_NORM, m.num_groups, m.num_groups == m.num_channels),
    nn.InstanceNorm2d: _instance_norm,
    nn.LayerNorm: _layer_norm,
    nn.BatchNorm2d: lambda r, m, name: _norm(r, m, name, BATCH_NORM, 1, True),
    nn.Linear: _linear,
    nn.ReLU: lambda r, m, name: _leaky(0.0),
    nn.LeakyReLU: lambda r, m, name: _leaky(m.negative_slope),
    nn.Sigmoid: lambda r, m, name: _smooth(SIGMOID),
    nn.SiLU: lambda r, m, name: _smooth(SWISH),
    nn.Tanh: lambda r, m, name: [Elementwise("tanh")],
    nn.GELU: lambda r, m, name: [Elementwise("gelu", (m.approximate,))],
    nn.Hardsigmoid: lambda r, m, name: [Elementwise("hardsigmoid")],
    nn.Hardswish: lambda r, m, name: [Elementwise("hardswish")],
    nn.Hardtanh: lambda r, m, name: _hardtanh(m.min_val, m.max_val),
    nn.ReLU6: lambda r, m, name: _hardtanh(0.0, 6.0),
    nn.AvgPool2d: lambda r, m, name: _average(
        name, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.MaxPool2d: lambda r, m, name: _maximum(
        name, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    ),
    nn.AdaptiveAvgPool2d: lambda r, m, name: _adaptive(name, m.output_size),
    nn.Flatten: _flatten_module,
    nn.Identity: lambda r, m, name: [],
    nn.Dropout: lambda r, m, name: _undropped(name, m.p, m.training),
    nn.Dropout2d: lambda r, m, name: _undropped(name, m.p, m.training),
}


# --- functions and methods: each gives (inputs, rules) ----------------------------------------------------------------


def _one(make: Callable[..., list[Rule]], *names: str, **defaults: object) -> Callable:
    """A function of one tensor, whose other arguments go to `make`."""

    def read(reader: _Reader, node: fx.Node, name: str) -> Read:
        x, *rest = _arguments(node, "input", *names, **defaults)
        return (reader.source(x, name),), make(name, *rest)

    return read


def _view(reader: _Reader, node: fx.Node, name: str) -> Read:
    x, *shape = node.args
    shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if node.kwargs or len(shape) != 2 or not reader.is_batch_size(shape[0]) or shape[1] != -1:
        raise no_rule(f"{name} to {tuple(shape)}; x.view(x.size(0), -1) is known")
    return (reader.source(x, name),), [Flatten()]


def _flatten_call(name: str, start: object, end: object) -> list[Rule]:
    if (start, end) != (1, -1):
        raise no_rule(f"{name} of dimensions {start} to {end}")
    return [Flatten()]


def _add(reader: _Reader, node: fx.Node, name: str) -> Read:
    if node.kwargs or len(node.args) != 2:
        raise no_rule(f"{name} with {dict(node.kwargs)}")
    return tuple(reader.source(a, name) for a in node.args), [Add()]


def _multiply(reader: _Reader, node: fx.Node, name: str) -> Read:
    """The product of two maps; x * sigmoid(x) is swish, which a block can do."""
    if node.kwargs or len(node.args) != 2:
        raise no_rule(f"{name} with {dict(node.kwargs)}")
    a, b = (reader.source(x, name) for x in node.args)
    for x, gate in ((a, b), (b, a)):
        if gate >= 0 and reader.found[gate] == Operation(_smooth(SIGMOID)[0], (x,)):
            return (x,), _smooth(SWISH)
    return (a, b), [Multiply()]


def _concatenate(reader: _Reader, node: fx.Node, name: str) -> Read:
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
    tensors = given.pop("tensors", None)
    if not isinstance(tensors, (tuple, list)) or given != {"dim": 1}:
        raise no_rule(f"{name} with arguments {node.args} {dict(node.kwargs)}; along dimension 1 it is known")
    return tuple(reader.source(x, name) for x in tensors), [Concatenate()]


def _mean(reader: _Reader, node: fx.Node, name: str) -> Read:
    x, dims, keep = _arguments(node, "input", "dim", "keepdim", keepdim=False)
    if dims is None or {d % 4 for d in _pair(dims)} != {2, 3}:
        raise no_rule(f"{name} over {dims}")
    return (reader.source(x, name),), [Average(None)] if keep else [Average(None), Flatten()]


_RELU = _one(lambda name, inplace: _leaky(0.0), "inplace")
_SIGMOID = _one(lambda name: _smooth(SIGMOID))
_FLATTEN = _one(_flatten_call, "start_dim", "end_dim", start_dim=0, end_dim=-1)
_TANH = _one(lambda name: [Elementwise("tanh")])
_GELU = _one(lambda name, approximate: [Elementwise("gelu", (approximate,))], "approximate", approximate="none")
_MAX_POOL = _one(
    _maximum,
    *("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    **{"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
)
FUNCTIONS: dict[object, Callable] = {  # methods, and functions of packages that need not be loaded, by their names
    F.relu: _RELU,
    torch.relu: _RELU,
    "relu": _RELU,
    "relu_": _RELU,
    F.leaky_relu: _one(lambda name, slope, inplace: _leaky(slope), "negative_slope", "inplace", negative_slope=0.01),
    F.sigmoid: _SIGMOID,
    torch.sigmoid: _SIGMOID,
    "sigmoid": _SIGMOID,
    F.silu: _one(lambda name, inplace: _smooth(SWISH), "inplace"),
    F.avg_pool2d: _one(
        _average,
        *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        **{"padding": 0, "ceil_mode": False, "count_include_pad": True},
    ),
    F.tanh: _TANH,
    torch.tanh: _TANH,
    "tanh": _TANH,
    F.gelu: _GELU,
    F.hardsigmoid: _one(lambda name, inplace: [Elementwise("hardsigmoid")], "inplace"),
    F.hardswish: _one(lambda name, inplace: [Elementwise("hardswish")], "inplace"),
    F.hardtanh: _one(
        lambda name, low, high, inplace: _hardtanh(low, high),
        *("min_val", "max_val", "inplace"),
        **{"min_val": -1.0, "max_val": 1.0},
    ),
    F.relu6: _one(lambda name, inplace: _hardtanh(0.0, 6.0), "inplace"),
    F.dropout: _one(
        lambda name, p, training, inplace: _undropped(name, p, training),
        *("p", "training", "inplace"),
        **{"p": 0.5, "training": True},
    ),
    "torchvision.ops.stochastic_depth.stochastic_depth": _one(
        lambda name, p, mode, training: _undropped(name, p, training),
        *("p", "mode", "training"),
        training=True,
    ),
    F.max_pool2d: _MAX_POOL,
    torch.max_pool2d: _MAX_POOL,
    F.adaptive_avg_pool2d: _one(_adaptive, "output_size"),
    torch.flatten: _FLATTEN,
    "flatten": _FLATTEN,
    "view": _view,
    "reshape": _view,
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    "add": _add,
    "add_": _add,
    operator.mul: _multiply,
    operator.imul: _multiply,
    torch.mul: _multiply,
    "mul": _multiply,
    "mul_": _multiply,
    torch.cat: _concatenate,
    torch.concat: _concatenate,
    torch.concatenate: _concatenate,
    "mean": _mean,
    torch.mean: _mean,
}
