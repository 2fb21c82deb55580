"""Image folders and archives with random damage: each is read or refused in one line.

    python python_tests/fuzz_images.py FOLDER [--seed 0] [--count 1000] [--seconds 600]

Works in FOLDER, which must be new, and prints its counts as JSON. Ends with a message and status 1 at the first mutant
that ends in an exception other than ValueError or OSError, in a message of several lines or one that names neither the
file nor the data set, or that changes other images, takes more than a gigabyte or writes anything outside the cache. A
mutant that takes more than a minute ends the process with a traceback of every thread.
"""

import argparse
import bz2
import faulthandler
import gzip
import json
import logging
import lzma
import os
import random
import resource
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import torch
from image_files import encoded, pattern, png_of_16_bits, tiff_of_16_bits
from PIL import Image

from selmatch_ext.data.load import load

GIGABYTE = 1 << 30
UNCHECKED = ("tar", "tar, headers", "zip")  # whose names or contents may change unnoticed
SLOW = 60  # seconds
SEEDS = {
    "a.png": lambda: encoded(pattern(1, 12, 12)),
    "b.png": lambda: encoded(Image.fromarray(pattern(2, 12, 12)).quantize(16), transparency=3),
    "c.png": lambda: png_of_16_bits(pattern(3, 12, 12, 4, 65536)),
    "d.jpg": lambda: encoded(pattern(4, 12, 12), "jpeg", exif=_turned()),
    "e.jpg": lambda: encoded(Image.fromarray(pattern(5, 12, 12)).convert("CMYK"), "jpeg", progressive=True),
    "f.bmp": lambda: encoded(pattern(6, 12, 12), "bmp"),
    "g.gif": lambda: encoded(pattern(7, 12, 12, 1), "gif", save_all=True, append_images=[Image.new("L", (12, 12))]),
    "h.tif": lambda: encoded(pattern(8, 12, 12), "tiff", compression="tiff_lzw"),
    "i.tif": lambda: tiff_of_16_bits(pattern(9, 12, 12, top=4096), ">"),
    "j.tif": lambda: encoded(pattern(10, 12, 12, 1, 65536), "tiff", compression="tiff_adobe_deflate"),
    "k.webp": lambda: encoded(pattern(11, 12, 12, 4), "webp", lossless=True),
    "l.ppm": lambda: encoded(pattern(12, 12, 12), "ppm"),
    "q.ppm": lambda: b"P6 12 12 65535\n" + pattern(16, 12, 12, top=65536).astype(">u2").tobytes(),
    "m.tga": lambda: encoded(pattern(13, 12, 12, 4), "tga", compression="tga_rle"),
    "n.ico": lambda: encoded(pattern(14, 12, 12, 4), "ico", sizes=[(12, 12)]),
    "o.jp2": lambda: encoded(pattern(15, 12, 12), "jpeg2000"),
}
PACK = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
ARCHIVES = ("s.tar", "s.tar.gz", "s.tar.bz2", "s.tar.xz", "s.zip")


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


