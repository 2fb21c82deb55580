"""Folders of images as trees that can be walked: on the disk, or made of the members of an archive."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from selmatch_ext.data.names import readable

Content = Path | bytes  # an image file, or what an archive holds of it

JUNK = frozenset({"__macosx", ".ds_store", "thumbs.db", "desktop.ini", ".directory"})  # in lower case
MOST_HOPS = 40  # links followed in a row, as Linux does


class Entry(NamedTuple):
    """What a folder holds. kind: file, folder, or a reason why it is neither; node: what the tree knows it by."""

    name: str
    kind: str
    node: Any


class Tree(Protocol):
    """Folders in folders. skipped: what was left out before the tree was made."""

    skipped: Counter

    def top(self, name: str) -> Entry | None:
        """The entry of that name in the uppermost folder, if there is one."""

    def entries(self, node: Any) -> list[Entry]:
        """What a folder holds, sorted by name. node: None for the uppermost folder."""

    def identity(self, node: Any) -> Hashable:
        """Equal for two ways to the same folder."""

    def content(self, node: Any) -> Content:
        """The file at `node`."""


@dataclass
class Listing:
    """The files of a split. files: {NAME/CLASS/…/FILE: content}; classes: names of the class folders; skipped: what was
    left out, {".txt": 10, "hidden": 1}."""

    files: dict[str, Content] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)


def is_junk(name: str) -> bool:
    """Whether a file or folder is one that macOS or Windows adds by itself, ._ resource forks for example."""
    return name.lower() in JUNK or name.startswith("._")


def extension(name: str) -> str:
    """The ending of a file's name in lower case, with the dot."""
    return os.path.splitext(name)[1].lower()


def class_folders(tree: Tree, node: Any, skipped: Counter, above: frozenset = frozenset()) -> list[Entry]:
    """The folders in a folder, but for hidden ones and links that lead back to it or above it."""
    found = []
    seen = above | {tree.identity(node)}
    for entry in tree.entries(node):
        if is_junk(entry.name):
            continue
        if entry.kind == "file":
            skipped["outside class folders"] += 1
        elif entry.kind != "folder":
            skipped[entry.kind] += 1
        elif entry.name.startswith("."):
            skipped["hidden"] += 1
        elif tree.identity(entry.node) in seen:
            skipped["looping"] += 1
        else:
            found.append(entry)
    return found


def list_split(tree: Tree, prefix: str, node: Any, wanted: frozenset[str]) -> Listing:
    """The images below the class folders of `node`, at any depth. prefix: of their paths, "train/" for example.
    wanted: the endings of names that count. Every folder is visited once for each class, whatever links lead to it."""
    listing = Listing()
    above = frozenset({tree.identity(None), tree.identity(node)})
    for entry in class_folders(tree, node, listing.skipped, above):
        listing.classes.append(entry.name)
        seen = {*above, tree.identity(entry.node)}
        waiting = [(prefix + entry.name, entry.node)]
        while waiting:
            path, folder = waiting.pop()
            for inner in tree.entries(folder):
                if inner.kind == "folder" and not inner.name.startswith("."):
                    identity = tree.identity(inner.node)
                    if identity in seen:
                        listing.skipped["looping"] += 1
                    elif not is_junk(inner.name):
                        seen.add(identity)
                        waiting.append((f"{path}/{inner.name}", inner.node))
                elif reason := _why_skipped(inner, wanted):
                    listing.skipped[reason] += 1
                elif not is_junk(inner.name):
                    listing.files[f"{path}/{inner.name}"] = tree.content(inner.node)
    return listing


def _why_skipped(entry: Entry, wanted: frozenset[str]) -> str:
    if is_junk(entry.name):
        return ""
    if entry.name.startswith("."):
        return "hidden"
    if entry.kind != "file":
        return entry.kind
    ending = extension(entry.name)
    return "" if ending in wanted else readable(ending) or "without extension"


def skipped_text(skipped: Counter) -> str:
    """What was left out as one line, most first; empty when nothing was."""
    if not skipped:
        return ""
    total, kinds = sum(skipped.values()), sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:8])
    more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
    return f"skipped {total} file{'s' * (total != 1)}: {shown}{more}"


class FolderTree:
    """A folder on the disk; symbolic links are followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: Counter = Counter()

    def top(self, name: str) -> Entry | None:
        path = self.root / name
        return Entry(name, _kind(path), path) if os.path.lexists(path) else None

    def entries(self, node: Path | None) -> list[Entry]:
        with os.scandir(node or self.root) as found:
            return sorted(Entry(e.name, _kind(e), Path(e.path)) for e in found)

    def identity(self, node: Path | None) -> Hashable:
        status = os.stat(node or self.root)
        return status.st_dev, status.st_ino

    def content(self, node: Path) -> Content:
        return node


def _kind(path: os.DirEntry | Path) -> str:
    try:
        if path.is_dir():
            return "folder"
        if path.is_file():
            return "file"
        return "dangling" if path.is_symlink() else "special"
    except OSError:
        return "dangling"  # a loop of links


class ArchiveTree:
    """The members of an archive. files: {path: content, or None where it was not read}; links: {path: target, relative
    to the link's folder}; folders: paths of folders, others follow from the files.

    Links are followed inside the archive; targets that are absolute or lie outside lead to nothing.
    """

    def __init__(
        self, files: dict[str, bytes | None], links: dict[str, str], folders: set[str], skipped: Counter | None = None
    ) -> None:
        self.files, self.links, self.prefix = files, links, ""
        self.skipped = skipped or Counter()
        self.children: dict[str, set[str]] = {"": set()}
        for folder in folders:
            self.children.setdefault(folder, set())
        for path in [*files, *links, *folders]:
            while path:
                parent, _, name = path.rpartition("/")
                known = name in self.children.setdefault(parent, set())
                self.children[parent].add(name)
                if known:
                    break
                path = parent

    def resolve(self, path: str) -> str | None:
        """The path without links of what `path` leads to; None where that is outside, or a loop."""
        done: list[str] = []
        todo, hops = path.split("/")[::-1], 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if not done:
                    return None
                done.pop()
                continue
            target = self.links.get("/".join([*done, part]))
            if target is None:
                done.append(part)
                continue
            hops += 1
            if hops > MOST_HOPS or target.startswith("/"):
                return None
            todo.extend(target.split("/")[::-1])
        return "/".join(done)

    def top(self, name: str) -> Entry | None:
        parent = self.prefix.rstrip("/")
        return self._entry(parent, name) if name in self.children.get(parent, ()) else None

    def entries(self, node: str | None) -> list[Entry]:
        node = self.prefix.rstrip("/") if node is None else node
        return [self._entry(node, name) for name in sorted(self.children[node])]

    def identity(self, node: str | None) -> Hashable:
        return self.prefix.rstrip("/") if node is None else node

    def content(self, node: str) -> Content:
        content = self.files[node]
        assert content is not None, f"{node} was not read"
        return content

    def _entry(self, folder: str, name: str) -> Entry:
        path = f"{folder}/{name}" if folder else name
        target = self.resolve(path) if path in self.links else path
        if target in self.files:
            return Entry(name, "file", target)
        return Entry(name, "folder" if target in self.children else "dangling", target)
