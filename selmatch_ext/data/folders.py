"""Image folders and archives of them: listing, decoding, and a cache of what was decoded."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from selmatch_ext import strict_json
from selmatch_ext.data.images import ImageData, ImageSplit
from selmatch_ext.files import json_field, load_tensors, save_tensors

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
CHUNK = 256  # images a thread decodes at a time
ANNOTATIONS = "val/val_annotations.txt"

Content = Path | bytes  # an image file, or what an archive holds of it


@dataclass(frozen=True)
class _Split:
    """Which images a split has: `paths` relative to the data set, in its order, and the class of each."""

    paths: list[str]
    classes: list[str]


def load_folder(path: Path, tiny: bool, resize: int | None, cache: str | os.PathLike | None) -> ImageData:
    """Loads a folder or an archive; see `selmatch_ext.data.images.load`. tiny: Tiny ImageNet, tested on `val`."""
    if not path.exists():
        raise FileNotFoundError(f"image data set {path} does not exist")
    if resize is not None and resize < 1:
        raise ValueError(f"resize is {resize}; allowed is a number of pixels from 1")
    name = _stem(path) + (f" ({resize}x{resize})" if resize is not None else "")
    files = _list_folder(path) if path.is_dir() else None
    store = None
    if cache is not None:
        store = Path(cache) / f"{_stem(path)}-{_cache_key(path, files, tiny, resize)}.safetensors"
        if store.exists():
            try:
                return _read_cache(store, name)
            except ValueError:
                pass  # damaged: decoded again and replaced below
    contents = files if files is not None else _read_archive(path)
    train, test, class_names = _splits(path, contents, tiny)
    data = _decode_all(name, train, test, class_names, contents, resize)
    if store is not None:
        _write_cache(store, data)
    return data


def _stem(path: Path) -> str:
    name = path.resolve().name
    ending = next((e for e in sorted(ARCHIVES, key=len, reverse=True) if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _list_folder(root: Path) -> dict[str, Content]:
    """{relative path: file} of the files under train, test and val; folders, empty ones too, are listed as 'NAME/'."""
    found: dict[str, Content] = {}
    for split in ("train", "test", "val"):
        for folder, _, names in os.walk(root / split, followlinks=True):
            relative = Path(folder).relative_to(root).as_posix()
            found[relative + "/"] = Path(folder)
            found.update({f"{relative}/{name}": Path(folder) / name for name in names})
    return {relative: file for relative, file in found.items() if not _hidden(relative)}


def _read_archive(path: Path) -> dict[str, Content]:
    """{path relative to the folder that holds `train`: content} of an archive; folders as 'NAME/': b''."""
    if not path.name.lower().endswith(ARCHIVES):
        raise ValueError(f"{path} is neither a folder nor an archive; allowed endings are {', '.join(ARCHIVES)}")
    members = _zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path)
    found: dict[str, Content] = {}
    try:
        for name, content in tqdm(
            members, desc=f"reading {path.name}", unit="file", disable=None, delay=1, leave=False
        ):
            name = str(PurePosixPath(name)) + ("/" if name.endswith("/") else "")
            if not _hidden(name):
                found[name] = content
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is truncated or is no archive ({error})") from error
    roots = {f"/{name}".partition("/train/")[0] + "/" for name in found if "/train/" in f"/{name}"}
    prefix = min(roots, key=lambda root: (len(root), root), default="/")[1:]
    return {name[len(prefix) :]: content for name, content in found.items() if name.startswith(prefix)}


def _tar_members(path: Path) -> Iterable[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isdir():
                yield member.name + "/", b""
            elif member.isfile():
                yield member.name, archive.extractfile(member).read()
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark")  # iteration ends silently where a header is cut
        while archive.fileobj.read(tarfile.RECORDSIZE):
            pass  # to the end: there the compressed ones have their checksum


def _zip_members(path: Path) -> Iterable[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            yield member.filename, archive.read(member)


def _splits(root: Path, contents: dict[str, Content], tiny: bool) -> tuple[_Split, _Split, list[str]]:
    train, class_names = _split(root, contents, "train")
    for name in ("val", "test") if tiny else ("test", "val"):
        if any(path.startswith(name + "/") for path in contents):
            break
    else:
        raise ValueError(f"{root} has neither a test nor a val folder")
    if name == "val" and tiny and ANNOTATIONS in contents:
        test = _annotated_split(contents)
        test_names = sorted(set(test.classes))
    else:
        test, test_names = _split(root, contents, name)
    for there, here, split in ((class_names, test_names, name), (test_names, class_names, "train")):
        missing = sorted(set(there) - set(here))
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"{root}: {split} has no folder for class {', '.join(missing[:3])}{more}")
    return train, test, class_names


def _split(root: Path, contents: dict[str, Content], name: str) -> tuple[_Split, list[str]]:
    """Images NAME/CLASS/…/FILE in the order of class, then path; and all class names, sorted."""
    parts = sorted(path.split("/") for path in contents if path.startswith(name + "/"))
    class_names = sorted({p[1] for p in parts if len(p) > 2})
    images = [p for p in parts if len(p) > 2 and p[-1].lower().endswith(EXTENSIONS)]
    if not images:
        raise ValueError(f"{root} has no images under {name}/CLASS/ ({', '.join(EXTENSIONS)})")
    empty = sorted(set(class_names) - {p[1] for p in images})
    if empty:
        raise ValueError(f"{root}: class folder {name}/{empty[0]} has no images ({', '.join(EXTENSIONS)})")
    return _Split(["/".join(p) for p in images], [p[1] for p in images]), class_names


def _annotated_split(contents: dict[str, Content]) -> _Split:
    """Tiny ImageNet's own validation split: one folder of images, and a table of file name and class."""
    rows = [line.split("\t") for line in _bytes(contents[ANNOTATIONS]).decode().splitlines() if line.strip()]
    known = sorted((row[1], f"val/images/{row[0]}") for row in rows if len(row) > 1)
    missing = [path for _, path in known if path not in contents]
    if missing or not known:
        raise ValueError(f"{ANNOTATIONS} names no image that exists" if not known else f"{missing[0]} does not exist")
    return _Split([path for _, path in known], [label for label, _ in known])


