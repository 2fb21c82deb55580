"""Image data sets in tables of Arrow: folders that `save_to_disk` of Hugging Face's datasets wrote, and Parquet files.

pyarrow alone reads them; nothing of the package datasets is needed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from selmatch_ext import strict_json
from selmatch_ext.data.folders import cache_key, load_planned
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.names import readable, shortened, unique_names
from selmatch_ext.data.splits import FolderOptions, Split, SplitPlan, stratified
from selmatch_ext.files import one_line, read_json

ENDINGS = (".parquet", ".arrow")
TESTS = ("test", "validation", "valid", "val", "dev")
SPLIT = re.compile(rf"(?:^|[^a-z])(train|{'|'.join(TESTS)})(?:[^a-z]|$)")


class Columns(NamedTuple):
    """The columns of images and labels in a table. names: of the classes, where the table has them."""

    image: str
    label: str
    names: list[str] | None


def load_tables(path: Path, options: FolderOptions, cache: str | os.PathLike | None) -> ImageData:
    """Loads a file or a folder of tables; see `selmatch_ext.data.load.load`.

    Raises ImportError without pyarrow, FileNotFoundError, and ValueError naming the file that is damaged or that has no
    such columns."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the data set huggingface:{path} needs the package pyarrow: pip install 'selmatch_ext[hf]'"
        ) from error
    files = _files(path)
    key = cache_key(
        {str(file.relative_to(path)): file for part in files.values() for file in part}, options, (None, None)
    )
    return load_planned(path, lambda: _plan(path, files, options), options, cache, key)


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split, which their names or those of their folders say; `train` where they say none."""
    where = readable(str(path))
    if not path.exists():
        raise FileNotFoundError(f"image data set {where} does not exist")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in ENDINGS and p.is_file())
    found = [p for p in found if not p.name.startswith((".", "cache-"))]  # what datasets computed and kept
    if not found or found[0].suffix not in ENDINGS:
        raise ValueError(f"{where} has no files that end in {' or '.join(ENDINGS)}")
    for state in {p.with_name("state.json") for p in found}:
        if state.exists() and read_json(state).get("_indices_data_files"):
            raise ValueError(
                f"{state} says that rows were chosen by another file; call flatten_indices() and save again"
            )
    files: dict[str, list[Path]] = {}
    for file in found:
        parts = file.relative_to(path.parent if path.is_file() else path).parts
        names = [match[1] for part in reversed(parts) if (match := SPLIT.search(part.lower()))]
        files.setdefault(names[0] if names else "train", []).append(file)
    if "train" not in files:
        raise ValueError(f"{where} has no training split, but {', '.join(files)}")
    return files


def _plan(path: Path, files: dict[str, list[Path]], options: FolderOptions) -> SplitPlan:
    where = readable(str(path))
    contents: dict[str, bytes] = {}
    columns = _columns(files["train"][0])
    names = columns.names
    labels: dict[str, list[Any]] = {}
    test = next((name for name in TESTS if name in files), None)
    for split in ["train", *([] if test is None else [test])]:
        rows = [row for file in files[split] for row in _rows(file, columns)]
        contents |= {f"{split}/{i:08d}": image for i, (image, _) in enumerate(rows)}
        labels[split] = [label for _, label in rows]
    if names is None:
        found = sorted({label for part in labels.values() for label in part})
        labels = {split: [found.index(label) for label in part] for split, part in labels.items()}
        names = [str(label) for label in found]
    names = unique_names(names)
    if len(names) < 2:
        raise ValueError(f"{where} has one class, {', '.join(names)}; at least two are needed")
    splits = {split: _split(f"{where}: {split}", split, part, names) for split, part in labels.items()}
    if test is not None:
        parts = splits["train"], splits[test]
    elif options.test_share is not None:
        parts = stratified(where, splits["train"], options.test_share, options.seed)
    else:
        raise ValueError(f"{where} has no test split; test_share would split the training images")
    return SplitPlan(*parts, names, dict(contents)).of_classes(options.classes, where)


def _split(where: str, split: str, labels: list[int], names: list[str]) -> Split:
    wrong = next((i for i, label in enumerate(labels) if not 0 <= label < len(names)), None)
    if wrong is not None:
        raise ValueError(f"{where}: row {wrong} has the label {labels[wrong]}; allowed are 0 to {len(names) - 1}")
    return Split([f"{split}/{i:08d}" for i in range(len(labels))], [names[label] for label in labels])


def _columns(file: Path) -> Columns:
    """The column of images and the column of classes. ValueError where there is not one of each."""
    import pyarrow as pa

    with _reading(file) as table:
        schema = table.schema
        said = (schema.metadata or {}).get(b"huggingface", b"{}").decode(errors="replace")
        info = strict_json.mapping(strict_json.parse(said, "its metadata"), "its metadata").get("info", {})
        features = strict_json.mapping(info, "info").get("features") or {}
        kinds = {name: f.get("_type") for name, f in features.items() if isinstance(f, dict)}
        struct = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        images = [name for name in struct if kinds.get(name) == "Image"] or struct
        classes = [name for name in schema.names if kinds.get(name) == "ClassLabel"] or [
            f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_string(f.type)
        ]
        label = classes if len(classes) == 1 else [name for name in classes if name == "label"]
        if len(images) != 1 or len(label) != 1:
            raise ValueError(
                f"its columns are {shortened(schema.names, 8)}; it must have one of encoded images (a struct with "
                "bytes), and one of classes, which is called label where there are several"
            )
        names = features[label[0]].get("names") if kinds.get(label[0]) == "ClassLabel" else None
        return Columns(images[0], label[0], None if names is None else strict_json.strings(names, "the class names"))


def _rows(file: Path, columns: Columns) -> Iterator[tuple[bytes, Any]]:
    """(encoded image, label) of every row of a file."""
    wanted = [columns.image, columns.label]
    with _reading(file) as table:
        missing = [name for name in wanted if name not in table.column_names]
        if missing:
            raise ValueError(f"it has no column {', '.join(missing)}, which the first file of train has")
        for number, (image, label) in enumerate(zip(*(table[name].to_pylist() for name in wanted), strict=True)):
            if label is None or not isinstance(image, dict) or not image.get("bytes"):
                raise ValueError(f"row {number} has no {'label' if label is None else 'image inside the file'}")
            yield image["bytes"], label


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """The table in a file, mapped to memory. What is wrong with it is a ValueError naming the file."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            yield pa.parquet.ParquetFile(file, memory_map=True).read()
            return
        with pa.memory_map(str(file)) as source:
            name = source.read(6)
            source.seek(0)
            yield (pa.ipc.open_file if name == b"ARROW1" else pa.ipc.open_stream)(source).read_all()
    except (pa.ArrowException, ValueError, OSError) as error:
        raise ValueError(f"{readable(str(file))} is no table of images: {one_line(error)}") from error
