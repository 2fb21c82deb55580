"""Image folders as people have them: links, other files, class names of any bytes, sets without a test split."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_set
from image_files import encoded, pattern, plain, write_set

from selmatch_ext import cli, report
from selmatch_ext.data import folders
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.load import load, load_data
from selmatch_ext.data.names import readable, unique_names
from selmatch_ext.settings import Data


def said(caplog):
    return [record.getMessage() for record in caplog.records]


# links and other files


def test_links_that_lead_back_are_visited_once(tmp_path, caplog):
    root = write_set(tmp_path / "s", plain)
    (root / "train/cat/more").symlink_to("..")
    (root / "train/cat/self").symlink_to(".")
    (root / "train/top").symlink_to(root)
    data = load(f"imagefolder:{root}")
    assert len(data.train) == 6 and data.class_names == ["cat", "dog"]
    assert said(caplog) == ["s: skipped 3 files: 3 looping"]


def test_links_to_elsewhere_are_followed(tmp_path, caplog):
    root = write_set(tmp_path / "s", plain)
    pool = write_set(tmp_path / "pool", lambda label, index: plain(5 + label, index))
    for split in ("train", "test"):
        (root / split / "cow").symlink_to(pool / split / "cat")
    (root / "train/cat/linked.png").symlink_to(pool / "train/dog/1.png")
    data = load(f"imagefolder:{root}")
    assert data.class_names == ["cat", "cow", "dog"] and len(data.train) == 10 and len(data.test) == 6
    assert torch.equal(data.train.images[3], torch.from_numpy(pattern(601)).permute(2, 0, 1))
    assert not caplog.records


def test_a_folder_that_many_links_lead_to_is_visited_once(tmp_path):
    root = write_set(tmp_path / "s", plain)
    for i in range(20):
        (root / f"train/cat/d{i}").mkdir()
        for name in "ab":
            (root / f"train/cat/d{i}/{name}").symlink_to(f"../d{i + 1}")
    (root / "train/cat/d20").mkdir()
    (root / "train/cat/d20/x.png").write_bytes(plain(0, 9))
    assert len(load(f"imagefolder:{root}").train) == 7


def test_what_is_skipped_is_said_in_one_line(tmp_path, caplog):
    root = write_set(tmp_path / "s", plain)
    for name in ("a.txt", "b.TXT", "c.heic", "README", ".hidden.png", "._0.png", "Thumbs.db", ".DS_Store"):
        (root / "train/cat" / name).write_bytes(b"x")
    (root / "train/cat/gone.png").symlink_to("nowhere")
    (root / "train/cat/ring.png").symlink_to("ring.png")
    os.mkfifo(root / "train/cat/pipe.png")
    (root / "train/.net").mkdir()
    (root / "train/loose.png").write_bytes(plain(0, 0))
    assert len(load(f"imagefolder:{root}").train) == 6
    assert said(caplog) == [
        "s: skipped 10 files: 2 .txt, 2 dangling, 2 hidden, 1 .heic, 1 outside class folders, 1 special, "
        "1 without extension"
    ]


def test_skipped_files_are_said_when_nothing_else_is_there(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.heic").touch()
    with pytest.raises(ValueError, match=r"no images under train/CLASS/ \(skipped 2 files: 2 .heic"):
        load(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".Png", ".gif", ".tga", ".BMP", ".webp"])
def test_extensions_that_pillow_reads(tmp_path, suffix, caplog):
    format = {".jfif": "jpeg", ".JPE": "jpeg"}.get(suffix, suffix[1:].lower())
    root = write_set(tmp_path / "s", plain)
    (root / f"train/cat/z{suffix}").write_bytes(encoded(pattern(1), format))
    assert len(load(f"imagefolder:{root}").train) == 7 and not caplog.records


def test_a_file_without_permission_says_so(tmp_path, monkeypatch):
    root = write_set(tmp_path / "s", plain)
    read = Path.read_bytes

    def denied(path):  # as for a file of mode 0, which root can read all the same
        if path == root / "train/cat/1.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(PermissionError, match="Permission denied: '.*train/cat/1.png'"):
        load(f"imagefolder:{root}")


# sets that cannot work


def test_images_that_do_not_differ(tmp_path):
    same = encoded(np.full((6, 5, 3), 128, np.uint8))
    root = write_set(tmp_path / "s", lambda label, index: same)
    with pytest.raises(ValueError, match="s: the 6 training images do not differ"):
        load(f"imagefolder:{root}", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    (root / "train/dog/2.png").write_bytes(plain(0, 0))
    assert len(load(f"imagefolder:{root}").train) == 6


def test_one_class(tmp_path):
    with pytest.raises(ValueError, match="s has one class, cat; at least two are needed"):
        load(f"imagefolder:{write_set(tmp_path / 's', plain, names=('cat',))}")


# class names


NAMES = {
    "no UTF-8": os.fsdecode(b"caf\xe9"),
    "dollar": "gain $\\alpha$ up",
    "open formula": "price $5_{a}",
    "newline": "two\nlines",
    "escape": "red\x1b[31m",
    "long": "x" * 255,
    "emoji": "🐱",
    "quotes": "\"a' b",
    "underscore": "_a",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_class_names_of_any_bytes(tmp_path, name):
    """From the folder through a set's file, both kinds of pictures, the exported folder, and JSON."""
    root = write_set(tmp_path / "s", plain, names=(name, "tea"))
    data = load(f"imagefolder:{root}", cache=tmp_path / "cache")
    assert load(f"imagefolder:{root}", cache=tmp_path / "cache").class_names == data.class_names
    shown = readable(name)
    assert shown.isprintable() and sorted(data.class_names) == sorted([shown, "tea"])
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    path = tmp_path / "r.safetensors"
    random_set(data, 2).save(path)
    subset = DistilledSet.load(path)
    assert subset.class_names == data.class_names and json.loads(json.dumps(data.class_names)) == data.class_names
    assert cli.main(["report", str(path), "--out", str(tmp_path / "all.png")]) == 0
    assert cli.main(["report", str(path), "--out", str(tmp_path / "each")]) == 0
    assert cli.main(["export", str(path), "--out", str(tmp_path / "export")]) == 0
    assert len(list((tmp_path / "each").iterdir())) == len(list((tmp_path / "export").iterdir())) == 2


