"""Files are whole or not there, and say what is wrong with them."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from selmatch_ext import files

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}


def temporaries(folder):
    return [p for p in folder.iterdir() if p.name.startswith(".") and p.name.endswith(".tmp")]


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "deep" / "er" / "x.safetensors"
    files.save_tensors(path, "thing", TENSORS, {"note": "hi"})
    tensors, metadata = files.load_tensors(path, "thing", "a", "b")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert metadata == {"note": "hi", "format": "selmatch_ext.thing", "version": "2"}
    assert list(path.parent.iterdir()) == [path]


def test_views_and_shared_memory_are_written(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "transposed": base.T, "row": base[1], "again": base, "empty": base[:0]}
    files.save_tensors(tmp_path / "x", "thing", tensors)
    loaded, _ = files.load_tensors(tmp_path / "x", "thing")
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)


def test_loaded_tensors_outlive_the_file(tmp_path):
    path = tmp_path / "x"
    files.save_tensors(path, "thing", TENSORS)
    tensors, _ = files.load_tensors(path, "thing")
    with open(path, "r+b") as file:  # in place, as nothing of ours does
        file.write(b"\xff" * os.path.getsize(path))
    assert torch.equal(tensors["a"], TENSORS["a"])


def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        files.save_tensors(tmp_path / "x", "thing", TENSORS)
        files.write_text(tmp_path / "y", "text")
    finally:
        os.umask(old)
    assert [(tmp_path / n).stat().st_mode & 0o777 for n in "xy"] == [0o640, 0o640]


def test_write_json(tmp_path):
    files.write_json(tmp_path / "r.json", {"β": [1, 2.5]})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"β": [1, 2.5]}
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "r.json", {"x": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"β": [1, 2.5]}


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    files.save_tensors(path, "thing", TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"x\.safetensors is truncated or is no safetensors file"):
        files.load_tensors(path, "thing")


def test_foreign_files(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="expected a selmatch_ext file of kind thing"):
        files.load_tensors(path, "thing")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        files.load_tensors(tmp_path, "thing")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"data" * 100)
    with pytest.raises(ValueError, match="is no safetensors file"):
        files.load_tensors(path, "thing")
    save_file(TENSORS, path)
    with pytest.raises(ValueError, match="not one of selmatch_ext's; expected kind thing"):
        files.load_tensors(path, "thing")
    files.save_tensors(path, "other", TENSORS)
    with pytest.raises(ValueError, match="is a selmatch_ext other file; expected kind thing"):
        files.load_tensors(path, "thing")
    save_file(TENSORS, path, metadata={"format": "selmatch_ext.thing", "version": "3"})
    with pytest.raises(ValueError, match="version 3; this selmatch_ext reads version 2"):
        files.load_tensors(path, "thing")
    files.save_tensors(path, "thing", TENSORS)
    with pytest.raises(ValueError, match="lacks c; the kind thing has a, c"):
        files.load_tensors(path, "thing", "a", "c")


def test_damaged_metadata_field(tmp_path):
    assert files.json_field({"a": "[1]"}, "a", "x") == [1]
    for metadata in ({}, {"a": "[1"}):
        with pytest.raises(ValueError, match="x: metadata field 'a' is missing or damaged"):
            files.json_field(metadata, "a", "x")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deep" / "x"):
        with pytest.raises(NotADirectoryError, match=r"cannot write .*file is a file, not a folder"):
            files.save_tensors(path, "thing", TENSORS)
    with pytest.raises(OSError, match="cannot write /proc/selmatch/x"):
        files.write_text("/proc/selmatch/x", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_whether_it_can_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(NotADirectoryError, match="cannot write .*file is a file, not a folder"):
        files.check_writable(tmp_path / "file" / "x")
    files.check_writable(tmp_path / "new" / "x")
    assert not list((tmp_path / "new").iterdir())


def test_damaged_json_names_the_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    assert files.read_json(path, "a") == {"a": 1}
    with pytest.raises(ValueError, match="x.json is damaged: it is no object with a, b"):
        files.read_json(path, "a", "b")
    for content in (b"", b'{"a": 1', b"\xff\xfe", b"[1]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.json is damaged"):
            files.read_json(path)


def test_target_is_a_folder(tmp_path):
    (tmp_path / "x" / "full").mkdir(parents=True)
    with pytest.raises(OSError, match="cannot write .*x: "):
        files.save_tensors(tmp_path / "x", "thing", TENSORS)
    assert (tmp_path / "x" / "full").is_dir() and not temporaries(tmp_path)


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.save_tensors(path, "thing", TENSORS)
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: files.save_tensors(path, "thing", {}), lambda: files.write_text(path, "text")):
        with pytest.raises(OSError, match="cannot write .*x: No space left on device") as caught:
            write()
        assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and not temporaries(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB; only where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here; the full disk is imitated in the test above")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_really_full_disk(small_disk):
    path = small_disk / "x"
    files.save_tensors(path, "thing", TENSORS)
    with pytest.raises(OSError, match="cannot write .*x: .*No space left on device"):
        files.save_tensors(path, "thing", {"a": torch.zeros(100_000)})
    with pytest.raises(OSError, match="cannot write .*x: No space left on device"):
        files.write_text(path, "x" * 200_000)
    assert files.load_tensors(path, "thing", "a")[0].keys() == TENSORS.keys()
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interruption_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x"
    files.write_text(path, "old")
    with pytest.raises(error), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folders_are_atomic_too(tmp_path):
    with files.atomic_write(tmp_path / "new") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "a").read_text() == "a"


WRITE_FOREVER = """
import sys, time
from pathlib import Path
from selmatch_ext.files import atomic_write
with atomic_write(sys.argv[1]) as temporary, open(temporary, "w") as file:
    file.write("half")
    file.flush()
    Path(sys.argv[1] + ".started").touch()
    time.sleep(60)
