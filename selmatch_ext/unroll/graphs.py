"""An engine's two step functions as CUDA graphs. Only for the fused engine, whose steps draw no random numbers.

The N steps of a call come in few shapes. Of each, the first step runs as it is (what libraries set up at a first call
cannot be captured), the second is captured, and it and all later ones are replays: one launch instead of many."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from selmatch_ext.unroll.adjoint import Derivative
from selmatch_ext.unroll.fused_stepper import FusedStepper
from selmatch_ext.unroll.tesla import Wanted


class GraphRecorder(Protocol):
    """What captures a function of tensors; inputs and results are nested tuples, lists and `Derivative`s of them."""

    def warm_up(self, function: Callable, inputs: tuple) -> Any:
        """function(*inputs), run once ahead of `record` for inputs like these."""

    def record(self, function: Callable, inputs: tuple) -> tuple[Callable[[], None], Any]:
        """(replay, results): replay() runs the function on what `inputs` then hold, and writes to the same `results`,
        which hold nothing before. Another replay of this recorder may overwrite them."""


class GraphedStepper:
    """A `Stepper` that replays another one's steps. Results are the caller's: no later step writes to them."""

    keeps_last = False  # the last step would need graphs of its own

    def __init__(self, stepper: FusedStepper, recorder: GraphRecorder):
        self.stepper, self.recorder = stepper, recorder
        self.graphs: dict[tuple, tuple | None] = {}  # (replay, results, inputs) of a key; None: warmed up

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, wanted: Wanted | None, keep: str) -> tuple[Tensor, Any]:
        function = functools.partial(self.stepper.gradient, wanted=wanted, keep=keep)
        return self._run(("gradient", wanted, keep), function, (theta, x, y))

    def derivative(
        self, theta: Tensor, x: Tensor, y: Tensor, kept: Any, direction: Tensor, wanted: Wanted
    ) -> Derivative:
        function = functools.partial(self.stepper.derivative, wanted=wanted)
        return self._run(("derivative", wanted), function, (theta, x, y, kept, direction))

    def classes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        return self.stepper.classes(shape, dtype)

    def freed(self, kept: Any) -> Any:
        return self.stepper.freed(kept)

    def _run(self, options: tuple, function: Callable, inputs: tuple) -> Any:
        key = options, _map(lambda t: (t.shape, t.dtype, t.device), inputs)
        if key not in self.graphs:
            results = self.recorder.warm_up(function, inputs)
            self.graphs[key] = None
            return results
        graph = self.graphs[key]
        if graph is None:
            own = _map(torch.clone, inputs)
            graph = self.graphs[key] = *self.recorder.record(function, own), own
        else:
            for own, given in zip(_tensors(graph[2]), _tensors(inputs), strict=True):
                own.copy_(given)
        replay, results, _ = graph
        replay()
        return _map(torch.clone, results)


class CudaRecorder:
    """Captures in CUDA graphs on one device.

    Its graphs share a memory pool, which then is as large as the largest of them needs, not as all together. That is
    safe in any order of replays on one stream: a graph's intermediates are written before they are read, its inputs
    lie outside the pool, and its results stay referenced, so that no later capture is given their memory."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable, inputs: tuple) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = function(*inputs)
        current.wait_stream(self.stream)
        for t in _tensors(results):
            t.record_stream(current)  # or the next use of the side stream might be given their memory too early
        return results

    def record(self, function: Callable, inputs: tuple) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        # Not torch.cuda.graph, which empties the allocator's cache first: the next steps would allocate anew.
        with torch.cuda.stream(self.stream):
            # thread_local: what other threads do, such as NCCL's watchdog and data loaders, does not end the capture.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                results = function(*inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return graph.replay, results


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all calls: for every stream that ever used cuBLAS torch keeps a workspace, 32 MiB on recent GPUs."""
    return torch.cuda.Stream(device)


def _map(function: Callable, value: Any) -> Any:
    """`value` with every tensor in it replaced by function(tensor), lists by tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return tuple(_map(function, v) for v in value)
    if isinstance(value, Derivative):
        return Derivative(*(_map(function, v) for v in vars(value).values()))
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, value)
    return found