def test_dollars_are_drawn_as_they_are(tmp_path):
    """A formula would not be as wide as its text."""
    as_text, as_formula, letter = (report._text_width(text, 40) for text in (report._shown("$a$"), "$a$", "a"))
    assert as_formula < 1.5 * letter and as_text > 2.5 * letter
    assert report._shown("x" * 1000).startswith("x" * 30 + " … ") and len(report._shown("x" * 1000)) < 70
    assert report._shown(r"a\$b") == r"a\\$b"


def test_names_stay_different():
    names = [os.fsdecode(b"caf\xe9"), r"caf\xe9", "caf\\xe9 (2)", "a"]
    assert unique_names(names) == [r"caf\xe9", r"caf\xe9 (2)", r"caf\xe9 (2) (2)", "a"]
    assert readable("\ud800\u2028\t\x7f é猫") == "\\ud800\\u2028\\x09\\x7f é猫"


def test_tables_take_any_name():
    rows = [["set", "accuracy"], *([name, "1"] for name in NAMES.values())]
    for text in (report.table(rows), report.markdown(rows)):
        assert len(text.encode().splitlines()) == len(NAMES) + 2


def test_every_picture_takes_any_name(tmp_path):
    names = [*NAMES.values(), "", " ", "\ud800"]
    for function, arguments in (
        (report.plot_bars, ({n: {m: (1.0, 0.1) for m in names} for n in names}, tmp_path / "a.png", "$y_{")),
        (report.plot_curves, ({n: {1.0: (1.0, 0.1)} for n in names}, tmp_path / "b.png", "x", "y")),
        (report.plot_ranking, ({n: (1.0, 2.0) for n in names}, tmp_path / "c.png", "a\udce9 $")),
        (
            report.plot_coverage,
            ({n: {"iterations": [1], "all": [1], "easy": [1], "hard": [1]} for n in names}, tmp_path / "d.png"),
        ),
    ):
        function(*arguments)
    assert len(list(tmp_path.iterdir())) == 4


# a split that is not there


@pytest.mark.parametrize("below", ["train", ""])
def test_test_share_of_each_class(tmp_path, below):
    sizes = {"cat": 10, "cow": 3, "dog": 5}
    for label, (name, size) in enumerate(sizes.items()):
        for index in range(size):
            path = tmp_path / "s" / below / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plain(label, index))
    spec = f"imagefolder:{tmp_path}/s"
    with pytest.raises(ValueError, match="test_share"):
        load(spec)
    with pytest.raises(ValueError, match="for the images in that path write imagefolder:"):
        load(f"{tmp_path}/s")
    data = load(spec, test_share=0.2, cache=tmp_path / "cache")
    assert torch.bincount(data.test.labels).tolist() == [2, 1, 1] and torch.bincount(data.train.labels).tolist() == [
        8,
        2,
        4,
    ]
    assert not set(data.train.paths) & set(data.test.paths) and data.train.paths == sorted(data.train.paths)
    again, other = load(spec, test_share=0.2), load(spec, test_share=0.2, seed=1, cache=tmp_path / "cache")
    assert again.test.paths == data.test.paths != other.test.paths
    assert len(list((tmp_path / "cache").iterdir())) == 2
    settings = Data(dataset=spec, test_share=0.2)
    assert load_data(settings, 0).test.paths == data.test.paths
    assert load_data(settings, 1).test.paths == other.test.paths


def test_test_share_is_left_alone_where_there_is_a_test_split(tmp_path):
    root = write_set(tmp_path / "s", plain)
    assert load(f"imagefolder:{root}", test_share=0.5).test.paths == load(f"imagefolder:{root}").test.paths


def test_wrong_test_share(tmp_path):
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="test_share is .*; allowed is above 0 to below 1"):
            load("imagefolder:none", test_share=wrong)
        with pytest.raises(ValueError, match="test_share is .*;"):
            Data(test_share=wrong)
    with pytest.raises(ValueError, match="test_share is 0.5, but digits does not use it"):
        load("digits", test_share=0.5)
    write_set(tmp_path / "s", plain, counts=(("train", 1),))
    with pytest.raises(ValueError, match="test_share 0.5 of the 1 images of class cat leaves none to train on"):
        load(f"imagefolder:{tmp_path}/s", test_share=0.5)


def test_the_cache_says_again_what_was_skipped(tmp_path, caplog):
    root = write_set(tmp_path / "s", lambda a, b: encoded(pattern(9 * a + b, channels=1, top=1000)))
    (root / "train/cat/a.txt").touch()
    first = load(f"imagefolder:{root}", cache=tmp_path / "cache")
    spoken = said(caplog)
    caplog.clear()
    moved = tmp_path / "elsewhere" / "s"
    moved.parent.mkdir()
    root.rename(moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "decode", None)  # nothing is decoded
        again = load(f"imagefolder:{moved}", cache=tmp_path / "cache")
    assert len(spoken) == 2 and said(caplog) == spoken
    assert (again.train.digest(), again.name) == (first.train.digest(), first.name)
