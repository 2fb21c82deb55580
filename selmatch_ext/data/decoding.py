"""One encoded image to pixels: orientation, transparency, color modes, and files of 16 bits a channel."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from selmatch_ext.data.names import reason

# Pillow identifies these but has no decoder of its own for their pixels, or runs another program (Ghostscript).
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
TURNS = {  # EXIF orientation -> how the stored picture has to be turned
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
DEEP = re.compile("(RGB|RGBA|LA);16[BLN]")  # Pillow's raw modes of 16 bits a channel; BGR;16 has 16 bits a pixel
EARLY = 1 << 20  # pixels; above this an unequal size is refused before memory is taken, below it after decoding
MOST_DEEP = 30_000_000  # pixels of a file of 16 bits a channel, of which each takes about 30 bytes while it is decoded
LARGE = 1 << 24  # pixels; pictures above this are decoded one at a time, to bound the memory of many threads
_one_large = threading.Lock()

Color = tuple[int, int, int]


@dataclass
class DecodedImage:
    """A decoded image. pixels: (C, H, W) uint8, or uint16 of a file of 16 bits a channel; C is 1 for gray or 3.

    alpha: (H, W) uint8 where a 16-bit file has transparent pixels; `pixels` are then multiplied by alpha / 255.
    frames: whether the file has more frames than this first one.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    frames: bool = False


@dataclass(frozen=True)
class Levels:
    """The range of levels of 16-bit files that becomes 0 to 255."""

    low: int
    high: int

    @classmethod
    def of(cls, low: int, high: int) -> Levels:
        """The range for files whose lowest and highest levels are `low` and `high`: 0 to 2^bits - 1, with the bits that
        `high` needs; or, in files with an offset, where high - low is less than a quarter of that, low to high."""
        top = (1 << max(1, high.bit_length())) - 1
        return cls(low, high) if 0 < high - low < top / 4 else cls(0, top)

    def eight_bits(self, picture: DecodedImage, background: Color) -> np.ndarray:
        """(C, H, W) uint8 of a 16-bit picture, on `background` where it is transparent. Levels outside are clamped."""
        bits = self.high.bit_length()
        if self.low == 0 and bits >= 8 and self.high == (1 << bits) - 1:
            pixels = (picture.pixels >> (bits - 8)).clip(max=255)  # exact for files made by a shift
        else:
            scaled = (picture.pixels.astype(np.float32) - self.low) * (255 / (self.high - self.low))
            pixels = scaled.round().clip(0, 255)
        if picture.alpha is not None:
            gray = len(pixels) == 1 and len(set(background)) == 1
            behind = np.array(background[:1] if gray else background, np.float32).reshape(-1, 1, 1)
            pixels = (pixels + behind * (1 - picture.alpha / np.float32(255))).round().clip(0, 255)
        return pixels.astype(np.uint8)


def formats() -> list[str]:
    """The formats that are read: every still image that Pillow decodes by itself."""
    Image.init()
    return [name for name in Image.OPEN if name not in NOT_DECODED]


def extensions() -> frozenset[str]:
    """File name extensions of the formats that are read, in lower case, with the dot."""
    known = set(formats())
    return frozenset(e.lower() for e, name in Image.registered_extensions().items() if name in known) | {".mpo"}


def decode(
    content: bytes,
    name: str,
    resize: int | None = None,
    background: Color = (255, 255, 255),
    same_as: tuple[str, tuple[int, int]] | None = None,
) -> DecodedImage:
    """The first frame of an encoded image, turned as its EXIF orientation says, on `background` where transparent.

    resize: scale to fill this many pixels a side and cut the center out. same_as: the name and the (width, height) of
    an image that this one has to equal in size when it is not resized. Raises ValueError naming `name`.
    """
    same_as = same_as if resize is None else None
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            width, height = image.size
            if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
                raise ValueError(f"it has {width}x{height} pixels; allowed are {Image.MAX_IMAGE_PIXELS} in all")
            if same_as and width * height > EARLY and sorted(image.size) != sorted(same_as[1]):
                raise _Unequal(name, image.size, same_as)
            with _one_large if width * height > LARGE else contextlib.nullcontext():
                picture = _decoded(image, content, resize, background)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a readable image: no known format") from error
    except _Unequal:
        raise
    except Exception as error:  # Pillow's decoders raise nearly any exception on damaged files
        raise ValueError(f"{name} is not a readable image: {reason(error)}") from error
    size = picture.pixels.shape[2], picture.pixels.shape[1]
    if same_as is not None and size != same_as[1]:
        raise _Unequal(name, size, same_as)
    return picture


class _Unequal(ValueError):
    def __init__(self, name: str, size: tuple[int, int], same_as: tuple[str, tuple[int, int]]) -> None:
        (other, (width, height)) = same_as
        super().__init__(
            f"{name} is {size[0]}x{size[1]} pixels, but {other} is {width}x{height}: make them equal, or pass resize"
        )


