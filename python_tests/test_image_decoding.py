"""Single image files to pixels: orientation, transparency, color modes, 16 bits, and files that are refused."""

import numpy as np
import pytest
import torch
from image_files import encoded, pattern, plain, png_header, png_of_16_bits, tiff_of_16_bits, write_set
from PIL import Image

from selmatch_ext.data.decoding import DecodedImage, Levels, decode, extensions, formats
from selmatch_ext.data.load import load
from selmatch_ext.settings import Data, color


def rows(picture):
    """Pixels (H, W, C) of a picture, or (H, W) for gray."""
    pixels = picture.pixels.transpose(1, 2, 0)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


# 16 bits a channel


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 16])
def test_sets_of_fewer_bits_in_16_bit_files(tmp_path, bits, caplog):
    """Pixels x are stored as x << (bits - 8), as microscopes do, and come back as x."""

    def content(label, index):
        pixels = pattern(10 * label + index, channels=1)
        pixels[0, 0] = 255
        return encoded(Image.fromarray(pixels.astype(np.uint16) << (bits - 8)))

    data = load(f"imagefolder:{write_set(tmp_path / 'scan', content)}")
    for i, seed in enumerate([0, 1, 2, 10, 11, 12]):
        expected = pattern(seed, channels=1)
        expected[0, 0] = 255
        assert np.array_equal(data.train.images[i, 0].numpy(), expected)
    said = [f"{2**bits - 1} become 0 to 255" in r.getMessage() for r in caplog.records]
    assert said == ([] if bits == 16 else [True])


@pytest.mark.parametrize(("name", "write"), [("png", png_of_16_bits), ("tif", tiff_of_16_bits)])
def test_color_files_of_16_bits_keep_their_low_bytes(tmp_path, name, write):
    def content(label, index):
        levels = pattern(10 * label + index, top=4096)
        levels[0, 0] = 4095
        return write(levels)

    data = load(f"imagefolder:{write_set(tmp_path / 'scan', content, suffix='.' + name)}")
    expected = pattern(11, top=4096)
    expected[0, 0] = 4095
    assert np.array_equal(data.train.images[4].permute(1, 2, 0).numpy(), expected >> 4)