def mutant(content, rng):
    """`content` with one to four changes of bytes, lengths or places."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, size = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 100))
        # most of what is interesting is in headers
        place = rng.choice((place, place % 64, place % 512))
        kind = rng.choice((0, 0, 0, 1, 2, 3, 4, 5, 6))
        if kind == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + size] = rng.randbytes(size)
        elif kind == 2:
            content[place : place + size] = bytes([rng.choice((0, 1, 127, 128, 255))]) * size
        elif kind == 3:
            large = (255, 4096, 9000, 65535, 2**31 - 1, 2**32 - 1, rng.getrandbits(32))
            number = rng.choice((0, 1, len(content), *large))
            content[place : place + 4] = number.to_bytes(4, rng.choice(("little", "big")))
        elif kind == 4:
            del content[place : place + size]
        elif kind == 5:
            content[place:place] = content[max(0, place - size) : place]
        else:
            del content[max(1, place) :]
        if not content:
            return b"\0"
    return bytes(content)


def mutant_tar(content, rng):
    """A tar of which one or two headers are damaged and have the right checksum all the same."""
    content = bytearray(content)
    places = [i for i in range(0, len(content), tarfile.BLOCKSIZE) if content[i + 257 : i + 262] == b"ustar"]
    for place in rng.sample(places, rng.choice((1, 2))):
        block = bytearray(
            mutant(content[place : place + tarfile.BLOCKSIZE], rng)[: tarfile.BLOCKSIZE].ljust(512, b"\0")
        )
        if rng.random() < 0.3:  # the kind of member, sparse ones and long names among them
            block[156] = rng.choice(b"0123456LKSxgXD\0")
        if rng.random() < 0.3:
            block[124:136] = rng.choice((b"77777777777\0", b"\x80" + rng.randbytes(11), b"00000001000\0", b"\xff" * 12))
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        content[place : place + tarfile.BLOCKSIZE] = block
    return bytes(content)


def mutant_png(content, rng):
    """A PNG with damage inside its chunks, whose checksums are right all the same."""
    content, place, made = bytearray(content), 8, bytearray(content[:8])
    while place + 12 <= len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        if data and rng.random() < 0.4:
            data = mutant(data, rng)
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        place += 12 + size
    return bytes(made)


class Fuzz:
    """The data sets, and what became of their mutants."""

    def __init__(self, folder, seed):
        self.folder, self.seed, self.counts = folder, seed, Counter()
        for name in ("set", "cache", "home"):
            (folder / name).mkdir(parents=True)
        self.files = {name: make() for name, make in SEEDS.items()}
        self.paths = {}
        for i, name in enumerate(sorted(self.files)):
            split, label = "train" if i % 3 else "test", "cat" if i % 2 else "dog"
            self.paths[name] = folder / "set" / split / label / name
            self.paths[name].parent.mkdir(parents=True, exist_ok=True)
            self.paths[name].write_bytes(self.files[name])
        self.archives = {name: self._archive(name) for name in ARCHIVES}
        self.right = load(f"imagefolder:{folder}/set")
        self.images = self._by_path(self.right)

    def _archive(self, name):
        path = self.folder / name
        if name.endswith("zip"):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted(self.paths.values()):
                    archive.write(file, file.relative_to(self.folder / "set"))
        else:
            kind = "" if name.endswith("tar") else name.rpartition(".")[2]
            with tarfile.open(path, f"w:{kind}", format=tarfile.PAX_FORMAT) as archive:
                archive.add(self.folder / "set", "set")
                link = tarfile.TarInfo("set/train/cat/link.png")
                link.type, link.linkname = tarfile.SYMTYPE, "../dog/a.png"
                archive.addfile(link)
        return path.read_bytes()

    @staticmethod
    def _by_path(data):
        pairs = [pair for part in (data.train, data.test) for pair in zip(part.paths, part.images, strict=True)]
        return {path: image.expand(3, -1, -1) for path, image in pairs}

    def step(self, number):
        """One mutant: of an image in the folder, or of an archive."""
        rng = random.Random(f"{self.seed}/{number}")
        if rng.random() < 0.6:
            name = rng.choice(sorted(self.files))
            path, kind = self.paths[name], name.partition(".")[2]
            change = mutant_png if kind == "png" and rng.random() < 0.5 else mutant
            path.write_bytes(change(self.files[name], rng))
            try:
                self.outcome(number, self.folder / "set", kind, path, rng.choice((None, None, 7)))
            finally:
                path.write_bytes(self.files[name])
        else:
            name = rng.choice(ARCHIVES)
            path = self.folder / name
            kind, pack = name.partition(".")[2], PACK.get(name.rpartition(".")[2])
            if pack is not None and rng.random() < 0.5:
                path.write_bytes(pack(mutant_tar(self.archives["s.tar"], rng)))
                kind = "tar, headers"
            else:
                path.write_bytes(mutant(self.archives[name], rng))
            self.outcome(number, path, kind, path, None)

    def outcome(self, number, spec, kind, damaged, resize):
        """Reads the data set at `spec`, of which the file `damaged` is a mutant, and checks what comes of it."""
        where = f"seed {self.seed}, number {number}, {damaged}"
        try:
            data = load(f"imagefolder:{spec}", resize=resize, cache=self.folder / "cache")
        except (ValueError, OSError) as error:
            text = str(error)
            assert "\n" not in text and len(text) < 1000, f"{where}: {text[:500]}"
            named = damaged.name in text or str(spec) in text or "train/" in text or "test/" in text
            assert named, f"{where}: names no file: {text}"
            self.counts[f"{kind} refused"] += 1
            return
        self.counts[f"{kind} read"] += 1
        for stored in (self.folder / "cache").iterdir():
            stored.unlink()
        if resize is not None:
            return
        images = self._by_path(data)
        if kind.startswith("tar."):  # these have checksums of their contents
            assert images.keys() >= self.images.keys(), f"{where}: {self.images.keys() - images.keys()} are missing"
        for path, image in images.items():
            if not path.endswith(damaged.name) and kind not in UNCHECKED and path in self.images:
                assert self._close(path, image), f"{where}: {path} changed"

    def _close(self, path, image):
        """A damaged 16-bit file may change the range that scales the others."""
        deep = path.rpartition("/")[2] in ("c.png", "i.tif", "j.tif", "q.ppm")
        return deep or torch.equal(image, self.images[path])

    def listing(self):
        """Everything below the folder but for the cache."""
        found = [path for path in self.folder.rglob("*") if self.folder / "cache" not in path.parents]
        return sorted(str(path) for path in found)


def peak(reset=False):
    """Most bytes of memory that the process has had, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def main(folder, seed, count, seconds):
    """Runs the mutants and returns their counts."""
    logging.disable()
    os.environ["HOME"] = os.environ["TMPDIR"] = str(folder / "home")
    fuzz = Fuzz(folder, seed)
    os.chdir(folder / "home")
    before, start, number, grown = fuzz.listing(), time.monotonic(), 0, (0, 0)
    data = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (data + GIGABYTE, resource.RLIM_INFINITY))
    while number < count if seconds is None else time.monotonic() - start < seconds:
        faulthandler.dump_traceback_later(SLOW, exit=True)
        used = peak(reset=True)
        fuzz.step(number)
        grown, number = max(grown, (peak() - used, number)), number + 1
        assert grown[0] < GIGABYTE, f"seed {seed}, number {grown[1]}: memory grew by {grown[0]} bytes"
    faulthandler.cancel_dump_traceback_later()
    assert fuzz.listing() == before, f"written outside the cache: {set(fuzz.listing()) ^ set(before)}"
    return {"mutants": number, "grown": grown[0], "by": grown[1], **dict(sorted(fuzz.counts.items()))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float)
    given = parser.parse_args()
    try:
        print(json.dumps(main(given.folder.resolve(), given.seed, given.count, given.seconds)))
    except AssertionError as error:
        sys.exit(str(error))
