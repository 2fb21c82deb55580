"""Comparisons of what runs on a device with an independent computation in float64 on the CPU, case by case.

`make gpu` runs them at real sizes (bench/gpu_stages.py), python_tests/test_on_gpu.py at small ones, also on the CPU.
Every case gives a dict: what was compared, how far it was off, what is allowed, and whether it `passed`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from reference import unrolled_sgd_full_graph
from torch.nn import functional as F

from selmatch_ext import models, trajectory_distance
from selmatch_ext.models.flat import flatten
from selmatch_ext.ops import block
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.precision import insist_on_bfloat16
from selmatch_ext.settings import Training
from selmatch_ext.training import batch_augmenter, train
from selmatch_ext.transfers import steps_to_device
from selmatch_ext.unroll import UnrolledSGD, sgd

NORMS = ("IN", "BN", "GN", "LN", "NN")
CLASSES = 5
BATCHES = ([0, 1, 2, 3], [3, 4, 4, 5], [9, 0, 1, 11])  # an image twice in a batch, and in two batches
RATES = (0.02, 0.01, 0.03)

# --- the fused engine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineCase:
    """One call of the fused engine."""

    norm: str
    dtype: torch.dtype
    keep: str = "nothing"
    gradient: str = "exact"
    precision: str = "float32"
    soft: bool = False
    augmented: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.norm, dtype if self.precision == "float32" else self.precision]
        parts += [f"keep {self.keep}"] * (self.keep != "nothing")
        parts += ["tesla"] * (self.gradient == "tesla")
        return " ".join(parts + [word for word in ("soft", "augmented", "graphs") if getattr(self, word)])


VARIANTS = ({}, {"keep": "activations"}, {"gradient": "tesla"}, {"soft": True}, {"augmented": True})
ALL_AT_ONCE = {"keep": "all", "soft": True, "augmented": True}


def engine_cases(gpu: bool) -> list[EngineCase]:
    """Every norm with every option, in float64 and float32; in reduced precision without options and with most. On a
    GPU also TF32 and CUDA graphs."""
    cases = []
    for norm, dtype in itertools.product(NORMS, (torch.float64, torch.float32)):
        cases += [EngineCase(norm, dtype, **options) for options in (*VARIANTS, ALL_AT_ONCE)]
        if gpu:
            cases += [EngineCase(norm, dtype, graphs=True, **options) for options in ({}, ALL_AT_ONCE)]
    for norm, precision in itertools.product(NORMS, ["bfloat16", "tf32"] if gpu else ["bfloat16"]):
        for options in ({}, ALL_AT_ONCE, *([ALL_AT_ONCE | {"graphs": True}] if gpu else [])):
            cases.append(EngineCase(norm, torch.float32, precision=precision, **options))
    return cases


@functools.cache
def _network(norm: str, small: bool, dtype: torch.dtype, device: str) -> torch.nn.Module:
    name, side = (f"ConvNetD2W8{norm}", 8) if small else (f"ConvNetD3W32{norm}", 16)
    return models.build(name, 3, CLASSES, side, generator=torch.Generator().manual_seed(1)).to(device, dtype)


class _Inputs:
    """What the engine is given, the same values on every device and in every dtype."""

    def __init__(self, case: EngineCase, small: bool, device: str, dtype: torch.dtype):
        draw, side = torch.Generator().manual_seed(0), 8 if small else 16
        self.model = _network(case.norm, small, dtype, device)

        def normal(*shape):  # representable in every dtype that is compared
            return torch.randn(shape, generator=draw).bfloat16().to(device, dtype)

        self.images = normal(12, 3, side, side).requires_grad_()
        soft = normal(12, CLASSES).softmax(1).bfloat16().to(dtype)
        self.labels = soft.requires_grad_() if case.soft else torch.arange(12, device=device) % CLASSES
        start = flatten(_network(case.norm, small, torch.float32, "cpu").parameters()).detach()
        self.start = start.to(device, dtype).requires_grad_()
        self.target = self.start.detach() + 0.1 * normal(len(start))
        self.lr = torch.tensor(RATES).to(device, dtype).requires_grad_()
        batches = [torch.tensor(b) for b in BATCHES]
        tables = [sample_augmentation(len(b), side, side, per_sample=True, generator=draw) for b in batches]
        self.batches, tables = steps_to_device(batches, tables, torch.device(device))
        self.augmentations = tables if case.augmented else None

    def gradients(self, unroll) -> dict[str, torch.Tensor]:
        arguments = self.start, self.images, self.labels, self.batches, self.lr, self.augmentations
        loss = trajectory_distance(unroll(*arguments), self.start, self.target)
        inputs = {"images": self.images, "lr": self.lr, "start": self.start, "labels": self.labels}
        inputs = {name: t for name, t in inputs.items() if t.requires_grad}
        return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


@functools.cache
def _expected(norm: str, tesla: bool, soft: bool, augmented: bool, small: bool) -> dict[str, torch.Tensor]:
    case = EngineCase(norm, torch.float64, soft=soft, augmented=augmented)
    inputs = _Inputs(case, small, "cpu", torch.float64)
    return inputs.gradients(functools.partial(unrolled_sgd_full_graph, inputs.model, tesla=tesla))


def _allowed(case: EngineCase) -> dict[str, float]:
    """Of the relative error, or of one less the cosine, in which rounding counts less."""
    if case.precision != "float32":
        return {"one_less_cosine": 0.05 if case.precision == "bfloat16" else 0.01}
    return {"error": 1e-8 if case.dtype == torch.float64 else 1e-3}


def check_engine(case: EngineCase, device: str, small: bool) -> dict:
    """The fused engine on `device` against the full graph on the CPU; two calls of one `UnrolledSGD`."""
    expected = _expected(case.norm, case.gradient == "tesla", case.soft, case.augmented, small)
    inputs = _Inputs(case, small, device, case.dtype)
    unrolled = UnrolledSGD(inputs.model, "fused", case.keep, case.gradient, case.precision, case.graphs)
    allowed = _allowed(case)
    off: dict[str, dict[str, float]] = {}
    with insist_on_bfloat16():
        for _ in range(2):
            for name, found in inputs.gradients(unrolled).items():
                a, b = found.detach().cpu().double().flatten(), expected[name].flatten()
                cosine = F.cosine_similarity(a, b, dim=0).item()
                measures = {"error": ((a - b).norm() / b.norm()).item(), "one_less_cosine": 1 - cosine}
                kept = off.setdefault(name, measures)
                off[name] = {k: max(kept[k], v) for k, v in measures.items()}
    passed = all(values[k] <= most for values in off.values() for k, most in allowed.items())
    return {"case": str(case), "off": off, "allowed": allowed, "passed": passed}


# --- blocks -----------------------------------------------------------------------------------------------------------

REAL_SHAPES = [(125, 128, 32, 32), (2, 512, 16, 16), (3, 64, 33, 31), (8, 64, 64, 64)]
SMALL_SHAPES = [(3, 8, 9, 7), (2, 36, 4, 4)]
# Swish and no activation have derivatives without a jump: then the largest error says most. Where a rounded value lies
# on the other side of the jump of relu, a few elements are far off, and the error of all together is taken.
KINDS = {
    "swish, average": (block.SWISH, 0.0, block.AVERAGE_POOL),
    "maximum": (block.PIECEWISE, 1.0, block.MAX_POOL),
    "relu, average": (block.PIECEWISE, 0.0, block.AVERAGE_POOL),
}
BLOCK_NORMS = {
    "none": (block.NO_NORM, 1),
    "instance": (block.SAMPLE_NORM, 0),
    "group": (block.SAMPLE_NORM, 4),
    "layer": (block.SAMPLE_NORM, 1),
    "batch": (block.BATCH_NORM, 1),
}


def block_cases(shapes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str, str]]:
    """(shape, norm, kind): every norm with relu and average pooling; every kind with instance and batch norm."""
    named = [(norm, "relu, average") for norm in BLOCK_NORMS]
    named += itertools.product(("instance", "batch"), ("swish, average", "maximum"))
    return [(shape, *names) for shape in shapes for names in named]


def _passes(tensors: dict[str, torch.Tensor], affine: bool, kind: block.BlockKind) -> dict[str, torch.Tensor]:
    """The results of all four passes."""
    t = tensors
    given, given_t = ((t["gamma"], t["beta"]), (t["gamma_t"], t["beta_t"])) if affine else ((None, None),) * 2
    z = block.DualTensor(t["z"], t["zt"], t["zt_more"])
    g = block.DualTensor(t["g"], t["gt"], t["gt_more"])
    found = {}
    found["y"], stats = block.block_forward(t["z"], *given, kind)
    found["gz"], found["g_gamma"], found["g_beta"] = block.block_backward(t["g"], t["z"], stats, *given, kind)
    found["dual y"], stats = block.block_dual_forward(z, given, given_t, kind)
    dual = block.block_dual_backward(g, z, stats, given, given_t, kind)
    found["dual gz"], found["dual g_gamma"], found["dual g_beta"] = dual
    return {name: t for name, t in found.items() if t.numel()}


def check_block(case: tuple[tuple[int, ...], str, str], device: str) -> list[dict]:
    """All four passes of a block on `device`, in float32 and in bfloat16, against the CPU's operator in float64."""
    shape, norm, kind_name = case
    code, groups = BLOCK_NORMS[norm]
    activation, slope, pool = KINDS[kind_name]
    kind = block.BlockKind(code, groups or shape[1], 1e-5, activation, slope, pool)
    draw = torch.Generator().manual_seed(0)
    channels = shape[1:] if norm == "layer" else shape[1:2]
    pooled = (*shape[:2], shape[2] // 2, shape[3] // 2)
    sizes = {"z": shape, "zt": shape, "zt_more": shape, "g": pooled, "gt": pooled, "gt_more": pooled}
    sizes |= dict.fromkeys(("gamma", "beta", "gamma_t", "beta_t"), channels)
    # Rounded to bfloat16, so that all dtypes are given the same numbers.
    tensors = {name: torch.randn(size, generator=draw).bfloat16() for name, size in sizes.items()}
    tensors = {n: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in tensors.items()}
    expected = _passes({n: t.double() for n, t in tensors.items()}, norm != "none", kind)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        given = {n: t.to(device, dtype if t.shape in (shape, pooled) else torch.float32) for n, t in tensors.items()}
        found = _passes(given, norm != "none", kind)
        off = {name: _off(found[name].cpu().double(), t, "relu" in kind_name) for name, t in expected.items()}
        allowed = {torch.float32: 2e-3 if "relu" in kind_name else 1e-4, torch.bfloat16: 3e-2}[dtype]
        label = f"{norm}, {kind_name}, {tuple(shape)}, {str(dtype).removeprefix('torch.')}"
        rows.append({"case": label, "off": off, "allowed": allowed, "passed": max(off.values()) <= allowed})
    return rows


def _off(found: torch.Tensor, expected: torch.Tensor, together: bool) -> float:
    error = found - expected
    if together:
        return (error.norm() / expected.norm()).item()
    return (error.abs().max() / expected.abs().max()).item()


# --- training ---------------------------------------------------------------------------------------------------------


def check_training(norm: str, precision: str, device: str) -> dict:
    """`training.train` on `device`, where it runs on the fused kernels if it can, against float64 on the CPU."""
    side, draw = 8, torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 3, side, side, generator=draw), torch.arange(24) % CLASSES
    start = flatten(_network(norm, True, torch.float32, "cpu").parameters()).detach()
    trained = {}
    for where, dtype, chosen in (("cpu", torch.float64, "float32"), (device, torch.float32, precision)):
        model = models.build(f"ConvNetD2W8{norm}", 3, CLASSES, side, generator=torch.Generator().manual_seed(1))
        model.to(where, dtype)
        there = images.to(where, dtype)
        settings = Training(epochs=2, batch=8, lr=0.02, momentum=0.9, schedule="constant", precision=chosen)
        augmenter = batch_augmenter("color_crop_flip", (side, side))
        with insist_on_bfloat16():
            generator = torch.Generator().manual_seed(3)
            train(model, lambda i, t=there: t[i], labels.to(where), settings, augmenter, generator)
        trained[dtype] = flatten(model.parameters()).detach().cpu().double() - start
    found, expected = trained[torch.float32], trained[torch.float64]
    off = ((found - expected).norm() / expected.norm()).item()
    allowed = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 0.2}[precision]
    return {"case": f"{norm}, {precision}", "off": off, "allowed": allowed, "passed": off <= allowed}


