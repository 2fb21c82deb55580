"""Image folders and archives with random damage: each is read or refused in one line.

    python python_tests/fuzz_images.py FOLDER [--seed 0] [--count 1000] [--seconds 600]

Works in FOLDER, which must be new, and prints its counts as JSON. Ends with a message and status 1 at the first mutant
that ends in an exception other than ValueError or OSError, in a message of several lines or one that names neither the
file nor the data set, or that changes other images, takes more than a gigabyte or writes anything outside the cache. A
mutant that takes more than a minute ends the process with a traceback of every thread.
"""

import argparse
import faulthandler
import json
import logging
import os
import random
import resource
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
from image_files import encoded, pattern, png_of_16_bits, tiff_of_16_bits
from PIL import Image

from selmatch_ext.data.images import load

GIGABYTE = 1 << 30
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
    "m.tga": lambda: encoded(pattern(13, 12, 12, 4), "tga", compression="tga_rle"),
    "n.ico": lambda: encoded(pattern(14, 12, 12, 4), "ico", sizes=[(12, 12)]),
    "o.jp2": lambda: encoded(pattern(15, 12, 12), "jpeg2000"),
}
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
        kind = rng.randrange(7)
        if kind == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + size] = rng.randbytes(size)
        elif kind == 2:
            content[place : place + size] = bytes([rng.choice((0, 1, 127, 128, 255))]) * size
        elif kind == 3:
            number = rng.choice((0, 1, 255, 65535, 2**31 - 1, 2**32 - 1, len(content), rng.getrandbits(32)))
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
            path.write_bytes(mutant(self.files[name], rng))
            try:
                self.outcome(number, self.folder / "set", kind, path, rng.choice((None, None, 7)))
            finally:
                path.write_bytes(self.files[name])
        else:
            name = rng.choice(ARCHIVES)
            path = self.folder / name
            path.write_bytes(mutant(self.archives[name], rng))
            self.outcome(number, path, name.partition(".")[2], path, None)

    def outcome(self, number, spec, kind, damaged, resize):
        """Reads the data set at `spec`, of which the file `damaged` is a mutant, and checks what comes of it."""
        where = f"seed {self.seed}, number {number}, {damaged}"
        try:
            data = load(f"imagefolder:{spec}", resize=resize, cache=self.folder / "cache")
        except (ValueError, OSError) as error:
            text = str(error)
            assert "\n" not in text and len(text) < 2000, f"{where}: {text}"
            named = damaged.name in text or spec.name in text or str(damaged.parent) in text
            assert named or "image" in text, f"{where}: names no file: {text}"
            self.counts[f"{kind} refused"] += 1
            return
        self.counts[f"{kind} read"] += 1
        for stored in (self.folder / "cache").iterdir():
            stored.unlink()
        if resize is not None:
            return
        for path, image in self._by_path(data).items():
            if not path.endswith(damaged.name) and kind not in ("tar", "zip") and path in self.images:
                assert self._close(path, image), f"{where}: {path} changed"

    def _close(self, path, image):
        """A damaged 16-bit file may change the range that scales the others."""
        deep = path.rpartition("/")[2] in ("c.png", "i.tif", "j.tif")
        return deep or torch.equal(image, self.images[path])

    def listing(self):
        """Everything below the folder but for the cache."""
        found = [path for path in self.folder.rglob("*") if self.folder / "cache" not in path.parents]
        return sorted(str(path) for path in found)


def main(folder, seed, count, seconds):
    """Runs the mutants and returns their counts."""
    logging.disable()
    os.environ["HOME"] = os.environ["TMPDIR"] = str(folder / "home")
    fuzz = Fuzz(folder, seed)
    os.chdir(folder / "home")
    before, start, number = fuzz.listing(), time.monotonic(), 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (data + GIGABYTE, resource.RLIM_INFINITY))
    while number < count if seconds is None else time.monotonic() - start < seconds:
        faulthandler.dump_traceback_later(SLOW, exit=True)
        fuzz.step(number)
        number += 1
    faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024
    assert grown < GIGABYTE, f"memory grew by {grown} bytes"
    assert fuzz.listing() == before, f"written outside the cache: {set(fuzz.listing()) ^ set(before)}"
    return {"mutants": number, "grown": grown, **dict(sorted(fuzz.counts.items()))}


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
