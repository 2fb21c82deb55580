"""Reads a network with torch.fx into the operations of rules.py, so that the fused engine also takes classes that are
not ours. What has no rule raises `Unsupported`, whose message names it.

torch.fx calls `forward` once, with symbols in place of tensors. It refuses every forward that decides by the values or
sizes of its input; a graph of ATen operations traced on a batch (make_fx, torch.export) silently contains the branches
that this batch took, and takes seconds where this takes milliseconds. What torch.fx cannot see is refused here where it
can be recognized (hooks, replaced forwards, gradient modes, norms in evaluation mode), and found by comparing.py, which
runs the module itself beside what was read."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn import functional as F

from selmatch_ext.files import one_line
from selmatch_ext.models.objects import hooks_of
from selmatch_ext.ops.block import (
    AVERAGE_POOL,
    BATCH_NORM,
    MAX_POOL,
    NO_NORM,
    NO_POOL,
    PIECEWISE,
    SAMPLE_NORM,
    SIGMOID,
    SWISH,
    BlockKind,
)
from selmatch_ext.unroll.rules import Add, Average, Block, Conv, Flatten, Linear, Rule


class Unsupported(Exception):
    """The fused engine cannot compute the network; the message says why, in a sentence."""


def _no_rule(what: str) -> Unsupported:
    return Unsupported(f"the fused engine has no rule for {what}")


@dataclass
class Step:
    """One operation: which earlier results go in (-1 is the images), and how many later ones take its own."""

    rule: Rule
    inputs: tuple[int, ...]
    users: int = 0


def read(model: nn.Module) -> list[Step]:
    """The network as a list of steps in order of execution, the last of which gives the logits.

    model: in the mode in which it is to run; forward is called on it. Raises Unsupported."""
    for name, module in model.named_modules():
        name = name or type(model).__name__
        if any(hooks_of(module)):
            raise Unsupported(f"{name} has hooks, which the fused engine does not call")
        if "forward" in vars(module):
            raise Unsupported(f"{name} has a forward of its own in place of that of its class")
    if nn.modules.module._has_any_global_hook():
        raise Unsupported("hooks for all modules are registered, which the fused engine does not call")
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            graph = _Tracer().trace(model)
    except Unsupported:
        raise
    except fx.proxy.TraceError as error:
        raise Unsupported(
            f"torch.fx cannot read {type(model).__name__}, whose forward decides by values or sizes of its input"
        ) from error
    except Exception as error:
        raise Unsupported(f"torch.fx cannot read {type(model).__name__} ({first_line(error)})") from error
    return _fuse(_Reader(model, graph).steps())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the full stop."""
    return one_line(error).rstrip(".")


