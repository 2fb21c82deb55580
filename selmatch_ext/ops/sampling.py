"""Draws of differentiable Siamese augmentations (DSA, arXiv 2102.08259), and the drop-in for the public DiffAugment."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from selmatch_ext.compiling import constant
from selmatch_ext.ops.dsa import AFFINE, BOX, COLOR, FLIP, SHIFT, Augmentation, augment, check_images

DEFAULT_STRATEGY = "color_crop_cutout_flip_scale_rotate"
SIMPLE_PADDING = 4  # pixels, of strategy "simple"
CPU = torch.device("cpu")


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
    """Random numbers, `rows` of them a draw: on `device`, those of scale and rotate on `affine_device`; those of color
    in `dtype`, the others in float32."""

    def __init__(self, rows: int, device: torch.device, dtype: torch.dtype, affine_device: torch.device):
        self.rows, self.device, self.dtype, self.affine_device = rows, device, dtype, affine_device

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The generator for the next draw, None for the device's global one."""
        raise NotImplementedError

    def uniform(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(self.rows, generator=self.generator(device), device=device, dtype=dtype)

    def integers(self, low: int, high: int) -> Tensor:
        """From low to high, both included."""
        return torch.randint(low, high + 1, (self.rows,), generator=self.generator(self.device), device=self.device)


class _OneGenerator(_Stream):
    """All draws share one generator (None: the global one of each device)."""

    def __init__(self, generator: torch.Generator | None, *args: Any):
        super().__init__(*args)
        self._generator = generator

    def generator(self, device: torch.device) -> torch.Generator | None:
        return self._generator


class _Reseeded(_Stream):
    """Draw number k comes first out of a generator seeded with seed + k, as the public code reseeds the global one."""

    def __init__(self, seed: int, *args: Any):
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


def _color(draw: _Stream, size: Sequence[int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    brightness = (draw.uniform(draw.device, draw.dtype) - 0.5) * param.brightness
    saturation = draw.uniform(draw.device, draw.dtype) * param.saturation
    contrast = draw.uniform(draw.device, draw.dtype) + param.contrast
    return _column(COLOR, brightness, saturation, contrast)


def _shift(draw: _Stream, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return _column(SHIFT, draw.integers(-rows, rows), draw.integers(-columns, columns))


def _crop(draw: _Stream, size: Sequence[int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    return _shift(draw, *(int(side * param.ratio_crop_pad + 0.5) for side in size))


def _cutout(draw: _Stream, size: Sequence[int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    bounds = []
    for side in size:
        box = int(side * param.ratio_cutout + 0.5)
        center = draw.integers(0, side - box % 2)
        first = center - box // 2
        bounds += [first, first + box]
    return _column(BOX, *bounds)


def _flip(draw: _Stream, size: Sequence[int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    flipped = (draw.uniform(draw.device) < param.prob_flip).to(torch.uint8)
    return _column(flipped * FLIP, flipped)


def _scale(draw: _Stream, size: Sequence[int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
    low = 1.0 / param.ratio_scale
    width = draw.uniform(draw.affine_device) * (param.ratio_scale - low) + low
    height = draw.uniform(draw.affine_device) * (param.ratio_scale - low) + low
    none = torch.zeros_like(width)
    return _column(AFFINE, width, none, none, height)


def _rotate(draw: _Stream, size: Sequence[int], param: ParamDiffAug) -> tuple[Tensor, Tensor]:
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


class _Request(NamedTuple):
    """What is drawn, in constants and sizes, which torch.compile can hand to an operator.

    names: joined by "_", or "simple". choice: "all" names in order, "one" of them drawn for all rows, or "each" row
    draws its own. size: rows, height and width. dtype: of color's draws; the table has float64 params where it is
    float64, else float32.
    """

    names: str
    choice: str
    size: Sequence[int]
    device: torch.device
    dtype: torch.dtype


def _draw_table(draw: _Stream, request: _Request, param: ParamDiffAug) -> Augmentation:
    _, *size = request.size
    names = request.names.split("_")
    if names == ["simple"]:
        columns = [_shift(draw, SIMPLE_PADDING, SIMPLE_PADDING), _flip(draw, size, param)]
    elif request.choice == "each":
        columns = [_chosen(draw.integers(0, len(names) - 1), names, draw, size, param)]
    elif request.choice == "one":
        where = draw.affine_device
        index = torch.randint(0, len(names), (1,), generator=draw.generator(where), device=where)
        if torch._C._functorch.is_batchedtensor(index):  # vmap: every example has drawn its own name
            columns = [_chosen(index.expand(draw.rows), names, draw, size, param)]
        else:
            columns = [_COLUMNS[names[int(index)]](draw, size, param)]
    else:
        columns = [_COLUMNS[name](draw, size, param) for name in names]
    dtype = torch.float64 if request.dtype == torch.float64 else torch.float32
    ops = torch.stack([codes.to(request.device) for codes, _ in columns], dim=1)
    params = torch.stack([params.to(request.device, dtype) for _, params in columns], dim=1)
    return Augmentation(ops, params)


def _chosen(
    choice: Tensor, names: list[str], draw: _Stream, size: Sequence[int], param: ParamDiffAug
) -> tuple[Tensor, Tensor]:
    """One column in which every row has the name that its element of `choice` says."""
    columns = [_COLUMNS[name](draw, size, param) for name in names]
    row = torch.arange(draw.rows, device=choice.device)
    codes = torch.stack([codes.to(choice.device) for codes, _ in columns])[choice, row]
    params = torch.stack([params.to(choice.device) for _, params in columns])[choice, row]
    return codes, params


def _identity(device: torch.device) -> Augmentation:
    ops = torch.zeros(1, 1, dtype=torch.uint8, device=device)
    return Augmentation(ops, torch.zeros(1, 1, 4, dtype=torch.float32, device=device))


def _public_stream(request: _Request, seed: int) -> _Stream:
    if seed == -1:
        return _OneGenerator(None, request.size[0], request.device, request.dtype, CPU)
    return _Reseeded(seed, request.size[0], request.device, request.dtype, CPU)


def _own_stream(request: _Request, generator: torch.Generator | None) -> _Stream:
    if generator is None:
        generator = torch.Generator(CPU)
        generator.seed()
    return _OneGenerator(generator, request.size[0], generator.device, request.dtype, generator.device)


# --- draws in compiled code -------------------------------------------------------------------------------------------
#
# torch.compile cannot trace a generator, nor a choice of operations that is drawn. There a draw is one operator, which
# does when it runs what is done without compilation: the same numbers from the same generators.

PUBLIC, FRESH = -1, -2  # where an operator draws from: the streams of DiffAugment, or a fresh generator
STRENGTHS = (
    "prob_flip",
    "ratio_scale",
    "ratio_rotate",
    "ratio_crop_pad",
    "ratio_cutout",
    "brightness",
    "saturation",
    "contrast",
)
_generators: list[torch.Generator] = []  # those that compiled code draws from, which it knows by their place here


@constant
def _place(generator: torch.Generator) -> int:
    for place, known in enumerate(_generators):
        if known is generator:
            return place
    _generators.append(generator)
    return len(_generators) - 1


@torch.library.custom_op("selmatch_ext::draw_augmentation", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_operator(
    source: Sequence[int],
    names: str,
    choice: str,
    size: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """source: PUBLIC and a seed, FRESH, or a place in `_generators`."""
    request = _Request(names, choice, size, device, dtype)
    if source[0] == PUBLIC:
        draw = _public_stream(request, source[1])
    else:
        draw = _own_stream(request, None if source[0] == FRESH else _generators[source[0]])
    given: dict[str, Any] = dict(zip(STRENGTHS, strengths, strict=True))
    ops, params = _draw_table(draw, request, ParamDiffAug(**given))
    return ops, params


@_draw_operator.register_fake
def _(source: Sequence[int], names: str, choice: str, size: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    device, dtype, _ = rest
    length = 2 if names == "simple" else len(names.split("_")) if choice == "all" else 1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ops = torch.empty(size[0], length, dtype=torch.uint8, device=device)
    return ops, torch.empty(size[0], length, 4, dtype=wide, device=device)


def _compiled_draw(source: list[int], request: _Request, param: ParamDiffAug) -> Augmentation:
    strengths = [float(getattr(param, name)) for name in STRENGTHS]
    return Augmentation(*_draw_operator(source, *request, strengths))


# --- public -----------------------------------------------------------------------------------------------------------


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
    global generator is never touched, unless it is what is given: with torch.default_generator the draws are, on the
    CPU and for float32 images, those that the public DiffAugment would make at this place (strategy, seed -1), so that
    a loop that draws batches and augmentations in the order of the public code keeps its random stream:

        batches, tables, chunks = [], [], []
        for _ in range(steps):
            if not chunks:
                chunks = list(torch.randperm(len(images)).split(batch_size))
            batches.append(chunks.pop())
            size = (len(batches[-1]), *images.shape[2:])
            tables.append(sample_augmentation(*size, strategy, generator=torch.default_generator))
        student = unrolled_sgd(model, start, images, labels, batches, lr, augmentations=tables)

    device: where the table is put (the generator's, or the CPU). param: strengths, by default `ParamDiffAug()`, whose
    aug_mode is not looked at here.
    torch.compile takes a draw as one operator, with the same numbers; code is compiled anew for every generator object,
    so that one should be kept and reseeded outside rather than made for each call.
    Raises TypeError or ValueError for an unknown name or mode, or a size that is not positive.
    """
    if mode not in ("single", "multi"):
        raise ValueError(f"mode must be 'single' or 'multi', got {mode!r}")
    for name, value, least in (("batch", batch, 0), ("height", height, 1), ("width", width, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if device is None:
        device = CPU if generator is None else generator.device
    device = torch.device(device)
    if strategy != "simple" and not _names(strategy):
        return _identity(device)
    choice = "all" if mode == "multi" else "each" if per_sample else "one"
    request = _Request(strategy, choice, [1 if siamese else batch, height, width], device, torch.float32)
    param = param or ParamDiffAug()
    if torch.compiler.is_compiling():
        return _compiled_draw([FRESH if generator is None else _place(generator)], request, param)
    return _draw_table(_own_stream(request, generator), request, param)


def DiffAugment(x: Tensor, strategy: str = "", seed: int = -1, param: ParamDiffAug | None = None) -> Tensor:
    """Drop-in for the DiffAugment of the public DSA and MTT code: same arguments, same random streams, same images.

    x: (B, C, H, W) float. seed (an integer, of numpy or a tensor too) -1: drawn from the global generators (choice of
    name, scale and rotate on the CPU, the rest on x's device), every image its own parameters. Any other seed: all
    images share one set of parameters, and draw number k comes from a private generator seeded with seed + k; the
    global generators are left alone.
    strategy "" (the default), "none" or "None" returns x itself. param.aug_mode "S" draws one name a call, "M" applies
    all in order.
    In compiled code draws are one operator, with the same numbers. Under vmap a seed gives every example the same
    augmentation; -1 does what vmap's `randomness` says.
    Raises ValueError for an unknown name or aug_mode, TypeError for a seed that is no integer, and what `augment`
    raises.
    """
    param = param or ParamDiffAug()
    names = _names(strategy)
    if not names:
        return x
    if param.aug_mode not in ("S", "M"):
        raise ValueError(f"param.aug_mode must be 'S' (one name a call) or 'M' (all names), got {param.aug_mode!r}")
    check_images(x)
    if type(seed) is not int:
        seed = _integer(seed)
    batch, _, height, width = x.shape
    choice = "one" if param.aug_mode == "S" else "all"
    request = _Request(strategy, choice, [batch if seed == -1 else 1, height, width], x.device, x.dtype)
    if torch.compiler.is_compiling():
        table = _compiled_draw([PUBLIC, seed], request, param)
    elif seed != -1 and torch._C._are_functorch_transforms_active():
        with temporarily_clear_interpreter_stack():  # a seed's numbers are constants, for vmap too
            table = _draw_table(_public_stream(request, seed), request, param)
    else:
        table = _draw_table(_public_stream(request, seed), request, param)
    return augment(x, table).contiguous()


def _integer(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {type(seed).__name__} {seed}") from None
