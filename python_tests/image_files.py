"""Small image files and data sets for tests, made here, also such as Pillow cannot write."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def pattern(seed, height=6, width=5, channels=3, top=256):
    """Random levels (height, width, channels), or (height, width) for one channel, below `top`."""
    levels = np.random.default_rng(seed).integers(0, top, (height, width, channels))
    levels = levels.astype(np.uint8 if top <= 256 else np.uint16)
    return levels.squeeze(2) if channels == 1 else levels


def encoded(image, format="png", **options):
    """The bytes of an image file. image: a Pillow image, or an array for Image.fromarray."""
    file = io.BytesIO()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width, height, bits=8, color=2, data=b""):
    """A PNG of any size; color: 0 gray, 2 RGB, 4 gray with alpha, 6 RGBA. data: its rows, each after a filter byte."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def png_of_16_bits(levels):
    """A PNG of levels (H, W, C) in 16 bits; C is 1 gray, 2 gray with alpha, 3 RGB, 4 RGBA."""
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png_header(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def tiff_of_16_bits(levels, order="<"):
    """An uncompressed RGB TIFF of levels (H, W, 3) in 16 bits. order: < little-endian, > big-endian."""
    height, width, channels = levels.shape
    pixels = levels.astype(order + "u2").tobytes()
    bits = struct.pack(order + "3H", 16, 16, 16)
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 14), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(pixels)), (284, 3, 1, 1)]
    table = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        inline = kind == 3 and count == 1
        table += struct.pack(order + ("HHIHH" if inline else "HHII"), tag, kind, count, value, *[0] * inline)
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 14 + len(pixels))
    return header + bits + pixels + table + struct.pack(order + "I", 0)


def write_set(root, content, names=("cat", "dog"), suffix=".png", counts=(("train", 3), ("test", 2))):
    """A folder ROOT/SPLIT/CLASS/NUMBER of images. content: a function of (class number, image number) -> bytes."""
    for split, count in counts:
        for label, name in enumerate(names):
            for index in range(count):
                path = root / split / name / f"{index}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content(label, index if split == "train" else 50 + index))
    return root


def plain(label, index):
    """Content for `write_set`: a different small PNG for each class and number."""
    return encoded(pattern(100 * label + index))