class _Proxy(fx.Proxy):
    """Sees x += y as what it is; torch.fx reads x = x + y, and whoever else holds x would miss the sum."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __imul__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *arguments: object, **options: object) -> fx.Node:
        if kind.startswith("call") and not torch.is_grad_enabled():
            raise Unsupported("part of it runs without gradients (torch.no_grad, or an autograd.Function of its own)")
        if kind.startswith("call") and (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            raise Unsupported("part of it runs inside torch.autocast")
        return super().create_node(kind, *arguments, **options)


class _Reader:
    """Turns the nodes of a graph into steps of single operations."""

    def __init__(self, model: nn.Module, graph: fx.Graph):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.graph = graph
        self.found: list[Step] = []
        self.where: dict[fx.Node, int] = {}  # the step whose result a node is, until it is overwritten
        self.memory: dict[fx.Node, fx.Node] = {}  # the first node that is, or may be, in a node's memory

    def steps(self) -> list[Step]:
        result = None
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.where and node.users:
                    raise _no_rule(f"a second input, {node.name}")
                self.where.setdefault(node, -1)
                self.memory[node] = node
            elif node.op == "output":
                result = self._source(node.args[0], "the output")
            elif not self._is_size(node):  # also where nothing takes the result: it may be in place
                self._read(node)
        if result is None or result < 0:
            raise _no_rule("a network that does nothing")
        return _without_unused(self.found, result)

    def _source(self, node: object, what: str) -> int:
        if node in self.memory and node not in self.where:
            raise Unsupported(f"{what} reads {node} after an operation in place has overwritten it")
        if not isinstance(node, fx.Node) or node not in self.where:
            raise _no_rule(f"{what} of {node}")
        return self.where[node]

    def _read(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.modules[node.target]
            name = f"{type(module).__name__} ({node.target})"
            read = _MODULES.get(type(module))
            if read is None or node.kwargs:
                raise _no_rule(name)
            rules = read(self, module, name)
            inputs = tuple(self._source(a, name) for a in node.args)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            read = _FUNCTIONS.get(node.target)
            if node.op == "get_attr":
                raise _no_rule(f"the tensor {name} outside the layer that it belongs to")
            if read is None:
                raise _no_rule(f"the {'method' if node.op == 'call_method' else 'function'} {name}")
            inputs, rules = read(self, node, name)
        self._append(node, inputs, rules)

    def _append(self, node: fx.Node, inputs: tuple[int, ...], rules: list[Rule]) -> None:
        for rule in rules:
            self.found.append(Step(rule, inputs))
            inputs = (len(self.found) - 1,)
        in_place = self._is_in_place(node)
        shared = in_place or all(isinstance(rule, Flatten) for rule in rules)
        self.memory[node] = self.memory[node.all_input_nodes[0]] if shared else node
        if in_place:
            self.where = {n: i for n, i in self.where.items() if self.memory[n] is not self.memory[node]}
        self.where[node] = inputs[0]

    def _is_in_place(self, node: fx.Node) -> bool:
        """Whether an operation with a rule overwrites its first input."""
        if node.op == "call_module":
            return getattr(self.modules[node.target], "inplace", False)
        named = isinstance(node.target, str) and node.target.endswith("_")
        return named or node.target is operator.iadd or bool(node.kwargs.get("inplace"))

    @staticmethod
    def _is_size(node: object) -> bool:
        """Whether a node is x.size(...), x.shape or an entry of one: read where it is used."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_method":
            return node.target == "size"
        if node.target is getattr:
            return node.args[1] == "shape"
        return node.target is operator.getitem and _Reader._is_size(node.args[0])

    @staticmethod
    def is_batch_size(node: object) -> bool:
        """Whether a node is x.size(0) or x.shape[0]."""
        if not _Reader._is_size(node):
            return False
        if node.op == "call_method":
            return node.args[1:] == (0,)
        return node.target is operator.getitem and node.args[1] == 0

    def parameter(self, tensor: torch.Tensor | None) -> str | None:
        return None if tensor is None else self.names[id(tensor)]