@pytest.mark.parametrize("levels", [0, 4, 6])
def test_all_16_bits_are_read(levels):
    for order in "<>":
        x = pattern(levels, top=65536)
        assert np.array_equal(rows(decode(tiff_of_16_bits(x, order), "x")), x)
    x = pattern(levels, top=65536)
    assert np.array_equal(rows(decode(png_of_16_bits(x), "x")), x)
    gray = x[..., :1]
    assert np.array_equal(rows(decode(png_of_16_bits(gray), "x")), gray[..., 0])
    opaque = np.full_like(gray, 65535)
    assert np.array_equal(rows(decode(png_of_16_bits(np.concatenate([x, opaque], 2)), "x")), x)
    assert np.array_equal(rows(decode(png_of_16_bits(np.concatenate([gray, opaque], 2)), "x")), gray[..., 0])
    ppm = b"P6 5 6 65535\n" + x.astype(">u2").tobytes()
    assert np.array_equal(rows(decode(ppm, "x")), x)
    ppm = b"P6 5 6 4095\n" + (x >> 4).astype(">u2").tobytes()  # this file says its range
    assert np.array_equal(rows(decode(ppm, "x")), (x >> 4).astype(int) * 65535 // 4095)
    deep = Image.fromarray(gray[..., 0].astype(np.uint16))
    assert np.array_equal(rows(decode(encoded(deep, "tiff", compression="tiff_lzw"), "x")), gray[..., 0])


def test_transparent_16_bit_files():
    x = np.zeros((2, 2, 4), int)
    x[0], x[1] = [4095, 0, 2048, 65535], [4095, 4095, 4095, 0]
    shown = Levels(0, 4095).eight_bits(decode(png_of_16_bits(x), "x"), (10, 20, 30))
    assert shown[:, 0, 0].tolist() == [255, 0, 128] and shown[:, 1, 1].tolist() == [10, 20, 30]
    gray = Levels(0, 4095).eight_bits(decode(png_of_16_bits(x[..., [0, 3]]), "x"), (7, 7, 7))
    assert gray[:, :, 0].tolist() == [[255, 7]]


def test_the_training_split_decides_the_range(tmp_path):
    def content(label, index):
        levels = np.array([[0, 1000]]) if index < 50 else np.array([[500 + label, 60000]])
        return encoded(Image.fromarray(levels.astype(np.uint16)))

    root = write_set(tmp_path / "s", content)
    (root / "train/cat/9.png").write_bytes(encoded(Image.fromarray(np.array([[1, 2]], np.uint8))))
    data = load(f"imagefolder:{root}")
    assert data.train.images[3].tolist() == [[[1, 2]]]  # files of 8 bits stay as they are
    assert data.test.images[0].tolist() == [[[500 >> 2, 255]]]


def test_range_of_levels():
    assert Levels.of(0, 4000) == Levels(0, 4095) and Levels.of(0, 4096) == Levels(0, 8191)
    assert Levels.of(0, 0) == Levels(0, 1) and Levels.of(7, 7) == Levels(0, 7)
    assert Levels.of(32768, 33000) == Levels(32768, 33000)  # an offset would leave next to nothing
    shown = Levels(32768, 33000).eight_bits(
        DecodedImage(np.array([[[0, 32768, 32884, 33000, 65535]]], np.uint16)), (0, 0, 0)
    )
    assert shown.tolist() == [[[0, 0, 128, 255, 255]]]
    mask = Levels.of(0, 1).eight_bits(DecodedImage(np.array([[[0, 1]]], np.uint16)), (0, 0, 0))
    assert mask.tolist() == [[[0, 255]]]


# transparency


@pytest.mark.parametrize(
    ("color", "expected"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("gray", (128, 128, 128))]
)
def test_background_of_transparent_pixels(tmp_path, color, expected):
    def content(label, index):
        pixels = pattern(10 * label + index, channels=4)
        pixels[:3, :, 3], pixels[3:, :, 3] = 255, 0
        return encoded(pixels)

    root = write_set(tmp_path / "stickers", content)
    data, cache = load(f"imagefolder:{root}", background=color, cache=tmp_path / "c"), tmp_path / "c"
    assert np.array_equal(data.train.images[0, :, :3].permute(1, 2, 0), pattern(0, channels=4)[:3, :, :3])
    assert (data.train.images[:, :, 3:] == torch.tensor(expected).view(3, 1, 1)).all()
    assert torch.equal(load(f"imagefolder:{root}", background=color, cache=cache).test.images, data.test.images)
    assert (
        load(f"imagefolder:{root}", background="red", cache=cache).train.images[0, :, 5, 0] == torch.tensor([255, 0, 0])
    ).all()


def test_every_kind_of_transparency():
    half = Image.new("LA", (2, 1), (100, 0))
    half.putpixel((1, 0), (100, 255))
    assert rows(decode(encoded(half), "x")).tolist() == [[255, 100]]
    assert rows(decode(encoded(half), "x", background=(9, 8, 7))).tolist() == [[[9, 8, 7], [100, 100, 100]]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for format in ("png", "gif"):
        content = encoded(palette, format, transparency=0)
        assert rows(decode(content, "x", background=(1, 2, 3))).tolist() == [[[1, 2, 3], [40, 50, 60]]]
    keyed = Image.new("RGB", (2, 1), (5, 6, 7))
    keyed.putpixel((1, 0), (50, 60, 70))
    content = encoded(keyed, transparency=(5, 6, 7))
    assert rows(decode(content, "x")).tolist() == [[[255, 255, 255], [50, 60, 70]]]
    gray = encoded(Image.fromarray(np.array([[3, 9]], np.uint8)), transparency=3)
    assert rows(decode(gray, "x")).tolist() == [[255, 9]]


def test_wrong_background(tmp_path):
    for wrong in ("blau", "", "#12", "#ffffff00", "rgb(1,2)"):
        with pytest.raises(ValueError, match="background is '.*'; allowed is"):
            load(f"imagefolder:{write_set(tmp_path / 's', plain)}", background=wrong)
        with pytest.raises(ValueError, match="background is '.*'; allowed is"):
            Data(background=wrong)
    assert color("black") == (0, 0, 0)
    with pytest.raises(ValueError, match="background is 'red', but digits does not use it"):
        load("digits", background="red")


# orientation, modes, frames, formats


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(format, orientation):
    """The eight ways of storing the same picture, by the EXIF standard: where row 0 and column 0 of the file belong."""
    upright = np.kron(pattern(1, 2, 3), np.ones((16, 16, 1), np.uint8)).astype(np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"quality": 100, "subsampling": 0} if format == "jpeg" else {})
    options |= {"lossless": True} if format == "webp" else {}
    shown = rows(decode(encoded(np.ascontiguousarray(stored), format, **options), "x")).astype(int)
    assert shown.shape == upright.shape and np.abs(shown - upright).max() <= 4  # JPEG rounds


def test_orientation_of_16_bit_files():
    exif = Image.Exif()
    exif[0x0112] = 6
    x = pattern(3, channels=1, top=65536)
    assert np.array_equal(rows(decode(encoded(Image.fromarray(x), exif=exif), "x")), np.rot90(x, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored():
    content = encoded(pattern(1), "jpeg", quality=100, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(content, "x").pixels.shape == (3, 6, 5)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "1", "P", "L"])
def test_color_modes(mode):
    image = Image.fromarray(np.kron(pattern(2, 2, 2), np.ones((8, 8, 1), np.uint8)).astype(np.uint8)).convert(mode)
    expected = np.asarray(image.convert("L" if mode in ("1", "L") else "RGB"))
    assert np.array_equal(rows(decode(encoded(image, "tiff"), "x")), expected)


def test_first_frame_of_several(tmp_path, caplog):
    frames = [Image.fromarray(np.full((6, 5, 3), level, np.uint8)) for level in (10, 200)]
    root = write_set(tmp_path / "s", plain)
    (root / "train/cat/9.gif").write_bytes(encoded(frames[0], "gif", save_all=True, append_images=frames[1:]))
    (root / "train/cat/8.tiff").write_bytes(encoded(frames[0], "tiff", save_all=True, append_images=frames[1:]))
    data = load(f"imagefolder:{root}")
    assert (data.train.images[3:5] == 10).all()
    assert [r.getMessage() for r in caplog.records] == [
        "s: of 2 files with several frames the first is used: train/cat/8.tiff, train/cat/9.gif"
    ]


def test_formats():
    assert {".jfif", ".jpe", ".jpg", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tga", ".mpo"} <= extensions()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf"} & extensions()
    assert "EPS" not in formats()


def test_postscript_is_never_run(tmp_path, monkeypatch):
    """Pillow runs Ghostscript on what a file's content says is EPS, whatever its name."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    root = write_set(tmp_path / "s", plain)
    (root / "train/cat/9.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(ValueError, match="train/cat/9.png is not a readable image: no known format"):
        load(f"imagefolder:{root}")


# refused


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch, recwarn):
    root = write_set(tmp_path / "s", plain)
    for width, height in ((20_000, 20_000), (9_500, 9_500)):  # Pillow refuses the first and warns of the second
        (root / "train/cat/9.png").write_bytes(png_header(width, height))
        for resize in (None, 4):
            with pytest.raises(
                ValueError, match=r"train/cat/9.png is not a readable image: .*\d+ ?x?\d* ?\(?pixels|Image size"
            ):
                load(f"imagefolder:{root}", resize=resize)
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]
    (root / "train/cat/9.png").write_bytes(png_header(9_000, 9_000))
    with pytest.raises(ValueError, match="train/cat/9.png is 9000x9000 pixels, but train/cat/0.png is 5x6"):
        load(f"imagefolder:{root}")


def test_images_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    root = write_set(tmp_path / "s", plain)
    monkeypatch.setattr("selmatch_ext.data.folders.available_memory", lambda: 10**6)
    with pytest.raises(ValueError, match="s.*: 10 images of 500x500 pixels take 7.5 MB of memory, and 1.0 MB are free"):
        load(f"imagefolder:{root}", resize=500)
    monkeypatch.setattr("selmatch_ext.data.folders.available_memory", lambda: None)
    assert load(f"imagefolder:{root}", resize=50).image_size == (50, 50)


def test_levels_that_16_bits_do_not_hold():
    negative = Image.fromarray(np.array([[-1024, 3071]], np.int32))
    with pytest.raises(
        ValueError, match="x is not a readable image: levels from -1024 to 3071; allowed are 0 to 65535"
    ):
        decode(encoded(negative, "tiff"), "x")
    with pytest.raises(ValueError, match="x is not a readable image: buffer is smaller than requested size"):
        decode(b"P6 5 6 65535\n1234", "x")


def test_resize_has_a_range():
    for wrong in (-1, 0, 4097, 100_000):
        with pytest.raises(ValueError, match=f"resize is {wrong}; allowed is a whole number from 1 to 4096"):
            load("imagefolder:none", resize=wrong)
        with pytest.raises(ValueError, match=f"resize is {wrong};"):
            Data(resize=wrong)