def _bytes(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _decode_all(
    name: str, train: _Split, test: _Split, class_names: list[str], contents: dict[str, Content], resize: int | None
) -> ImageData:
    """Decodes both splits with threads into one tensor (n, 3, H, W); greyscale ones are kept in one channel."""
    paths = train.paths + test.paths
    first = decode(_bytes(contents[paths[0]]), paths[0], resize)
    images = torch.empty((len(paths), 3, *first.shape[1:]), dtype=torch.uint8)

    def work(start: int) -> bool:
        grey = True
        for i in range(start, min(start + CHUNK, len(paths))):
            image = decode(_bytes(contents[paths[i]]), paths[i], resize)
            if image.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{paths[i]} is {image.shape[2]}x{image.shape[1]} pixels, but {paths[0]} is "
                    f"{first.shape[2]}x{first.shape[1]}: make them equal, or pass resize"
                )
            images[i] = image  # one channel is repeated
            grey &= len(image) == 1
        return grey

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(paths), CHUNK)
        decoded = pool.map(work, starts)
        bar = tqdm(decoded, total=len(starts), desc=f"decoding {name}", disable=None, delay=1, leave=False)
        all_grey = all(list(bar))
    if all_grey:
        images = images[:, :1].contiguous()
    number = {class_name: i for i, class_name in enumerate(class_names)}
    labels = [torch.tensor([number[c] for c in split.classes]) for split in (train, test)]
    n = len(train.paths)
    return ImageData(
        name,
        ImageSplit(images[:n], labels[0], train.paths),
        ImageSplit(images[n:], labels[1], test.paths),
        class_names,
    )


def decode(content: bytes, name: str, resize: int | None = None) -> Tensor:
    """One encoded image as uint8 (1 or 3, H, W): one channel for greyscale; alpha is dropped, palettes become RGB.

    resize: scale to fill this many pixels a side and cut the centre out. Raises ValueError naming `name`.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image = _eight_bits(opened)
        if resize is not None and image.size != (resize, resize):
            image = ImageOps.fit(image, (resize, resize), method=Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a readable image: no known format") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """`image` in PIL mode L or RGB."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"mode {image.mode} with more than 16 bits; allowed are 8 and 16 bits a channel")
        return Image.fromarray((levels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels; allowed are 8 and 16 bits a channel")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _cache_key(path: Path, files: dict[str, Content] | None, tiny: bool, resize: int | None) -> str:
    listed = {path.name: path} if files is None else files
    stamps = [(name, file.stat()) for name, file in sorted(listed.items()) if not name.endswith("/")]
    listing = [(name, stamp.st_size, stamp.st_mtime_ns) for name, stamp in stamps]
    return hashlib.sha256(json.dumps([tiny, resize, listing]).encode()).hexdigest()[:16]


def _write_cache(store: Path, data: ImageData) -> None:
    tensors = {"mean": data.mean, "std": data.std}
    metadata = {"class_names": json.dumps(data.class_names)}
    for name, split in (("train", data.train), ("test", data.test)):
        tensors |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
        metadata[f"{name}_paths"] = json.dumps(split.paths)
    save_tensors(store, "images", tensors, metadata)


def _read_cache(store: Path, name: str) -> ImageData:
    required = ("mean", "std", "train_images", "train_labels", "test_images", "test_labels")
    tensors, metadata = load_tensors(store, "images", *required)
    described = {field: json_field(metadata, field, store) for field in ("class_names", "train_paths", "test_paths")}
    try:
        names = {field: strict_json.strings(value, field) for field, value in described.items()}
        parts = (
            ImageSplit(tensors[f"{s}_images"], tensors[f"{s}_labels"], names[f"{s}_paths"]) for s in ("train", "test")
        )
        return ImageData(name, *parts, names["class_names"], tensors["mean"], tensors["std"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{store} is damaged: {error}") from error
