"""Differentiable Siamese augmentation (DSA, arXiv 2102.08259): sampled as small tables, applied in one fused launch.

A table says, row by row, which operations an image goes through. Every operation is affine in the image, so the
backward pass is the transpose of its linear part and the double backward pass is the linear part again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selmatch_ext import _C  # noqa: F401  (loads the operators)

DEFAULT_STRATEGY = "color_crop_cutout_flip_scale_rotate"
SIMPLE_PADDING = 4  # pixels, of strategy "simple"

NONE, COLOR, SHIFT, BOX, FLIP, AFFINE = range(6)  # operation codes, as in csrc/dsa/dsa.h
FORWARD, LINEAR, TRANSPOSE = range(3)  # modes of selmatch_ext::dsa


class Augmentation(NamedTuple):
    """One augmentation of a batch, as tensors that can be stored, moved and indexed.

    ops: (R, L) uint8, the operations applied in order: 0 nothing, 1 colour, 2 shift, 3 zero box, 4 flip of the columns,
        5 affine map.
    params: (R, L, 4) float32 or float64: colour (brightness b, saturation s, contrast c, unused); shift (ty, tx):
        out[i, j] = x[i + ty, j + tx], 0 outside; box (first row, end row, first column, end column), which may reach
        beyond the image; affine (a, b, c, d): bilinear sampling through [[a, b, 0], [c, d, 0]] in normalised
        coordinates, align_corners=True, zeros outside.
    R is the batch size, or 1: then every image gets the same operations.
    """

    ops: Tensor
    params: Tensor

    def to(self, device: torch.device | str) -> "Augmentation":
        """The same table on another device."""
        return Augmentation(self.ops.to(device), self.params.to(device))


@dataclass
class ParamDiffAug:
    """Strengths of the augmentations; the names and defaults of the public code.

    aug_mode: "S" draws one name per call, "M" applies every name in order. With u uniform in [0, 1): brightness adds
    (u - 0.5) * brightness, saturation multiplies by u * saturation, contrast by u + contrast; scale draws factors from
    1 / ratio_scale to ratio_scale; ratio_rotate is in degrees; ratio_crop_pad and ratio_cutout are shares of the
    image's sides. ratio_noise is there for code that sets it; no operation uses it, as in the public code.
    """

    aug_mode: str = "S"
    prob_flip: float = 0.5
    ratio_scale: float = 1.2
    ratio_rotate: float = 15.0
    ratio_crop_pad: float = 0.125
    ratio_cutout: float = 0.5
    ratio_noise: float = 0.05
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5


class _Stream:
    """Random numbers, `rows` of them a draw: on `device`, those of scale and rotate on `affine_device`; those of colour
    in `dtype`, the others in float32."""

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype, affine_device: torch.device):
        self.rows, self.device, self.dtype, self.affine_device = rows, device, dtype, affine_device

    def generator(self, device: torch.device) -> torch.Generator | None:
        raise NotImplementedError

    def uniform(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(self.rows, generator=self.generator(device), device=device, dtype=dtype)

    def integers(self, low: int, high: int) -> Tensor:
        """From low to high, both included."""
        return torch.randint(low, high + 1, (self.rows,), generator=self.generator(self.device), device=self.device)


class _OneGenerator(_Stream):
    """All draws in a row from one generator (None: the global one of each device)."""

    def __init__(self, generator: torch.Generator | None, *args):
        super().__init__(*args)
        self._generator = generator

    def generator(self, device: torch.device) -> torch.Generator | None:
        return self._generator


class _Reseeded(_Stream):
    """Draw number k comes first out of a generator seeded with seed + k, as the public code reseeds the global one."""

    def __init__(self, seed: int, *args):
        super().__init__(*args)
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        generator = self._generators[device].manual_seed(self._seed)
        self._seed += 1
        return generator


def _column(code: int | Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
    """One column of a table, in as few calls as can be: codes (R,) uint8 and params (R, 4) from one to four (R,)."""
    params = torch.stack(values, dim=1)
    if len(values) < 4:
        params = torch.nn.functional.pad(params, (0, 4 - len(values)))
    codes = code if isinstance(code, Tensor) else params.new_full((len(params),), code, dtype=torch.uint8)
    return codes, params


def _color(draw: _Stream, size: tuple[int, int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    brightness = (draw.uniform(draw.device, draw.dtype) - 0.5) * param.brightness
    saturation = draw.uniform(draw.device, draw.dtype) * param.saturation
    contrast = draw.uniform(draw.device, draw.dtype) + param.contrast
    return _column(COLOR, brightness, saturation, contrast)


def _shift(draw: _Stream, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return _column(SHIFT, draw.integers(-rows, rows), draw.integers(-columns, columns))


def _crop(draw: _Stream, size: tuple[int, int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    return _shift(draw, *(int(side * param.ratio_crop_pad + 0.5) for side in size))


def _cutout(draw: _Stream, size: tuple[int, int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    bounds = []
    for side in size:
        box = int(side * param.ratio_cutout + 0.5)
        centre = draw.integers(0, side - box % 2)
        first = centre - box // 2
        bounds += [first, first + box]
    return _column(BOX, *bounds)


def _flip(draw: _Stream, size: tuple[int, int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    flipped = (draw.uniform(draw.device) < param.prob_flip).to(torch.uint8)
    return _column(flipped * FLIP, flipped)


def _scale(draw: _Stream, size: tuple[int, int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    low = 1.0 / param.ratio_scale
    width = draw.uniform(draw.affine_device) * (param.ratio_scale - low) + low
    height = draw.uniform(draw.affine_device) * (param.ratio_scale - low) + low
    none = torch.zeros_like(width)
    return _column(AFFINE, width, none, none, height)


def _rotate(draw: _Stream, size: tuple[int, int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    angle = (draw.uniform(draw.affine_device) - 0.5) * 2 * param.ratio_rotate / 180 * math.pi
    return _column(AFFINE, angle.cos(), (-angle).sin(), angle.sin(), angle.cos())


_COLUMNS: dict[str, Callable] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}


def _names(strategy: str) -> list[str]:
    if not isinstance(strategy, str):
        raise TypeError(f"strategy must be a string such as {DEFAULT_STRATEGY!r}, got {type(strategy).__name__}")
    if strategy in ("", "none", "None"):
        return []
    names = strategy.split("_")
    unknown = [name for name in names if name not in _COLUMNS]
    if unknown:
        raise ValueError(
            f"strategy {strategy!r} contains {unknown[0]!r}; names joined by '_' are allowed: {', '.join(_COLUMNS)}; "
            "or 'none' alone, or (in sample_augmentation) 'simple' alone"
        )
    return names


def _table(columns: list[tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype) -> Augmentation:
    ops = torch.stack([codes.to(device) for codes, _ in columns], dim=1)
    params = torch.stack([params.to(device, dtype) for _, params in columns], dim=1)
    return Augmentation(ops, params)


def _identity(device: torch.device) -> Augmentation:
    return Augmentation(torch.zeros(1, 1, dtype=torch.uint8, device=device), torch.zeros(1, 1, 4, device=device))


def _column_per_sample(names: list[str], draw: _Stream, size: tuple[int, int], param: ParamDiffAug):
    """One column in which every row has drawn its own name."""
    choice = draw.integers(0, len(names) - 1)
    columns = [_COLUMNS[name](draw, size, param) for name in names]
    row = torch.arange(draw.rows, device=choice.device)
    codes = torch.stack([codes for codes, _ in columns])[choice, row]
    params = torch.stack([params for _, params in columns])[choice, row]
    return codes, params


def sample_augmentation(
    batch: int,
    height: int,
    width: int,
    strategy: str = DEFAULT_STRATEGY,
    mode: str = "single",
    per_sample: bool = False,
    siamese: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    param: ParamDiffAug | None = None,
) -> Augmentation:
    """Draw an augmentation for `batch` images of `height` x `width` pixels (DSA, arXiv 2102.08259).

    strategy: names among color, crop, cutout, flip, scale and rotate joined by "_"; "simple": random crop with zero
    padding of 4 pixels, then flip; "none" or "": the identity.
    mode: "single" draws one name for the whole batch, "multi" applies all of them in order. Each image draws its own
    parameters; per_sample: in mode "single" its own name too; siamese: one row, shared by all images, the same whatever
    the batch.
    generator: where all draws come from (on its own device); None: a fresh one, seeded by the operating system. The
    global generator is never touched.
    device: where the table is put (the generator's, or the CPU). param: strengths, by default `ParamDiffAug()`, whose
    aug_mode is not looked at here.
    Raises TypeError or ValueError for an unknown name or mode, or a size that is not positive.
    """
    if mode not in ("single", "multi"):
        raise ValueError(f"mode must be 'single' or 'multi', got {mode!r}")
    for name, value, least in (("batch", batch, 0), ("height", height, 1), ("width", width, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    param, size, source = param or ParamDiffAug(), (height, width), generator.device
    device = source if device is None else torch.device(device)
    draw = _OneGenerator(generator, 1 if siamese else batch, source, torch.float32, source)

    if strategy == "simple":
        columns = [_shift(draw, SIMPLE_PADDING, SIMPLE_PADDING), _flip(draw, size, param)]
        return _table(columns, device, torch.float32)
    names = _names(strategy)
    if not names:
        return _identity(device)
    if mode == "single" and per_sample:
        columns = [_column_per_sample(names, draw, size, param)]
    else:
        if mode == "single":
            names = [names[torch.randint(len(names), (1,), generator=generator, device=source).item()]]
        columns = [_COLUMNS[name](draw, size, param) for name in names]
    return _table(columns, device, torch.float32)


def mix_augmentations(mask: Tensor, when_true: Augmentation, when_false: Augmentation) -> Augmentation:
    """One table for a batch in which two augmentations are mixed, so that one launch applies both.

    mask: (B,) bool, image by image. when_true, when_false: tables of B rows or of one row; the shorter is padded with
    operation 0. Raises TypeError for another mask, ValueError for tables of another number of rows or another device.
    """
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise TypeError(f"mask must be a bool tensor of shape (batch,), got {mask.dtype} of shape {tuple(mask.shape)}")
    rows, length = mask.shape[0], max(when_true.ops.shape[1], when_false.ops.shape[1])
    padded = []
    for name, table in (("when_true", when_true), ("when_false", when_false)):
        if table.ops.shape[0] not in (1, rows):
            raise ValueError(f"{name} has {table.ops.shape[0]} rows; 1 or the mask's {rows} are allowed")
        if table.ops.device != mask.device:
            raise ValueError(f"{name} is on {table.ops.device}, mask on {mask.device}; they must be on one device")
        missing = length - table.ops.shape[1]
        padded.append(
            (
                torch.nn.functional.pad(table.ops, (0, missing)),
                torch.nn.functional.pad(table.params, (0, 0, 0, missing)),
            )
        )
    (ops_true, params_true), (ops_false, params_false) = padded
    ops = torch.where(mask[:, None], ops_true, ops_false)
    return Augmentation(ops, torch.where(mask[:, None, None], params_true, params_false))


def _check(x: Tensor, p: Augmentation) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (batch, channels, height, width), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if p.ops.device != x.device or p.params.device != x.device:
        raise ValueError(f"x is on {x.device}, the table on {p.ops.device}; move it with p.to(x.device)")
    if p.ops.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"the table has {p.ops.shape[0]} rows; 1 or the batch size {x.shape[0]} are allowed")


def augment(x: Tensor, p: Augmentation) -> Tensor:
    """Apply an augmentation to a batch, in one launch; differentiable any number of times in x.

    x: (B, C, H, W) float32, float64, float16 or bfloat16 (the last two are computed in float32), any strides; the
    result has its dtype and its memory format. p: a table of B rows, or of one row for all images, on the same device.
    Raises ValueError or TypeError that says which of these does not hold.
    """
    _check(x, p)
    return torch.ops.selmatch_ext.dsa(x, p.ops, p.params, FORWARD)


def augment_transposed(g: Tensor, p: Augmentation) -> Tensor:
    """The transpose of the linear part of `augment`: what its backward pass makes of the gradient g of its result."""
    return torch.ops.selmatch_ext.dsa(g, p.ops, p.params, TRANSPOSE)


def DiffAugment(
    x: Tensor, strategy: str = DEFAULT_STRATEGY, seed: int = -1, param: ParamDiffAug | None = None
) -> Tensor:
    """Drop-in for the DiffAugment of the public DSA and MTT code: same arguments, same random streams, same images.

    x: (B, C, H, W) float. seed -1: drawn from the global generators (choice of name, scale and rotate on the CPU, the
    rest on x's device), every image its own parameters. Any other seed: all images share one set of parameters, and
    draw number k comes from a private generator seeded with seed + k; the global generators are left alone.
    strategy "", "none" or "None" returns x itself. param.aug_mode "S" draws one name a call, "M" applies all in order.
    Raises ValueError for an unknown name or aug_mode, and what `augment` raises.
    """
    param = param or ParamDiffAug()
    names = _names(strategy)
    if not names:
        return x
    if param.aug_mode not in ("S", "M"):
        raise ValueError(f"param.aug_mode must be 'S' (one name a call) or 'M' (all names), got {param.aug_mode!r}")
    if x.dim() != 4 or not x.is_floating_point():
        _check(x, _identity(x.device))
    cpu = torch.device("cpu")
    if seed == -1:
        draw = _OneGenerator(None, x.shape[0], x.device, x.dtype, cpu)
    else:
        draw = _Reseeded(seed, 1, x.device, x.dtype, cpu)
    if param.aug_mode == "S":
        names = [names[torch.randint(0, len(names), (1,), generator=draw.generator(cpu)).item()]]
    columns = [_COLUMNS[name](draw, x.shape[2:], param) for name in names]
    table = _table(columns, x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    return augment(x, table).contiguous()
