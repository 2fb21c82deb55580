"""Data sets in tables of Arrow, written as Hugging Face's datasets writes them."""

import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from selmatch_ext import cli
from selmatch_ext.data.load import load

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ["dog", "ant", "cat"]  # not in the order of the alphabet
FEATURES = {"img": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pixels(count, seed):
    return np.random.default_rng(seed).integers(256, size=(count, 4, 5, 3)).astype(np.uint8)


def table(images, labels, features=FEATURES, label_type=None, names=("img", "label")):
    """Images as PNGs in a struct, and labels; what the columns mean is in the metadata, where features is not None."""
    encoded = []
    for image in images:
        Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    columns = [pa.array(encoded, IMAGE), pa.array(labels, label_type or pa.int64())]
    metadata = None if features is None else {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns, pa.schema([*zip(names, (c.type for c in columns), strict=True)], metadata))


def write(path, content, form="stream"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return pq.write_table(content, path)
    make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=2)
    return None


TRAIN, TEST = pixels(6, 0), pixels(3, 1)
LABELS, TEST_LABELS = [2, 0, 1, 1, 0, 2], [0, 1, 2]


def assert_loaded(data, class_names=CLASSES, labels=LABELS):
    assert torch.equal(data.train.images.permute(0, 2, 3, 1), torch.from_numpy(TRAIN))
    assert torch.equal(data.test.images.permute(0, 2, 3, 1), torch.from_numpy(TEST))
    assert data.train.labels.tolist() == labels and data.class_names == class_names


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-{}-of-00002.parquet", "data/test-{}-of-00001.parquet"),
        ("plain_text/train/{}.parquet", "plain_text/test/{}.parquet"),
        ("train/data-{}-of-00002.arrow", "test/data-{}-of-00001.arrow"),
        ("set-train-{}.arrow", "set-validation-{}.arrow"),
        ("train-{}.arrow", "dev.parquet"),
    ],
)
@pytest.mark.parametrize("form", ["stream", "file"])
def test_layouts(tmp_path, train, test, form):
    """Two files of training images, in the order of their names."""
    write(tmp_path / train.format("00001"), table(TRAIN[4:], LABELS[4:]), form)
    write(tmp_path / train.format("00000"), table(TRAIN[:4], LABELS[:4]), form)
    write(tmp_path / test.format("00000"), table(TEST, TEST_LABELS), form)
    write(tmp_path / "train" / "cache-1f.arrow", table(TRAIN, LABELS))  # what datasets computed
    assert_loaded(load(f"huggingface:{tmp_path}"))


def test_one_file_and_a_share_for_testing(tmp_path):
    write(tmp_path / "images.parquet", table(np.concatenate([TRAIN, TEST]), LABELS + TEST_LABELS))
    data = load(f"huggingface:{tmp_path / 'images.parquet'}", test_share=0.34, seed=1)
    assert len(data.train) == 6 and data.test.labels.bincount().tolist() == [1, 1, 1]
    both = torch.cat([data.train.images, data.test.images]).flatten(1).unique(dim=0)
    assert torch.equal(
        both, torch.from_numpy(np.concatenate([TRAIN, TEST])).permute(0, 3, 1, 2).flatten(1).unique(dim=0)
    )
    again = load(f"huggingface:{tmp_path / 'images.parquet'}", test_share=0.34, seed=1)
    assert again.test.digest() == data.test.digest()
    with pytest.raises(ValueError, match="has no test split; test_share would split"):
        load(f"huggingface:{tmp_path}")


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [([7, 3, 20], pa.int32(), ["3", "7", "20"]), (["c", "a", "b"], pa.string(), ["a", "b", "c"])],
)
def test_classes_without_names(tmp_path, labels, kind, names):
    """They are ordered by number, or by the alphabet."""
    for split, images, given in (("train", TRAIN, LABELS), ("test", TEST, TEST_LABELS)):
        values = [labels[i] for i in given]
        write(tmp_path / f"{split}.parquet", table(images, values, None, kind, ("x", "kind")))
    wanted = [names.index(str(labels[i])) for i in LABELS]
    assert_loaded(load(f"huggingface:{tmp_path}"), names, wanted)


