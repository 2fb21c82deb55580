"""Calls every registered operator with arguments that are right, or odd in one to three places.

    python odd_arguments.py [--seed 0] [--calls 4000 | --seconds 600]

Each call must end in an error of one of the documented kinds, or in what plain PyTorch gives in float64; and the
implementation for fake tensors must refuse the same calls and promise the same shapes, strides and dtypes. Prints one
JSON object, with the calls that went wrong under "defects". A crash ends the process: run it in one of its own."""

import argparse
import collections
import json
import random
import resource
import time
import traceback

import torch
from odd_expected import can_be_compared, expected
from torch._subclasses.fake_tensor import FakeTensorMode

import selmatch_ext  # noqa: F401  (registers the operators)
from selmatch_ext.ops.block import BlockKind

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)  # RuntimeError: torch's own, of the dispatcher
HUGE = (2**31, 2**32 + 1, 2**32 + 32, 2**33)
NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), 2**64, 1.5, None)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e3, None)
OPS = torch.ops.selmatch_ext


class Draw:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def dtype(self, *more):
        return self.random.choice((torch.float32, torch.float64, *more))

    def size(self, *choices):
        return self.random.choice(choices or (0, 1, 1, 2, 3, 4, 5, 8))

    def tensor(self, shape, dtype):
        return self.laid_out(torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype))

    def laid_out(self, t):
        """The same values in other memory."""
        if t.layout != torch.strided:
            return t
        kind = self.random.randrange(5)
        if kind == 1 and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if kind == 2 and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 3 and t.dim() > 0:
            wide = t.new_empty((*t.shape[:-1], 2 * t.shape[-1] + 1))
            wide[..., 1::2] = t
            return wide[..., 1::2]
        if kind == 4 and t.dim() > 0:
            return torch.cat([t[:1], t])[1:] if len(t) else t
        return t


# --- right arguments --------------------------------------------------------------------------------------------------


def dsa(draw):
    batch, length = draw.size(), draw.size(0, 1, 2, 3)
    x = draw.tensor((batch, draw.size(1, 3), draw.size(), draw.size()), draw.dtype(torch.float16, torch.bfloat16))
    rows = draw.random.choice((1, batch))
    ops = torch.tensor([[draw.random.randrange(6) for _ in range(length)] for _ in range(rows)], dtype=torch.uint8)
    params = draw.tensor((rows, length, 4), draw.dtype())
    odd = draw.random.random()
    if odd < 0.1:
        params = params * draw.random.choice((100.0, 1e30, float("inf"), float("nan")))
    return [x, draw.laid_out(ops.view(rows, length)), params, draw.random.randrange(3)]


def lists(draw, count):
    dtype = draw.dtype()
    shapes = [[draw.size() for _ in range(draw.size(0, 1, 2, 3))] for _ in range(draw.size(1, 2, 3))]
    return [[draw.tensor(shape, dtype) for shape in shapes] for _ in range(count)]


def trajectory_distance(draw):
    return lists(draw, 3)


def trajectory_distance_backward(draw):
    tensors = lists(draw, 3)
    sums = draw.tensor((2,), torch.float64).square() + 0.1
    wanted = [draw.random.random() < 0.6 for _ in range(3)]
    return [draw.tensor((), tensors[0][0].dtype), draw.laid_out(sums), *tensors, *wanted]


def gradient_distance(draw):
    return [*lists(draw, 2), draw.random.randrange(3)]


def gradient_distance_backward(draw):
    syn, real, metric = gradient_distance(draw)
    sums = draw.laid_out(OPS.gradient_distance(syn, real, metric)[1])
    wanted = [draw.random.random() < 0.6 for _ in range(2)]
    return [draw.tensor((), syn[0].dtype), sums, syn, real, metric, *wanted]


def conv3x3(draw):
    dtype, transposed = draw.dtype(), draw.random.random() < 0.5
    channels, outputs = draw.size(32, 64, 128), draw.size(32, 64, *((1, 3) if transposed else ()))
    shape = (channels, outputs, 3, 3) if transposed else (outputs, channels, 3, 3)
    bias = draw.tensor((outputs,), dtype) if draw.random.random() < 0.5 else None
    x = draw.tensor((draw.size(0, 1, 2), channels, draw.size(), draw.size()), dtype)
    return [x, draw.tensor(shape, dtype), bias, transposed]


