"""Which images of a folder or archive belong to which split and class."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from selmatch_ext.data.decoding import extensions
from selmatch_ext.data.names import positions, readable, shortened, unique_names
from selmatch_ext.data.tree import Content, Entry, Listing, Tree, list_split, skipped_text
from selmatch_ext.seeds import generator
from selmatch_ext.settings import Data, color

ANNOTATIONS = "val_annotations.txt"
DECODER = 2  # part of the cache's key; to be raised when the same files become other pixels


@dataclass(frozen=True)
class FolderOptions:
    """How a folder or archive is read; the arguments of `selmatch_ext.data.load.load` of the same names. tiny: Tiny
    ImageNet, tested on `val`."""

    tiny: bool = False
    resize: int | None = None
    background: str = "white"
    test_share: float | None = None
    seed: int = 0
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("resize", "background", "test_share", "classes")}
        Data(**given)  # refuses what is out of range

    def key(self) -> list:
        """What the decoded images depend on, JSON-able."""
        split = None if self.test_share is None else [self.test_share, self.seed]
        classes = [] if self.classes is None else [sorted(set(self.classes))]
        return [DECODER, self.tiny, self.resize, color(self.background), split, *classes]


@dataclass(frozen=True)
class Split:
    """Which images a split has: `paths` relative to the data set, in its order, and the class folder of each."""

    paths: list[str]
    classes: list[str]

    def of_classes(self, folders: list[str]) -> Split:
        """The images whose class folder is one of `folders`, in the same order."""
        kept = [(path, c) for path, c in zip(self.paths, self.classes, strict=True) if c in folders]
        return Split([path for path, _ in kept], [c for _, c in kept])


@dataclass(frozen=True)
class SplitPlan:
    """What is to be decoded. class_folders: their names, sorted; contents: of every path; skipped: what is left out;
    whole: the training split and the class folders of which these are a part, if they are."""

    train: Split
    test: Split
    class_folders: list[str]
    contents: dict[str, Content]
    skipped: Counter = field(default_factory=Counter)
    whole: tuple[Split, list[str]] | None = None

    def of_classes(self, wanted: tuple[str, ...] | None, where: str) -> SplitPlan:
        """The part of some classes, by their readable names; None: of all. Raises ValueError as `positions` does."""
        if wanted is None:
            return self
        found = positions(wanted, unique_names(self.class_folders), where)
        folders = [self.class_folders[i] for i in found]
        train, test = self.train.of_classes(folders), self.test.of_classes(folders)
        contents = {path: self.contents[path] for path in (*train.paths, *test.paths)}
        return SplitPlan(train, test, folders, contents, self.skipped, (self.train, self.class_folders))


def plan_splits(root: Path, tree: Tree, options: FolderOptions) -> SplitPlan:
    """The images of both splits. Raises ValueError where a split or a class has none, and for a single class."""
    plan = _Planner(readable(str(root)), tree, options).plan()
    if len(plan.class_folders) < 2:
        raise ValueError(
            f"{readable(str(root))} has one class, {readable(plan.class_folders[0])}; at least two are needed"
        )
    return plan.of_classes(options.classes, readable(str(root)))


class _Planner:
    """Collects the contents of a data set and what is skipped. where: its path, for messages."""

    def __init__(self, where: str, tree: Tree, options: FolderOptions) -> None:
        self.where, self.tree, self.options = where, tree, options
        self.contents: dict[str, Content] = {}
        self.skipped = Counter(tree.skipped)
        self.known = extensions()

    def plan(self) -> SplitPlan:
        folders = [name for name in ("train", "test", "val") if self._folder(name) is not None]
        below = "" if not folders and self.options.test_share is not None else "train"
        train, class_names = _split(self.where, self._list(below), below)
        tests = ("val", "test") if self.options.tiny else ("test", "val")
        name = next((name for name in tests if name in folders), None)
        if name is not None:
            test = self._test_split(name, class_names)
        elif self.options.test_share is not None:
            train, test = stratified(self.where, train, self.options.test_share, self.options.seed)
        else:
            raise ValueError(
                f"{self.where} has neither a test nor a val folder; test_share would split the train folder"
            )
        return SplitPlan(train, test, class_names, self.contents, self.skipped)

    def _folder(self, name: str) -> Entry | None:
        entry = self.tree.top(name)
        return entry if entry is not None and entry.kind == "folder" else None

    def _list(self, name: str, said: bool = True) -> Listing:
        """The files of a split; of the whole data set where `name` is empty. said: what is skipped is counted."""
        folder = self._folder(name) if name else None
        listing = Listing()
        if folder is not None or not name:
            listing = list_split(self.tree, f"{name}/" if name else "", folder and folder.node, self.known)
        self.contents.update(listing.files)
        if said:
            self.skipped.update(listing.skipped)
        return listing

    def _test_split(self, name: str, class_names: list[str]) -> Split:
        folder = self._folder(name)
        inside = [] if folder is None else self.tree.entries(folder.node)
        table = next((entry for entry in inside if entry.name == ANNOTATIONS and entry.kind == "file"), None)
        if name == "val" and self.options.tiny and table is not None:
            self._list(name, said=False)
            test = _annotated_split(self.tree.content(table.node), self.contents)
            test_names = sorted(set(test.classes))
        else:
            test, test_names = _split(self.where, self._list(name), name)
        for there, here, split in ((class_names, test_names, name), (test_names, class_names, "train")):
            missing = sorted(set(there) - set(here))
            if missing:
                raise ValueError(f"{self.where}: {split} has no folder for class {shortened(missing)}")
        return test


def _split(where: str, listing: Listing, name: str) -> tuple[Split, list[str]]:
    """Images NAME/CLASS/…/FILE in the order of class, then path; and all class folders, sorted."""
    depth = 1 if name else 0
    images = sorted(path.split("/") for path in listing.files)
    below = f"{name}/CLASS/" if name else "CLASS/"
    skipped = skipped_text(listing.skipped)
    if not images:
        hint = "; for class folders without train and test set test_share (--data.test-share 0.2)" * (name == "train")
        raise ValueError(f"{where} has no images under {below} ({skipped or 'no files there'}){hint}")
    empty = sorted(set(listing.classes) - {parts[depth] for parts in images})
    if empty:
        folder = f"{name}/{empty[0]}" if name else empty[0]
        raise ValueError(f"{where}: class folder {readable(folder)} has no images ({skipped or 'no files at all'})")
    return Split(["/".join(parts) for parts in images], [parts[depth] for parts in images]), sorted(listing.classes)


def stratified(where: str, split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """(train, test): of each class, the test split gets `share` of the images, at least one, drawn with `seed`. Raises
    ValueError where a class would have no image left to train on."""
    in_test: set[str] = set()
    for class_name in sorted(set(split.classes)):
        members = [p for p, c in zip(split.paths, split.classes, strict=True) if c == class_name]
        count = max(1, round(share * len(members)))
        if count >= len(members):
            raise ValueError(
                f"{where}: test_share {share} of the {len(members)} images of class "
                f"{readable(class_name)} leaves none to train on"
            )
        order = torch.randperm(len(members), generator=generator(seed, "test_share", readable(class_name)))
        in_test.update(members[i] for i in order[:count].tolist())
    pairs = list(zip(split.paths, split.classes, strict=True))
    parts = ([p for p in pairs if (p[0] in in_test) == held_out] for held_out in (False, True))
    train, test = (Split([p for p, _ in part], [c for _, c in part]) for part in parts)
    return train, test


def _annotated_split(table: Content, contents: dict[str, Content]) -> Split:
    """The validation split in Tiny ImageNet's own layout: all images in one folder, ordered by class, then path.

    table: val_annotations.txt, with a file name and a class in each line. contents: the files that exist, by path.
    Raises ValueError for a table without images, and for an image in it that does not exist."""
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