"""


def test_killed_while_writing(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(path)])
    started, deadline = tmp_path / "x.started", time.monotonic() + 60
    while not started.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    files.write_text(path, "newer")  # the other writer still lives: its temporary file stays
    assert len(temporaries(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "newer"
    (left,) = temporaries(tmp_path)
    assert left.name.startswith(".x.")
    files.write_text(tmp_path / "y", "another target")
    assert temporaries(tmp_path) == [left]
    files.write_text(path, "newest")
    assert path.read_text() == "newest" and not temporaries(tmp_path)


def test_what_killed_writers_left_is_removed_from_a_whole_folder(tmp_path):
    (tmp_path / "a").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for folder, pid in ((tmp_path, dead.pid), (tmp_path / "a", dead.pid), (tmp_path / "a", os.getpid())):
        (folder / f".x.{files._host()}-{pid}-ab.tmp").mkdir()
    files.remove_abandoned(tmp_path)
    assert not temporaries(tmp_path) and [p.name.split("-")[-2] for p in temporaries(tmp_path / "a")] == [
        str(os.getpid())
    ]


def test_the_same_content_is_the_same_file(tmp_path):
    """safetensors alone writes metadata in a random order."""
    metadata = {name: f'"é\x01\\{name}\U0001f600' for name in "fbdace"}
    contents = set()
    for _ in range(8):
        files.save_tensors(tmp_path / "x", "thing", TENSORS, metadata)
        contents.add((tmp_path / "x").read_bytes())
    tensors, found = files.load_tensors(tmp_path / "x", "thing")
    assert len(contents) == 1 and metadata.items() <= found.items()
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())


def test_foreign_temporaries_do_not_disturb(tmp_path):
    for name in (".x.elsewhere-1-ab.tmp", f".x.{files._host()}-nonsense.tmp", ".x.tmp"):
        (tmp_path / name).mkdir()
    files.write_text(tmp_path / "x", "text")
    assert len(list(tmp_path.iterdir())) == 4