def conv3x3_dual(draw):
    x, weight, bias, transposed = conv3x3(draw)
    x_t, bias_t = (
        draw.tensor(size, x.dtype) if draw.random.random() < 0.5 else None
        for size in (x.shape, weight.shape[1 if transposed else 0 :][:1])
    )
    value = draw.random.random() < 0.5
    return [x, x_t, weight, draw.tensor(weight.shape, x.dtype), bias, bias_t, transposed, value]


def conv3x3_weight_gradient(draw):
    dtype, batch, sides = draw.dtype(), draw.size(0, 1, 2), (draw.size(), draw.size())
    return [draw.tensor((batch, channels, *sides), dtype) for channels in (draw.size(32, 64), draw.size(32, 64))]


def blocks(draw, dtypes=(torch.bfloat16,), divisions=((1, 1), (4, 1), (4, 2), (4, 4), (9, 3), (33, 1))):
    """Tensors of all four passes, by name. divisions: (channels, groups)."""
    dtype = draw.dtype(*dtypes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels, groups = draw.random.choice(divisions)
    shape = (draw.size(1, 2, 3), channels, draw.size(2, 3, 4, 5), draw.size(2, 3, 4, 5))
    norm = draw.random.randrange(3)
    kind = BlockKind(
        norm, groups, 1e-3, draw.random.randrange(3), draw.random.choice((0.0, 0.1, 1.0)), draw.random.randrange(3)
    )
    size = shape[1:] if norm == 1 and groups == 1 and draw.random.random() < 0.5 else (channels,)
    affine = [draw.tensor(size, wide) if norm else None for _ in range(4)]
    pooled = (*shape[:2], *(side // (2 if kind.pool else 1) for side in shape[2:]))
    t = {name: draw.tensor(shape, dtype) for name in ("z", "zt", "zt_more")}
    t |= {name: draw.tensor(pooled, dtype) for name in ("g", "gt", "gt_more")}
    t |= dict(zip(("gamma", "beta", "gamma_t", "beta_t"), affine, strict=True))
    for name in ("zt_more", "gt_more"):
        t[name] = t[name] if draw.random.random() < 0.5 else None
    return t, list(kind)


def block_forward(draw):
    t, kind = blocks(draw)
    return [t["z"], t["gamma"], t["beta"], *kind]


def block_backward(draw):
    t, kind = blocks(draw)
    stats = OPS.block_forward(t["z"], t["gamma"], t["beta"], *kind)[1]
    return [t["g"], t["z"], draw.laid_out(stats), t["gamma"], t["beta"], *kind]


def block_dual_forward(draw):
    t, kind = blocks(draw)
    return [*(t[name] for name in ("z", "zt", "zt_more", "gamma", "beta", "gamma_t", "beta_t")), *kind]


def block_dual_backward(draw):
    t, kind = blocks(draw)
    inside, affine = [t["z"], t["zt"], t["zt_more"]], [t[name] for name in ("gamma", "beta", "gamma_t", "beta_t")]
    stats = OPS.block_dual_forward(*inside, *affine, *kind)[1]
    return [t["g"], t["gt"], t["gt_more"], *inside, draw.laid_out(stats), *affine, *kind]


def conv_blocks(draw):
    """The same behind a convolution whose result z is not there."""
    t, kind = blocks(draw, (), ((32, 2), (32, 4), (64, 64)))
    kind[3], kind[4] = 0, 0.0 if kind[5] == 2 else kind[4]  # no z, so no smooth activation, and ReLU before maxima
    dtype, channels, outputs = t["z"].dtype, draw.size(1, 3, 4), t["z"].shape[1]
    t["x"] = draw.tensor((t["z"].shape[0], channels, *t["z"].shape[2:]), dtype)
    t |= {name: draw.tensor((outputs, channels, 3, 3), dtype) for name in ("weight", "weight_t")}
    canceled = kind[0] == 2 or (kind[0] == 1 and kind[1] == outputs)
    t["bias"] = draw.tensor((outputs,), dtype) if canceled and draw.random.random() < 0.5 else None
    return t, kind


def conv_block_forward(draw):
    t, kind = conv_blocks(draw)
    return [*(t[name] for name in ("x", "weight", "bias", "gamma", "beta")), *kind]


def saved_of_conv_block(draw, t, kind):
    found = OPS.conv_block_forward(t["x"], t["weight"], None, t["gamma"], t["beta"], *kind)
    return [draw.laid_out(tensor) for tensor in found[1:3]]


def conv_block_backward(draw):
    t, kind = conv_blocks(draw)
    saved = saved_of_conv_block(draw, t, kind)
    return [t["g"], t["x"], t["weight"], *saved, t["gamma"], t["beta"], *kind]


def conv_block_dual_forward(draw):
    t, kind = conv_blocks(draw)
    return [*(t[name] for name in ("x", "weight", "weight_t", "gamma", "beta", "gamma_t", "beta_t")), *kind]


def conv_block_dual_backward(draw):
    t, kind = conv_blocks(draw)
    affine = [t[name] for name in ("gamma", "beta", "gamma_t", "beta_t")]
    inside = [t[name] for name in ("g", "gt", "x", "weight", "weight_t")]
    return [*inside, *saved_of_conv_block(draw, t, kind), *affine, draw.random.random() < 0.5, *kind]


OPERATORS = (dsa, trajectory_distance, trajectory_distance_backward, gradient_distance, gradient_distance_backward)
OPERATORS += (conv3x3, conv3x3_dual, conv3x3_weight_gradient)
OPERATORS += (block_forward, block_backward, block_dual_forward, block_dual_backward)
OPERATORS += (conv_block_forward, conv_block_backward, conv_block_dual_forward, conv_block_dual_backward)


# --- odd ones ---------------------------------------------------------------------------------------------------------


def spoiled(draw, value):
    if isinstance(value, torch.Tensor):
        # What an earlier change made huge is not copied.
        return draw.random.choice(TENSORS)(draw, value) if value.numel() < 2**20 else value
    if isinstance(value, list):
        index = draw.random.randrange(len(value)) if value else 0
        kind = draw.random.randrange(5)
        if kind < 2 and value:
            return [*value[:index], spoiled(draw, value[index]), *value[index + 1 :]]
        return (value[:-1], [*value, *value[:1]], [])[kind - 2] if kind >= 2 else value
    if isinstance(value, float):
        return draw.random.choice(FLOATS)
    if value is None:
        return draw.tensor((draw.size(), draw.size(1, 4)), torch.float32)
    return draw.random.choice(NUMBERS)


def huge(draw, t):
    if t.dim() == 0:
        return t.expand(draw.random.choice(HUGE))
    at = draw.random.randrange(t.dim())
    shape = [*t.shape[:at], draw.random.choice(HUGE), *t.shape[at + 1 :]]
    return torch.zeros((1,) * t.dim(), dtype=t.dtype).expand(shape)


def shorter(draw, t):
    return t.narrow(-1, 0, t.shape[-1] - 1) if t.dim() and t.shape[-1] else t[..., None]


TENSORS = (
    lambda draw, t: draw.laid_out(t),
    lambda draw, t: draw.laid_out(t),
    lambda draw, t: t.requires_grad_() if t.is_floating_point() and t.is_leaf else t,
    lambda draw, t: t.to("meta"),
    lambda draw, t: t.to_sparse(),
    lambda draw, t: t.to(draw.random.choice((torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64))),
    lambda draw, t: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    lambda draw, t: t[..., None],
    lambda draw, t: t.flatten(),
    lambda draw, t: t.new_empty(0),
    lambda draw, t: t[0] if t.dim() and len(t) else t,
    lambda draw, t: torch.cat([t, t]) if t.dim() else t.expand(2),
    lambda draw, t: t[..., :1].expand(t.shape) if t.dim() and t.shape[-1] else t,
    lambda draw, t: torch._neg_view(t) if t.is_floating_point() else t,
    lambda draw, t: None,
    lambda draw, t: 1.0,
    huge,
    huge,
    shorter,
)


# --- one call ---------------------------------------------------------------------------------------------------------


def results_of(name, args):
    found = getattr(OPS, name)(*args)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def as_dispatched(name, args):
    """The arguments as the operator gets them: PyTorch's dispatcher takes tensors of one element for numbers."""
    kinds = [str(argument.type) for argument in getattr(OPS, name).default._schema.arguments]
    numbers = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}
    return [
        a.to(numbers[kind]).item() if kind in numbers and isinstance(a, torch.Tensor) else a
        for a, kind in zip(args, kinds, strict=True)
    ]


def attempt(function, *args):
    """(results, None) or (None, error)."""
    try:
        return function(*args), None
    except (*REFUSALS, MemoryError, OverflowError) as error:
        return None, error


def fake(args):
    mode = FakeTensorMode()

    def convert(value):
        if isinstance(value, list):
            return [convert(v) for v in value]
        return mode.from_tensor(value.detach()) if isinstance(value, torch.Tensor) else value

    return [convert(a) for a in args], mode


def strides(t):
    """Those that count."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()]


def compare_fake(name, args, found):
    """What is wrong with the implementation for fake tensors of a call that gave `found`, or None."""
    converted, mode = fake(args)
    with mode:
        promised = results_of(name, converted)
    for a, b in zip(found, promised, strict=True):
        if (a.shape, a.dtype, a.device, strides(a)) != (b.shape, b.dtype, b.device, strides(b)):
            return f"gives {a.shape} {a.dtype} {a.stride()}, promises {b.shape} {b.dtype} {b.stride()}"
    return None


def dtypes(value):
    if isinstance(value, list):
        return {dtype for v in value for dtype in dtypes(v)}
    return {value.dtype} if isinstance(value, torch.Tensor) and value.is_floating_point() else set()


def compare_values(found, wanted, near):
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if b is None or a.numel() == 0:
            continue
        if a.shape != b.shape:
            return f"result {k} has shape {tuple(a.shape)}, should have {tuple(b.shape)}"
        a, b = a.detach().double(), b.to(a.dtype).double()  # what the result's dtype cannot hold is infinite in it
        size = b[b.isfinite()].abs().max() if b.isfinite().any() else 1.0
        size = max(float(size), 1e-3)  # what is nearly nothing is left of larger numbers
        if not torch.allclose(a, b, rtol=near, atol=near * size, equal_nan=True):
            return f"result {k} is off by {(a - b).abs().max():.3g} of {size:.3g}"
    return None


def one_call(draw, operator):
    """(what came of it: "right", "not compared", "refused" or "defect", what is wrong)."""
    name, args = operator.__name__, operator(draw)
    changes = draw.random.choice((0, 1, 1, 1, 2, 3))
    for _ in range(changes):
        index = draw.random.randrange(len(args))
        try:
            args[index] = spoiled(draw, args[index])
        except (RuntimeError, NotImplementedError):  # of what an earlier change made of it
            continue
    found, error = attempt(results_of, name, args)
    if error is not None:
        message = str(error)
        if changes == 0:
            return "defect", f"refuses right arguments: {message}"
        if not message.strip() or "INTERNAL ASSERT" in message:
            return "defect", f"unreadable error {type(error).__name__}: {message[:200]}"
        return "refused", None
    if any(t.is_meta for t in found):  # all tensors are on meta
        return "right", None
    args = as_dispatched(name, args)
    wanted, problem = attempt(expected, name, args)
    if isinstance(problem, MemoryError) or "can't allocate memory" in str(problem):
        return "not compared", None
    if problem is not None:
        return "defect", f"accepts what plain PyTorch refuses: {problem}"
    near = max(TOLERANCE[dtype] for dtype in dtypes(args) | dtypes(found))
    compared = can_be_compared(name, args)
    problem = compare_values(found, wanted, near) if compared else None
    problem = problem or compare_fake(name, args, found)
    return ("defect", problem) if problem else ("right" if compared else "not compared", None)


def described(value):
    if isinstance(value, list):
        return [described(v) for v in value]
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.layout} {value.device}"
    return repr(value)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    counts, defects, end = collections.Counter(), [], time.monotonic() + (options.seconds or 1e9)
    number = 0
    while time.monotonic() < end and (options.seconds or number < options.calls):
        operator = OPERATORS[number % len(OPERATORS)]
        draw = Draw(options.seed * 10**9 + number)
        try:
            outcome, problem = one_call(draw, operator)
        except Exception:
            outcome, problem = "defect", traceback.format_exc()
        counts[f"{operator.__name__} {outcome}"] += 1
        if outcome == "defect":
            defects.append(f"{operator.__name__}, call {number}: {problem}")
        number += 1
    print(
        json.dumps({"seed": options.seed, "calls": number, "counts": dict(sorted(counts.items())), "defects": defects})
    )


if __name__ == "__main__":
    main()
