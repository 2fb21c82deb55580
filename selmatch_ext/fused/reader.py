"""Reads a network with torch.fx into the operations of rules.py, so that the fused engine also takes classes that are
not ours. What has no rule raises `Unsupported`, whose message names it.

torch.fx calls `forward` once, with symbols in place of tensors. It refuses every forward that decides by the values or
sizes of its input; a graph of ATen operations traced on a batch (make_fx, torch.export) silently contains the branches
that this batch took, and takes seconds where this takes milliseconds. What torch.fx cannot see is refused here where it
can be recognized (hooks, replaced forwards, gradient modes, norms in evaluation mode), and found by comparing.py, which
runs the module itself beside what was read."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard, overload

import torch
from torch import fx, nn

from selmatch_ext.files import one_line
from selmatch_ext.fused.fusion import fuse, without_unused
from selmatch_ext.fused.lowering import FUNCTIONS, MODULES
from selmatch_ext.fused.operations import Operation, Unsupported, no_rule
from selmatch_ext.fused.rules import Flatten, Rule
from selmatch_ext.modules.objects import hooks_of


def read(model: nn.Module) -> list[Operation]:
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
    return fuse(_Reader(model, graph).operations())


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

    def create_node(self, kind: str, *arguments: Any, **options: Any) -> fx.Node:
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
        self.found: list[Operation] = []
        self.where: dict[fx.Node, int] = {}  # the step whose result a node is, until it is overwritten
        self.memory: dict[fx.Node, fx.Node] = {}  # the first node that is, or may be, in a node's memory

    def operations(self) -> list[Operation]:
        result = None
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.where and node.users:
                    raise no_rule(f"a second input, {node.name}")
                self.where.setdefault(node, -1)
                self.memory[node] = node
            elif node.op == "output":
                result = self.source(node.args[0], "the output")
            elif not self._is_size(node):  # also where nothing takes the result: it may be in place
                self._read(node)
        if result is None or result < 0:
            raise no_rule("a network that does nothing")
        return without_unused(self.found, result)

    def source(self, node: object, what: str) -> int:
        if node in self.memory and node not in self.where:
            raise Unsupported(f"{what} reads {node} after an operation in place has overwritten it")
        if not isinstance(node, fx.Node) or node not in self.where:
            raise no_rule(f"{what} of {node}")
        return self.where[node]

    def _read(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.modules[node.target]
            name = f"{type(module).__name__} ({node.target})"
            read = MODULES.get(type(module))
            if read is None or node.kwargs:
                raise no_rule(name)
            rules = read(self, module, name)
            inputs = tuple(self.source(a, name) for a in node.args)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            read = FUNCTIONS.get(node.target) or FUNCTIONS.get(f"{getattr(node.target, '__module__', '')}.{name}")
            if node.op == "get_attr":
                raise no_rule(f"the tensor {name} outside the layer that it belongs to")
            if read is None:
                raise no_rule(f"the {'method' if node.op == 'call_method' else 'function'} {name}")
            inputs, rules = read(self, node, name)
        self._append(node, inputs, rules)

    def _append(self, node: fx.Node, inputs: tuple[int, ...], rules: list[Rule]) -> None:
        for rule in rules:
            self.found.append(Operation(rule, inputs))
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
            return bool(getattr(self.modules[node.target], "inplace", False))
        named = isinstance(node.target, str) and node.target.endswith("_")
        return named or node.target in (operator.iadd, operator.imul) or bool(node.kwargs.get("inplace"))

    @staticmethod
    def _is_size(node: object) -> TypeGuard[fx.Node]:
        """Whether a node is x.size(...), x.shape or an entry of one: read where it is used."""
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_method":
            return node.target == "size"
        if node.target is getattr:
            return bool(node.args[1] == "shape")
        return node.target is operator.getitem and _Reader._is_size(node.args[0])

    @staticmethod
    def is_batch_size(node: object) -> bool:
        """Whether a node is x.size(0) or x.shape[0]."""
        if not _Reader._is_size(node):
            return False
        if node.op == "call_method":
            return bool(node.args[1:] == (0,))
        return node.target is operator.getitem and bool(node.args[1] == 0)

    @overload
    def parameter(self, tensor: torch.Tensor) -> str: ...

    @overload
    def parameter(self, tensor: torch.Tensor | None) -> str | None: ...

    def parameter(self, tensor: torch.Tensor | None) -> str | None:
        return None if tensor is None else self.names[id(tensor)]