def _arguments(node: fx.Node, *names: str, **defaults: object) -> list[object]:
    """The arguments of a call in the order of `names`, the first being the input."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if len(node.args) > len(names) or given.keys() - set(names) or len(node.all_input_nodes) > 1:
        raise _no_rule(f"{node.target} with arguments {node.args[1:]} {dict(node.kwargs)}")
    return [given.get(name, defaults.get(name)) for name in names]


def _pair(value: object) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


# --- modules ----------------------------------------------------------------------------------------------------------


def _conv(reader: _Reader, m: nn.Conv2d, name: str) -> list[Rule]:
    if m.padding_mode != "zeros" or isinstance(m.padding, str):
        raise _no_rule(f"{name} with padding {m.padding!r}, padding_mode {m.padding_mode!r}")
    weight, bias = reader.parameter(m.weight), reader.parameter(m.bias)
    return [Conv(weight, bias, m.stride, m.padding, m.dilation, m.groups)]


def _norm(reader: _Reader, m: nn.Module, name: str, norm: int, groups: int, centres: bool) -> list[Rule]:
    if not m.training and getattr(m, "running_mean", None) is not None:
        raise Unsupported(f"{name} is in evaluation mode, in which it uses its running statistics")
    kind = BlockKind(norm, groups, m.eps)
    return [Block(kind, reader.parameter(m.weight), reader.parameter(m.bias), centres, reader.paths[id(m)])]


def _layer_norm(reader: _Reader, m: nn.LayerNorm, name: str) -> list[Rule]:
    if len(m.normalized_shape) != 3:
        raise _no_rule(f"{name} over {tuple(m.normalized_shape)}")
    return _norm(reader, m, name, SAMPLE_NORM, 1, False)


def _instance_norm(reader: _Reader, m: nn.InstanceNorm2d, name: str) -> list[Rule]:
    return _norm(reader, m, name, SAMPLE_NORM, m.num_features, True)


def _linear(reader: _Reader, m: nn.Linear, name: str) -> list[Rule]:
    return [Linear(reader.parameter(m.weight), reader.parameter(m.bias))]


def _leaky(slope: float) -> list[Rule]:
    return [Block(BlockKind(activation=PIECEWISE, slope=slope))]


def _smooth(activation: int) -> list[Rule]:
    return [Block(BlockKind(activation=activation))]


def _average(name: str, size: object, stride: object, padding: object, ceil: bool, count: bool, by: object):
    size = _pair(size)
    stride = size if stride is None else _pair(stride)
    if _pair(padding) != (0, 0) or ceil or not count or by is not None:
        raise _no_rule(f"{name} with padding, ceil_mode or another divisor")
    if size == stride == (2, 2):
        return [Block(BlockKind(pool=AVERAGE_POOL))]
    return [Average(size, stride)]


def _maximum(name: str, size: object, stride: object, padding: object, dilation: object, ceil: bool) -> list[Rule]:
    stride = size if stride is None else stride
    if (_pair(size), _pair(stride), _pair(padding), _pair(dilation), bool(ceil)) != ((2, 2), (2, 2), (0, 0), (1, 1), 0):
        raise _no_rule(f"{name} with a window of {size}, stride {stride}, padding {padding}, dilation {dilation}")
    return [Block(BlockKind(pool=MAX_POOL))]


def _global(name: str, size: object) -> list[Rule]:
    if _pair(size) != (1, 1):
        raise _no_rule(f"{name} to {size}")
    return [Average(None)]


def _flatten_module(reader: _Reader, m: nn.Flatten, name: str) -> list[Rule]:
    if (m.start_dim, m.end_dim) != (1, -1):
        raise _no_rule(f"{name} of dimensions {m.start_dim} to {m.end_dim}")
    return [Flatten()]


def _dropout(reader: _Reader, m: nn.Module, name: str) -> list[Rule]:
    if m.p > 0 and m.training:
        raise _no_rule(name)
    return []


_MODULES: dict[type, Callable] = {
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
    nn.AvgPool2d: lambda r, m, name: _average(
        name, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.MaxPool2d: lambda r, m, name: _maximum(name, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode),
    nn.AdaptiveAvgPool2d: lambda r, m, name: _global(name, m.output_size),
    nn.Flatten: _flatten_module,
    nn.Identity: lambda r, m, name: [],
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
}


# --- functions and methods: each gives (inputs, rules) ----------------------------------------------------------------


def _one(make: Callable[..., list[Rule]], *names: str, **defaults: object) -> Callable:
    """A function of one tensor, whose other arguments go to `make`."""

    def read(reader: _Reader, node: fx.Node, name: str):
        x, *rest = _arguments(node, "input", *names, **defaults)
        return (reader._source(x, name),), make(name, *rest)

    return read


def _view(reader: _Reader, node: fx.Node, name: str):
    x, *shape = node.args
    shape = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if node.kwargs or len(shape) != 2 or not reader.is_batch_size(shape[0]) or shape[1] != -1:
        raise _no_rule(f"{name} to {tuple(shape)}; x.view(x.size(0), -1) is known")
    return (reader._source(x, name),), [Flatten()]


def _flatten_call(name: str, start: object, end: object) -> list[Rule]:
    if (start, end) != (1, -1):
        raise _no_rule(f"{name} of dimensions {start} to {end}")
    return [Flatten()]


def _add(reader: _Reader, node: fx.Node, name: str):
    if node.kwargs or len(node.args) != 2:
        raise _no_rule(f"{name} with {dict(node.kwargs)}")
    return tuple(reader._source(a, name) for a in node.args), [Add()]


def _multiply(reader: _Reader, node: fx.Node, name: str):
    """x * sigmoid(x), which is swish; no other product."""
    if node.kwargs or len(node.args) != 2:
        raise _no_rule(f"{name} with {dict(node.kwargs)}")
    a, b = (reader._source(x, name) for x in node.args)
    for x, gate in ((a, b), (b, a)):
        if gate >= 0 and reader.found[gate] == Step(_smooth(SIGMOID)[0], (x,)):
            return (x,), _smooth(SWISH)
    raise _no_rule(f"{name} of other things than x and sigmoid(x)")


def _mean(reader: _Reader, node: fx.Node, name: str):
    x, dims, keep = _arguments(node, "input", "dim", "keepdim", keepdim=False)
    if dims is None or {d % 4 for d in _pair(dims)} != {2, 3}:
        raise _no_rule(f"{name} over {dims}")
    return (reader._source(x, name),), [Average(None)] if keep else [Average(None), Flatten()]


_RELU = _one(lambda name, inplace: _leaky(0.0), "inplace")
_SIGMOID = _one(lambda name: _smooth(SIGMOID))
_FLATTEN = _one(_flatten_call, "start_dim", "end_dim", start_dim=0, end_dim=-1)
_FUNCTIONS: dict[object, Callable] = {
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
    F.max_pool2d: _one(
        lambda name, size, stride, padding, dilation, ceil, indices: _maximum(
            name, size, stride, padding, dilation, ceil or bool(indices)
        ),
        *("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        **{"padding": 0, "dilation": 1, "ceil_mode": False},
    ),
    F.adaptive_avg_pool2d: _one(_global, "output_size"),
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
    torch.mul: _multiply,
    "mul": _multiply,
    "mean": _mean,
    torch.mean: _mean,
}


# --- from single operations to blocks ---------------------------------------------------------------------------------


def _without_unused(steps: list[Step], result: int) -> list[Step]:
    """The steps that `result` depends on, numbered anew, with their users counted."""
    used = {result}
    for i in range(result, -1, -1):
        if i in used:
            used.update(steps[i].inputs)
    new = {old: number for number, old in enumerate(i for i in range(len(steps)) if i in used)} | {-1: -1}
    kept = [Step(steps[i].rule, tuple(new[j] for j in steps[i].inputs)) for i in new if i >= 0]
    for step in kept:
        for j in step.inputs:
            if j >= 0:
                kept[j].users += 1
    return kept


def _fuse(steps: list[Step]) -> list[Step]:
    """Norm, activation and pooling that follow each other as one block; biases that a norm takes away marked."""
    place: dict[int, int] = {-1: -1}
    fused: list[Step] = []
    for i, step in enumerate(steps):
        before = step.inputs[0]
        joined = None
        if isinstance(step.rule, Block) and before >= 0 and steps[before].users == 1:
            joined = _join(fused[place[before]].rule, step.rule)
        if joined is not None:
            place[i] = place[before]
            fused[place[i]].rule = joined
            continue
        place[i] = len(fused)
        fused.append(Step(step.rule, tuple(place[j] for j in step.inputs)))
    fused = _without_unused(fused, len(fused) - 1)
    for step in fused:
        source = fused[step.inputs[0]] if step.inputs[0] >= 0 else None
        centred = isinstance(step.rule, Block) and step.rule.centres
        if source is not None and isinstance(source.rule, Conv) and source.users == 1 and centred:
            source.rule = replace(source.rule, cancelled=True)
    return fused


def _join(first: Rule, second: Block) -> Block | None:
    """Both blocks as one, where the second continues what the first does."""
    if not isinstance(first, Block) or second.kind.norm != NO_NORM or first.kind.pool != NO_POOL:
        return None
    a, b = first.kind, second.kind
    plain = (PIECEWISE, 1.0)  # no activation
    if (a.activation, a.slope) != plain and (b.activation, b.slope) != plain:
        return None
    source = b if (a.activation, a.slope) == plain else a
    return replace(first, kind=a._replace(activation=source.activation, slope=source.slope, pool=b.pool))
