"""Which images of a folder or archive belong to which split and class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from selmatch_ext.data.decoding import check_color, extensions
from selmatch_ext.data.names import readable, shortened
from selmatch_ext.data.tree import Content, Listing, Tree, list_split, skipped_text
from selmatch_ext.seeds import generator

ANNOTATIONS = "val_annotations.txt"
MOST_PIXELS = 4096  # of a side after resizing
DECODER = 2  # part of the cache's key; to be raised when the same files become other pixels


@dataclass(frozen=True)
class Options:
    """How a folder or archive is read; the arguments of `selmatch_ext.data.images.load` of the same names. tiny: Tiny
    ImageNet, tested on `val`."""

    tiny: bool = False
    resize: int | None = None
    background: str = "white"
    test_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resize is not None and not 1 <= self.resize <= MOST_PIXELS:
            raise ValueError(f"resize is {self.resize}; allowed is a number of pixels from 1 to {MOST_PIXELS}")
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise ValueError(f"test_share is {self.test_share}; allowed is a share of the images above 0 and below 1")
        check_color(self.background)

    def key(self) -> list:
        """What the decoded images depend on, JSON-able."""
        split = None if self.test_share is None else [self.test_share, self.seed]
        return [DECODER, self.tiny, self.resize, check_color(self.background), split]


@dataclass(frozen=True)
class Split:
    """Which images a split has: `paths` relative to the data set, in its order, and the class folder of each."""

    paths: list[str]
    classes: list[str]


@dataclass(frozen=True)
class Plan:
    """What is to be decoded. class_folders: their names, sorted; contents: of every path; skipped: what is left out."""

    train: Split
    test: Split
    class_folders: list[str]
    contents: dict[str, Content]
    skipped: Counter = field(default_factory=Counter)


def plan_splits(root: Path, tree: Tree, options: Options) -> Plan:
    """The images of both splits. Raises ValueError where a split or a class has none, and for a single class."""
    splits = [name for name in ("train", "test", "val") if (top := tree.top(name)) and top.kind == "folder"]
    known, where = extensions(), readable(str(root))
    if "train" not in splits and options.test_share is not None and not splits:
        listing = list_split(tree, "", None, known)
        train, test = _stratified(where, listing, "", options)
        class_names, skipped = sorted(listing.classes), listing.skipped
        contents = listing.files
    else:
        listing = _list(tree, "train", known)
        train, class_names = _split(where, listing, "train")
        skipped, contents = listing.skipped, dict(listing.files)
        name = next((n for n in (("val", "test") if options.tiny else ("test", "val")) if n in splits), None)
        if name is not None:
            test = _test_split(where, tree, name, class_names, options, contents, skipped)
        elif options.test_share is not None:
            train, test = _stratified(where, listing, "train", options)
        else:
            raise ValueError(f"{where} has neither a test nor a val folder; test_share splits the training images")
    if len(class_names) < 2:
        raise ValueError(f"{where} has one class, {readable(class_names[0])}; at least two are needed")
    return Plan(train, test, class_names, contents, skipped + tree.skipped)


def _list(tree: Tree, name: str, known: frozenset[str]) -> Listing:
    top = tree.top(name)
    return Listing() if top is None or top.kind != "folder" else list_split(tree, f"{name}/", top.node, known)


def _test_split(
    where: str,
    tree: Tree,
    name: str,
    class_names: list[str],
    options: Options,
    contents: dict[str, Content],
    skipped: Counter,
) -> Split:
    """The images of the test split `name`; adds to contents and skipped."""
    listing = _list(tree, name, extensions())
    contents.update(listing.files)
    table = next((e for e in tree.entries(tree.top(name).node) if e.name == ANNOTATIONS and e.kind == "file"), None)
    if name == "val" and options.tiny and table is not None:
        test = _annotated_split(tree.content(table.node), contents)
        test_names = sorted(set(test.classes))
    else:
        skipped.update(listing.skipped)
        test, test_names = _split(where, listing, name)
    for there, here, split in ((class_names, test_names, name), (test_names, class_names, "train")):
        missing = sorted(set(there) - set(here))
        if missing:
            raise ValueError(f"{where}: {split} has no folder for class {shortened(missing)}")
    return test


def _split(where: str, listing: Listing, name: str) -> tuple[Split, list[str]]:
    """Images NAME/CLASS/…/FILE in the order of class, then path; and all class folders, sorted."""
    depth = 1 if name else 0
    images = sorted(path.split("/") for path in listing.files)
    below = f"{name}/CLASS/" if name else "CLASS/"
    skipped = skipped_text(listing.skipped)
    if not images:
        hint = "" if name != "train" else "; class folders alone need test_share"
        raise ValueError(f"{where} has no images under {below} ({skipped or 'no files at all'}{hint})")
    empty = sorted(set(listing.classes) - {parts[depth] for parts in images})
    if empty:
        folder = f"{name}/{empty[0]}" if name else empty[0]
        raise ValueError(f"{where}: class folder {readable(folder)} has no images ({skipped or 'no files at all'})")
    return Split(["/".join(parts) for parts in images], [parts[depth] for parts in images]), sorted(listing.classes)


def _stratified(where: str, listing: Listing, name: str, options: Options) -> tuple[Split, Split]:
    """Sets `test_share` of the images of each class aside, at least one, drawn from `seed`."""
    split, class_names = _split(where, listing, name)
    in_test: set[str] = set()
    for class_name in class_names:
        members = [p for p, c in zip(split.paths, split.classes, strict=True) if c == class_name]
        count = max(1, round(options.test_share * len(members)))
        if count >= len(members):
            raise ValueError(
                f"{where}: test_share {options.test_share} of the {len(members)} images of class "
                f"{readable(class_name)} leaves none to train on"
            )
        order = torch.randperm(len(members), generator=generator(options.seed, "test_share", readable(class_name)))
        in_test.update(members[i] for i in order[:count].tolist())
    pairs = list(zip(split.paths, split.classes, strict=True))
    train, test = ([p for p in pairs if (p[0] in in_test) == held_out] for held_out in (False, True))
    return tuple(Split([p for p, _ in part], [c for _, c in part]) for part in (train, test))


def _annotated_split(table: Content, contents: dict[str, Content]) -> Split:
    """Tiny ImageNet's own validation split: one folder of images, and a table of file name and class."""
    rows = [line.split("\t") for line in bytes_of(table).decode(errors="replace").splitlines() if line.strip()]
    known = sorted((row[1], f"val/images/{row[0]}") for row in rows if len(row) > 1)
    if not known:
        raise ValueError(f"val/{ANNOTATIONS} names no image that exists")
    missing = next((path for _, path in known if path not in contents), None)
    if missing is not None:
        raise ValueError(f"{readable(missing)} does not exist, though val/{ANNOTATIONS} names it")
    return Split([path for _, path in known], [label for label, _ in known])


def bytes_of(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()