def _decoded(image: ImageFile.ImageFile, content: bytes, resize: int | None, background: Color) -> DecodedImage:
    frames = image.format != "MPO" and _quietly(lambda: getattr(image, "is_animated", False)) is True
    if deep := _is_deep(image):
        pixels, alpha = _deep_planes(image, content)
    else:
        image.load()
    # After loading: a PNG may say it at its end, and Pillow turns TIFFs itself.
    turn = TURNS.get(_quietly(lambda: image.getexif().get(ORIENTATION)))
    if not deep:
        pixels = np.array(_shaped(_eight_bits(image, background), turn, resize))
        return DecodedImage(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), None, frames)
    weight = 1 if alpha is None else alpha / np.float32(255)
    planes = [_shaped_plane(plane * weight, turn, resize, 65535).astype(np.uint16) for plane in pixels]
    if alpha is not None:
        alpha = _shaped_plane(alpha, turn, resize, 255).astype(np.uint8)
    return DecodedImage(np.stack(planes), alpha, frames)


def _quietly(read: Any) -> Any:
    """What `read()` returns; None where the file's metadata are damaged, which viewers ignore too."""
    try:
        return read()
    except Exception:
        return None


def _shaped_plane(values: np.ndarray, turn: Image.Transpose | None, resize: int | None, top: int) -> np.ndarray:
    shaped = _shaped(Image.fromarray(values.astype(np.float32)), turn, resize)
    return np.asarray(shaped).round().clip(0, top)


def _shaped(image: Image.Image, turn: Image.Transpose | None, resize: int | None) -> Image.Image:
    if turn is not None:
        image = image.transpose(turn)
    if resize is not None and image.size != (resize, resize):
        image = ImageOps.fit(image, (resize, resize), method=Image.Resampling.BICUBIC)
    return image


def _eight_bits(image: Image.Image, background: Color) -> Image.Image:
    """`image` in PIL mode L or RGB."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; allowed are 8 and 16 bits a channel")
    gray = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):  # premultiplied
            image = image.convert(image.mode.upper())
        image = _in_mode(image, "RGBA")
        behind = Image.new("RGB", image.size, background)
        behind.paste(image, mask=image.getchannel("A"))  # takes less memory than Image.alpha_composite
        image, gray = behind, gray and len(set(background)) == 1
    return _in_mode(image, "L" if gray else "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """`image` itself where it has the mode; Image.convert would copy it."""
    return image if image.mode == mode else image.convert(mode)


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file has 16 bits a channel. Pillow gives only the high byte of such files when they are in color."""
    return image.mode.startswith("I") or any(DEEP.fullmatch(_raw_mode(t)) or _ppm_top(t) > 255 for t in image.tile)


def _raw_mode(tile: tuple) -> str:
    args = tile[3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _ppm_top(tile: tuple) -> int:
    """The largest level of a binary PPM in color; 0 for other files."""
    return tile[3][1] if tile[0] == "ppm" and _raw_mode(tile) == "RGB" else 0


def _deep_planes(image: ImageFile.ImageFile, content: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """(C, H, W) levels of a 16-bit file, and its alpha (H, W) in 0 to 255 where a pixel is transparent."""
    if image.width * image.height > MOST_DEEP:
        raise ValueError(f"it has {image.width}x{image.height} pixels of 16 bits; allowed are {MOST_DEEP} in all")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0:
            raise ValueError(f"levels from {levels.min()} to {levels.max()}; allowed are 0 to 65535")
        if levels.max() > 65535:
            raise ValueError(f"mode {image.mode} with more than 16 bits; allowed are 8 and 16 bits a channel")
        clear = image.info.get("transparency")
        return levels[None], (levels != clear) * np.uint8(255) if isinstance(clear, int) else None
    channels = _sixteen_bits(image, content).transpose(2, 0, 1)
    if len(channels) not in (2, 4):
        return channels, None
    alpha = (channels[-1] >> 8).astype(np.uint8)
    return channels[:-1], None if alpha.min() == 255 else alpha


def _sixteen_bits(image: ImageFile.ImageFile, content: bytes) -> np.ndarray:
    """(H, W, C) uint16 levels of a color file, or of a gray one with alpha, of 16 bits a channel.

    Pillow unpacks one byte of each level, and the tiles' raw mode says which one. So the file is read twice, the second
    time with the bytes swapped.
    """
    raw = _raw_mode(image.tile[0])
    if top := _ppm_top(image.tile[0]):
        size = 3 * image.width * image.height
        levels = np.frombuffer(content, ">u2", size, image.tile[0][2]).astype(np.uint32)
        return (levels * 65535 // top).clip(max=65535).astype(np.uint16).reshape(image.height, image.width, 3)
    if raw.startswith("LA;16"):  # four bytes a pixel, as RGBA has: one reading gives them all
        image.tile = [_with_raw_mode(tile, "RGBA") for tile in image.tile]
        bytes_ = np.asarray(image)
        return bytes_[..., 0::2].astype(np.uint16) << 8 | bytes_[..., 1::2]
    little = raw.endswith("L") or (raw.endswith("N") and sys.byteorder == "little")
    with Image.open(io.BytesIO(content), formats=formats()) as again:
        other = raw[: raw.index(";16")] + (";16B" if little else ";16L")
        again.tile = [_with_raw_mode(tile, other) for tile in again.tile]
        low = np.asarray(again)
    high = np.asarray(image)
    if high.ndim != 3 or high.shape != low.shape:
        raise ValueError(f"16 bits a channel in mode {image.mode}; allowed are gray, RGB and these with alpha")
    return high.astype(np.uint16) << 8 | low


def _with_raw_mode(tile: Any, raw: str) -> Any:
    """A copy of a tile of Pillow's (codec, box, offset, arguments of the codec) with another raw mode."""
    args = (raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)