def test_options_of_folders_and_the_cache(tmp_path, monkeypatch):
    for split, images, labels in (("train", TRAIN, LABELS), ("test", TEST, TEST_LABELS)):
        write(tmp_path / "set" / f"{split}.parquet", table(images, labels))
    where = f"huggingface:{tmp_path / 'set'}"
    assert load(where, resize=6).train.images.shape == (6, 3, 6, 6)
    first = load(where, cache=str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr("selmatch_ext.data.folders.decode", None)
        assert load(where, cache=str(tmp_path / "cache")).train.digest() == first.train.digest()
    write(tmp_path / "set" / "train.parquet", table(TRAIN[::-1], LABELS[::-1]))
    assert load(where, cache=str(tmp_path / "cache")).train.digest() != first.train.digest()


def damaged(folder):
    """(what is wrong, with how to make it) of files in `folder`."""
    train = folder / "train.parquet"
    image = {"img": {"_type": "Image"}}
    two = {**FEATURES, "other": {"names": CLASSES, "_type": "ClassLabel"}}
    several = table(TRAIN, LABELS, two).append_column("other", pa.array(LABELS))
    return {
        "train.parquet is no table of images": lambda: train.write_bytes(train.read_bytes()[:-20]),
        "row 2 has the label -1; allowed are 0 to 2": lambda: write(train, table(TRAIN, [0, 1, -1, 0, 1, 2])),
        "row 0 has the label 3; allowed are 0 to 2": lambda: write(train, table(TRAIN, [3, 1, 1, 0, 1, 2])),
        "row 5 has no label": lambda: write(train, table(TRAIN, [0, 1, 2, 0, 1, None])),
        "its columns are img, a, b; it must have one of": lambda: write(
            train, table(TRAIN, LABELS, image, names=("img", "a")).append_column("b", pa.array(LABELS))
        ),
        "row 0 has no image inside the file": lambda: write(
            train, pa.table({"img": pa.array([{"bytes": None, "path": "a.png"}] * 6, IMAGE), "label": LABELS})
        ),
        "its columns are label; it must have one of encoded": lambda: write(train, pa.table({"label": LABELS})),
        "it has no column label": lambda: write(folder / "test.parquet", table(TEST, TEST_LABELS, names=("img", "y"))),
        "the class names is .*; it must be a list of strings": lambda: write(
            train, table(TRAIN, LABELS, {**image, "label": {"names": 3, "_type": "ClassLabel"}})
        ),
        "its metadata is no valid JSON": lambda: write(
            train, table(TRAIN, LABELS).replace_schema_metadata({"huggingface": "{"})
        ),
        "the train split has no images of class cat": lambda: write(train, table(TRAIN, [0, 1, 0, 1, 0, 1])),
        "has one class, dog": lambda: write(
            train, table(TRAIN, LABELS, {**image, "label": {"names": ["dog"], "_type": "ClassLabel"}})
        ),
        "train/00000001": lambda: write(
            train, pa.table({"img": pa.array([{"bytes": b"x", "path": None}] * 6, IMAGE), "label": LABELS})
        ),
        "has no training split, but test": lambda: train.unlink(),
        "rows were chosen by another file; call flatten_indices": lambda: (folder / "state.json").write_text(
            '{"_indices_data_files": [{"filename": "indices.arrow"}]}'
        ),
        "": lambda: write(train, several),
    }


@pytest.mark.parametrize("case", range(16))
def test_tables_that_cannot_be_read(tmp_path, case):
    for split, images, labels in (("train", TRAIN, LABELS), ("test", TEST, TEST_LABELS)):
        write(tmp_path / f"{split}.parquet", table(images, labels))
    cases = damaged(tmp_path)
    assert len(cases) == 16
    message, damage = list(cases.items())[case]
    damage()
    if not message:  # of several columns of classes the one called label
        return assert_loaded(load(f"huggingface:{tmp_path}"))
    with pytest.raises(
        ValueError, match=re.escape(message).replace(r"\.\*", ".*").replace("00000001", "0000000")
    ) as error:
        load(f"huggingface:{tmp_path}")
    assert tmp_path.name in str(error.value) or message.startswith("train/")


def test_a_folder_without_tables(tmp_path):
    with pytest.raises(ValueError, match="has no files that end in .parquet or .arrow"):
        load(f"huggingface:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(f"huggingface:{tmp_path / 'none'}")


def test_without_pyarrow(tmp_path, monkeypatch, capsys):
    write(tmp_path / "train.parquet", table(TRAIN, LABELS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    command = [
        "scores",
        "--data.dataset",
        f"huggingface:{tmp_path}",
        "--start.scores.source",
        "el2n",
        "--device",
        "cpu",
    ]
    assert cli.main([*command, "--out", str(tmp_path / "scores.npz")]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].endswith("needs the package pyarrow: pip install 'selmatch_ext[hf]'")


def test_some_classes_of_a_table(tmp_path):
    """In the order of the table's classes."""
    write(tmp_path / "train-0.parquet", table(TRAIN, LABELS))
    write(tmp_path / "test-0.parquet", table(TEST, TEST_LABELS))
    data = load(f"huggingface:{tmp_path}", classes=("cat", "dog"))
    assert data.class_names == ["dog", "cat"] and data.train.labels.tolist() == [1, 0, 0, 1]
    kept = [i for i, label in enumerate(LABELS) if label != 1]
    assert torch.equal(data.train.images.permute(0, 2, 3, 1), torch.from_numpy(TRAIN[kept]))
    assert data.full.kept.tolist() == kept and data.full.labels.tolist() == LABELS