# --- synchronization --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_synchronization(device: str) -> Iterator[None]:
    """Within, an operation of torch that makes the host wait for the GPU raises."""
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_synchronization(case: EngineCase, device: str, small: bool) -> dict:
    """The steps of a second call of `UnrolledSGD`, forward and backward, must not wait for the GPU. (The checks of the
    arguments look at the largest index and label; how often they wait is counted.)"""
    inputs = _Inputs(case, small, device, case.dtype)
    unrolled = UnrolledSGD(inputs.model, "fused", case.keep, case.gradient, case.precision, case.graphs)
    unroll = sgd.unroll

    def strict(*arguments):
        with no_synchronization(device):
            return unroll(*arguments)

    arguments = inputs.start, inputs.images, inputs.labels, inputs.batches, inputs.lr, inputs.augmentations
    error = None
    with insist_on_bfloat16():
        for _ in range(3):  # of a CUDA graph the first call warms up and captures
            inputs.gradients(unrolled)
        try:
            with mock.patch.object(sgd, "unroll", strict):
                theta = unrolled(*arguments)
            with no_synchronization(device):
                torch.autograd.grad(trajectory_distance(theta, inputs.start, inputs.target), inputs.images)
        except RuntimeError as problem:
            error = str(problem).splitlines()[0]
        waits = _waits(lambda: unrolled(*arguments), device)
    return {"case": str(case), "error": error, "waits_of_a_call": waits, "passed": error is None}


def _waits(function, device: str) -> int:
    """How often torch makes the host wait for the GPU."""
    if torch.device(device).type != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in found)
