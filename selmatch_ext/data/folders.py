"""Image folders and archives of them: decoding all images, and a cache of what was decoded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from selmatch_ext import strict_json
from selmatch_ext.data.archives import ARCHIVES, read_archive
from selmatch_ext.data.decoding import DecodedImage, Levels, decode, extensions
from selmatch_ext.data.images import Full, ImageData, ImageSplit
from selmatch_ext.data.memory import available_memory, size_text
from selmatch_ext.data.names import readable, shortened, unique_names
from selmatch_ext.data.splits import ANNOTATIONS, FolderOptions, Split, SplitPlan, bytes_of, plan_splits
from selmatch_ext.data.tree import ArchiveTree, Content, FolderTree, Listing, extension, skipped_text
from selmatch_ext.files import json_field, load_tensors, save_tensors
from selmatch_ext.settings import color

CHUNK = 256  # images a thread decodes at a time

logger = logging.getLogger(__name__)


def load_folder(path: Path, options: FolderOptions, cache: str | os.PathLike | None) -> ImageData:
    """Loads a folder or an archive; see `selmatch_ext.data.load.load`.

    Says in one line of the log what was skipped, and how 16-bit files were scaled. Raises ValueError, also for a data
    set of one class and for training images that are all equal, and OSError."""
    if not path.exists():
        raise FileNotFoundError(f"image data set {readable(str(path))} does not exist")
    if not path.is_dir():
        key = cache_key({path.name: path}, options, (None, None))
        return load_planned(path, lambda: plan_splits(path, _archive_tree(path), options), options, cache, key)
    plan = plan_splits(path, FolderTree(path), options)
    key = cache_key(plan.contents, options, (plan.test.paths, plan.test.classes))
    return load_planned(path, lambda: plan, options, cache, key)


def load_planned(
    path: Path, plan: Callable[[], SplitPlan], options: FolderOptions, cache: str | os.PathLike | None, key: str
) -> ImageData:
    """The images of a data set. Where the folder `cache` holds a file for `key` (see `cache_key`), they are read from
    it; otherwise the files that `plan()` lists are decoded, and the result is written there for the next call. cache:
    None = nothing is cached."""
    name = readable(_stem(path)) + (f" ({options.resize}x{options.resize})" if options.resize is not None else "")
    store = None
    if cache is not None:
        stem = readable(_stem(path)).encode()[:100].decode(errors="ignore")
        store = Path(cache) / f"{stem}-{key}.safetensors"
        if store.exists():
            try:
                return _read_cache(store, name)
            except (ValueError, TypeError):
                pass  # damaged: decoded again and replaced below
    data, notes = _decode_all(name, plan(), options)
    first = data.train.images[0]
    if all(torch.equal(image, first) for image in data.train.images):
        raise ValueError(f"{name}: the {len(data.train)} training images do not differ; there is nothing to learn")
    _log(notes)
    if store is not None:
        _write_cache(store, data, notes)
    return data


def _log(notes: list[str]) -> None:
    """Writes each note to the log, as a warning."""
    for note in notes:
        logger.warning("%s", note)


def _stem(path: Path) -> str:
    name = path.resolve().name
    ending = next((e for e in sorted(ARCHIVES, key=len, reverse=True) if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


def _archive_tree(path: Path) -> ArchiveTree:
    """The archive from the folder on that holds `train`; or else from the first that does not hold just one folder."""
    known = extensions()
    tree = read_archive(path, lambda name: extension(name) in known or name.endswith(ANNOTATIONS))
    roots = [f"{folder}/".lstrip("/") for folder, names in tree.children.items() if "train" in names]
    roots = [root for root in roots if not any(part.startswith(".") for part in root.split("/"))]
    if roots:
        tree.prefix = min(roots, key=lambda root: (len(root), root))
        return tree
    while len(inside := tree.entries(None)) == 1 and inside[0].kind == "folder":
        if not any(entry.kind == "folder" for entry in tree.entries(inside[0].node)):
            break  # the one folder is a class
        tree.prefix = f"{inside[0].node}/"
    return tree


def decode_split(name: str, paths: list[str], classes: list[str], listing: Listing) -> Tensor:
    """The images at `paths` of a listing as one tensor (n, C, H, W) uint8; what was left out is said in the log."""
    plan = SplitPlan(Split(paths, classes), Split([], []), listing.classes, listing.files)
    images, notes = _Decoding(name, plan, FolderOptions()).run()
    _log([f"{name}: {skipped_text(listing.skipped)}"] * bool(listing.skipped) + notes)
    return images


def _decode_all(name: str, plan: SplitPlan, options: FolderOptions) -> tuple[ImageData, list[str]]:
    """Decodes both splits, and what is to be said about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode` refuses such files
        warnings.filterwarnings("ignore", module="PIL")  # of metadata, which say nothing of the pixels
        images, notes = _Decoding(name, plan, options).run()
    number = {folder: i for i, folder in enumerate(plan.class_folders)}
    labels = [torch.tensor([number[c] for c in split.classes]) for split in (plan.train, plan.test)]
    n = len(plan.train.paths)
    full = None
    if plan.whole is not None:
        of_all = {folder: i for i, folder in enumerate(plan.whole[1])}
        all_labels = torch.tensor([of_all[c] for c in plan.whole[0].classes])
        kept = torch.isin(all_labels, torch.tensor([of_all[folder] for folder in plan.class_folders]))
        full = Full(name, all_labels, kept.nonzero().squeeze(1))
        name = f"{name} ({len(plan.class_folders)} classes)"
    data = ImageData(
        name,
        ImageSplit(images[:n], labels[0], plan.train.paths),
        ImageSplit(images[n:], labels[1], plan.test.paths),
        unique_names(plan.class_folders),
        full=full,
    )
    skipped = [f"{name}: {skipped_text(plan.skipped)}"] if plan.skipped else []
    return data, skipped + notes


class _Decoding:
    """Decodes all images of a plan with threads into one uint8 tensor (n, C, H, W); C is 1 when all are gray, or 3."""

    def __init__(self, name: str, plan: SplitPlan, options: FolderOptions) -> None:
        self.name, self.options, self.contents = name, options, plan.contents
        self.paths, self.training = plan.train.paths + plan.test.paths, len(plan.train.paths)
        self.color = color(options.background)
        self.same_as = None
        first = self._decode(0)
        height, width = first.pixels.shape[1:]
        self.same_as = readable(self.paths[0]), (width, height)
        self._check_memory(first)
        self.images = torch.empty((len(self.paths), 3, height, width), dtype=torch.uint8)
        self.deep: dict[int, DecodedImage] = {}
        self.gray, self.frames = [True] * len(self.paths), [False] * len(self.paths)

    def run(self) -> tuple[Tensor, list[str]]:
        """Decodes all images: (n, C, H, W) uint8, and notes for the log, such as how 16-bit files were scaled."""
        starts = range(0, len(self.paths), CHUNK)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = pool.map(self._work, starts)
            list(tqdm(decoded, total=len(starts), desc=f"decoding {self.name}", disable=None, delay=1, leave=False))
        notes = self._scale_deep()
        if any(self.frames):
            several = [path for path, frames in zip(self.paths, self.frames, strict=True) if frames]
            notes.append(
                f"{self.name}: of {len(several)} files with several frames the first is used: {shortened(several)}"
            )
        return self.images[:, :1].contiguous() if all(self.gray) else self.images, notes

    def _decode(self, index: int) -> DecodedImage:
        path = self.paths[index]
        content = bytes_of(self.contents[path])
        return decode(content, readable(path), self.options.resize, self.color, self.same_as)

    def _check_memory(self, first: DecodedImage) -> None:
        free, (channels, height, width) = available_memory(), first.pixels.shape
        each = height * width * (3 + (2 * channels if first.pixels.dtype != "uint8" else 0))
        if free is not None and each * len(self.paths) > free:
            raise ValueError(
                f"{self.name}: {len(self.paths)} images of {width}x{height} pixels take "
                f"{size_text(each * len(self.paths))} of memory, and {size_text(free)} are free; pass a smaller resize"
            )

    def _work(self, start: int) -> None:
        for i in range(start, min(start + CHUNK, len(self.paths))):
            picture = self._decode(i)
            self.frames[i] = picture.frames
            if picture.pixels.dtype == "uint8":
                self._put(i, picture.pixels)
            else:
                self.deep[i] = picture

    def _put(self, index: int, pixels: np.ndarray) -> None:
        self.images[index] = torch.from_numpy(pixels)  # one channel is repeated
        self.gray[index] = len(pixels) == 1

    def _scale_deep(self) -> list[str]:
        """Scales 16-bit pictures to 8 bits by the range of those in the training split (in the test split, where the
        training split has none)."""
        if not self.deep:
            return []
        deciding = [p.pixels for i, p in self.deep.items() if i < self.training] or [
            p.pixels for p in self.deep.values()
        ]
        low, high = min(int(p.min()) for p in deciding), max(int(p.max()) for p in deciding)
        levels = Levels.of(low, high)
        for index, picture in self.deep.items():
            self._put(index, levels.eight_bits(picture, self.color))
        if levels == Levels(0, 65535):
            return []
        return [
            f"{self.name}: {len(self.deep)} 16-bit files, whose training images have levels {low} to {high}: "
            f"{levels.low} to {levels.high} become 0 to 255"
        ]


def cache_key(listed: Mapping[str, Content], options: FolderOptions, tests: tuple) -> str:
    """What the decoded images depend on: the files' names, sizes and times, the options, and which images are for
    testing, where the files do not say it."""
    stamps = [(name, file.stat()) for name, file in sorted(listed.items()) if isinstance(file, Path)]
    listing = [(name, stamp.st_size, stamp.st_mtime_ns) for name, stamp in stamps]
    return hashlib.sha256(json.dumps([options.key(), listing, tests]).encode()).hexdigest()[:16]


def _write_cache(store: Path, data: ImageData, notes: list[str]) -> None:
    tensors = {"mean": data.mean, "std": data.std}
    metadata = {"class_names": json.dumps(data.class_names), "notes": json.dumps(notes)}
    for name, split in (("train", data.train), ("test", data.test)):
        tensors |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
        metadata[f"{name}_paths"] = json.dumps(split.paths)
    if data.full is not None:
        tensors |= {"full_labels": data.full.labels, "full_kept": data.full.kept}
    save_tensors(store, "images", tensors, metadata)


def _read_cache(store: Path, name: str) -> ImageData:
    required = ("mean", "std", "train_images", "train_labels", "test_images", "test_labels")
    tensors, metadata = load_tensors(store, "images", *required)
    fields = ("class_names", "train_paths", "test_paths", "notes")
    described = {field: json_field(metadata, field, store) for field in fields}
    try:
        names = {field: strict_json.strings(value, field) for field, value in described.items()}
        train, test = (
            ImageSplit(tensors[f"{s}_images"], tensors[f"{s}_labels"], names[f"{s}_paths"]) for s in ("train", "test")
        )
        full = None
        if "full_labels" in tensors:
            full = Full(name, tensors["full_labels"], tensors["full_kept"])
            name = f"{name} ({len(names['class_names'])} classes)"
        data = ImageData(name, train, test, names["class_names"], tensors["mean"], tensors["std"], full=full)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{store} is damaged: {error}") from error
    _log(names["notes"])
    return data
