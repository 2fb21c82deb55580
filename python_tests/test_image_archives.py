"""Archives of images: links, separators, junk, and archives that declare or unpack to more than they should."""

import bz2
import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from image_files import encoded, pattern, plain

from selmatch_ext.data import archives
from selmatch_ext.data.load import load


def files(prefix=""):
    """(path, content) of a small set."""
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                yield f"{prefix}{split}/{name}/{index}.png", plain(label, index if split == "train" else 50 + index)


def add(tar, name, content=b"", kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, target
    tar.addfile(member, io.BytesIO(content))


def write_tar(path, *more, prefix="", mode="w"):
    """A tar of the small set, and of further members (name, content, kind, target)."""
    with tarfile.open(path, mode) as tar:
        for name, content in files(prefix):
            add(tar, name, content)
        for member in more:
            add(tar, *member)
    return path


def write_zip(path, *more, separator="/", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in [*files(), *more]:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name.replace("/", separator), method
            archive.writestr(info, content)
    return path


def symlink(name, target):
    return name, b"", tarfile.SYMTYPE, target


def hard_link(name, target):
    return name, b"", tarfile.LNKTYPE, target


def add_zip_link(path, name, target):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, target)


# what links lead to


def test_links_to_members_are_images(tmp_path, caplog):
    path = write_tar(
        tmp_path / "s.tar.gz",
        hard_link("./pets/train/cat/h.png", "pets/train/cat/0.png"),
        symlink("pets/train/cat/s.png", "../dog/1.png"),
        symlink("pets/train/cat/t.png", "s.png"),
        symlink("pets/train/cat/u.png", "../../../store/abc"),
        ("store/abc", plain(7, 7)),
        symlink("pets/train/cow", "../../pool"),
        symlink("pets/test/cow", "../train/cow"),
        ("pool/0.png", plain(3, 0)),
        ("pool/deep/1.png", plain(3, 1)),
        prefix="pets/",
        mode="w:gz",
    )
    data = load(f"imagefolder:{path}")
    names = [p.removeprefix("train/") for p in data.train.paths]
    assert names[:7] == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/h.png", "cat/s.png", "cat/t.png", "cat/u.png"]
    assert names[7:] == ["cow/0.png", "cow/deep/1.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    images = dict(zip(names, data.train.images, strict=True))
    for link, target in (("cat/h.png", "cat/0.png"), ("cat/s.png", "dog/1.png"), ("cat/t.png", "dog/1.png")):
        assert torch.equal(images[link], images[target])
    expected = torch.from_numpy(pattern(707)).permute(2, 0, 1)
    assert torch.equal(images["cat/u.png"], expected)
    assert data.class_names == ["cat", "cow", "dog"] and len(data.test) == 6
    assert not caplog.records


@pytest.mark.parametrize(
    "link",
    [
        symlink("train/cat/x.png", "/etc/hostname"),
        symlink("train/cat/x.png", "../../../outside.png"),
        symlink("train/cat/x.png", "nowhere.png"),
        symlink("train/cat/x.png", "x.png"),
        hard_link("train/cat/x.png", "train/cat/x.png"),
        hard_link("train/cat/x.png", "../../etc/hostname"),
    ],
)
def test_links_that_lead_nowhere_are_counted(tmp_path, caplog, link):
    data = load(f"imagefolder:{write_tar(tmp_path / 's.tar', link)}")
    assert len(data.train) == 6
    assert [r.getMessage() for r in caplog.records] == ["s: skipped 1 file: 1 dangling"]


def test_links_in_a_circle(tmp_path, caplog):
    links = [symlink("train/cat/a.png", "b.png"), symlink("train/cat/b.png", "a.png"), symlink("train/cat/up", "..")]
    links += [symlink("train/top", ".."), symlink("train/cat/self", "."), ("../train/cat/z.png", plain(0, 9))]
    data = load(f"imagefolder:{write_tar(tmp_path / 's.tar', *links)}")
    assert len(data.train) == 6 and data.class_names == ["cat", "dog"]
    assert [r.getMessage() for r in caplog.records] == [
        "s: skipped 6 files: 3 looping, 2 dangling, 1 with .. in the path"
    ]


def test_links_that_multiply_are_visited_once(tmp_path):
    """Each of 30 folders has two links to the next: 2^30 ways to the last."""
    links = [symlink(f"train/cat/d{i}/{name}", f"../d{i + 1}") for i in range(30) for name in "ab"]
    path = write_tar(tmp_path / "s.tar", *links, ("train/cat/d30/x.png", plain(0, 9)))
    assert len(load(f"imagefolder:{path}").train) == 7


def test_links_in_a_zip(tmp_path, caplog):
    path = write_zip(tmp_path / "s.zip")
    for name, target in (("a.png", "0.png"), ("b.png", "../dog/1.png"), ("c.png", "/etc/hostname"), ("d.png", "d.png")):
        add_zip_link(path, f"train/cat/{name}", target)
    data = load(f"imagefolder:{path}")
    assert data.train.paths[3:5] == ["train/cat/a.png", "train/cat/b.png"] and len(data.train) == 8
    assert torch.equal(data.train.images[4], data.train.images[6])
    assert [r.getMessage() for r in caplog.records] == ["s: skipped 2 files: 2 dangling"]


# names


@pytest.mark.parametrize("mixed", [False, True])
def test_zip_with_backslashes(tmp_path, mixed):
    more = [("train/cat/9.png", plain(0, 9))] if mixed else []
    path = write_zip(tmp_path / "s.zip", separator="\\")
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in more:
            archive.writestr(name, content)
    data = load(f"imagefolder:{path}")
    assert data.class_names == ["cat", "dog"] and len(data.train) == 6 + mixed and len(data.test) == 4


def test_a_backslash_in_a_name_stays(tmp_path):
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files():
            archive.writestr(name.replace("cat", r"ca\t"), content)
    assert load(f"imagefolder:{path}").class_names == [r"ca\t", "dog"]


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in files():
            add(tar, name.replace("cat", os.fsdecode(b"caf\xe9")), content)
    assert load(f"imagefolder:{path}").class_names == [r"caf\xe9", "dog"]


def test_what_macos_and_windows_add_is_passed_over_in_silence(tmp_path, caplog):
    junk = [(f"{name}", b"junk") for name in ("__MACOSX/train/cat/._0.png", "train/cat/._0.png", "train/.DS_Store")]
    junk += [("train/cat/Thumbs.db", b"junk"), ("train/cat/desktop.ini", b"junk")]
    assert len(load(f"imagefolder:{write_zip(tmp_path / 's.zip', *junk)}").train) == 6
    assert len(load(f"imagefolder:{write_tar(tmp_path / 's.tar', *junk)}").train) == 6
    assert not caplog.records


def test_the_last_member_of_a_name_counts(tmp_path):
    data = load(f"imagefolder:{write_tar(tmp_path / 's.tar', ('train/cat/0.png', plain(9, 9)))}")
    assert torch.equal(data.train.images[0], torch.from_numpy(pattern(909)).permute(2, 0, 1)) and len(data.train) == 6


def test_class_folders_without_splits(tmp_path):
    path = tmp_path / "s.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files():
            if name.startswith("train"):
                add(tar, name.replace("train", "outer/inner"), content)
    data = load(f"imagefolder:{path}", test_share=0.34)
    assert data.class_names == ["cat", "dog"] and len(data.train) == 4 and len(data.test) == 2


# declared sizes


def header(name, size, kind):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def sparse_header(name, size):
    """The old GNU header of a file of `size` bytes of which 512 are stored."""
    block = bytearray(header(name, 512, tarfile.GNUTYPE_SPARSE))
    block[386:398], block[398:410], block[483:495] = b"%011o\0" % 0, b"%011o\0" % 512, b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


DECLARED = {
    "sparse": (sparse_header("train/cat/z.png", 3 << 30), "is a sparse file of 3.2 GB; no image is one"),
    "file": (header("train/cat/z.png", 8 << 30, tarfile.REGTYPE), "train/cat/z.png declares 8.6 GB, more than it has"),
    "name": (header("x", 8 << 30, tarfile.GNUTYPE_LONGNAME), "a header declares 8589934592 bytes"),
    "pax": (header("x", 8 << 30, tarfile.XHDTYPE), "a header declares 8589934592 bytes"),
}
PEAK = """
import resource, sys
from selmatch_ext.data.load import load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load("imagefolder:" + path)
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_sparse_files_that_are_no_images_are_passed_over(tmp_path, caplog):
    path = write_tar(tmp_path / "s.tar")
    block = sparse_header("train/cat/notes.txt", 3 << 30)
    path.write_bytes(block + path.read_bytes())
    assert len(load(f"imagefolder:{path}").train) == 6
    assert [r.getMessage() for r in caplog.records] == ["s: skipped 1 file: 1 .txt"]


def test_declared_sizes_take_no_memory(tmp_path):
    """One process for all of them: what its memory grows by is their most."""
    paths = []
    for name, (block, _) in DECLARED.items():
        path = write_tar(tmp_path / f"{name}.tar")
        content = path.read_bytes().rstrip(b"\0")
        content += bytes(-len(content) % 512) + block + bytes(1024)
        path.write_bytes(content)
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(content))
        paths += [path, tmp_path / f"{name}.tar.gz"]
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, timeout=120)
    *lines, peak = done.stdout.splitlines()
    assert int(peak) < 100, done.stdout
    for line, path in zip(lines, paths, strict=True):
        expected = DECLARED[path.name.split(".")[0]][1]
        if path.name == "file.tar.gz":
            expected = "it unpacks to more than 1.1 GB"
        assert line.startswith(str(path)) and expected in line


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_archives_that_unpack_to_more_than_they_should(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(archives, "ALLOWANCE", 1 << 20)
    content = write_tar(tmp_path / "s.tar").read_bytes() + bytes(50 << 20)
    path = tmp_path / "s.tar.gz"
    path.write_bytes(compress(content))
    with pytest.raises(ValueError, match="s.tar.gz: it unpacks to more than"):
        load(f"imagefolder:{path}")


def test_large_members_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_OF_A_FILE", 10_000)
    monkeypatch.setattr(archives.zipfile.ZipFile, "open", None)
    monkeypatch.setattr(archives, "_zip_read", lambda archive, info: b"")
    large = ("train/cat/z.png", bytes(20_000))
    for path in (
        write_tar(tmp_path / "a.tar", large),
        write_tar(tmp_path / "b.tar.xz", large, mode="w:xz"),
    ):
        with pytest.raises(ValueError, match="train/cat/z.png unpacks to 20.0 KB; allowed are 10.0 KB for an image"):
            load(f"imagefolder:{path}")
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MOST_OF_A_FILE", 10_000)
    path = write_zip(tmp_path / "c.zip", large, ("train/cat/notes.txt", bytes(50_000)), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="train/cat/z.png unpacks to 20.0 KB"):
        load(f"imagefolder:{path}")


def test_more_than_the_memory_that_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "available_memory", lambda: 600)
    for path in (write_tar(tmp_path / "s.tar"), write_zip(tmp_path / "s.zip")):
        with pytest.raises(ValueError, match="its images take more than the 600 bytes of memory that are free"):
            load(f"imagefolder:{path}")


def test_zip_members_that_hold_more_than_they_declare(tmp_path):
    path = write_zip(tmp_path / "s.zip", ("train/cat/z.png", bytes(1 << 20)), method=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 100)))
    with pytest.raises(ValueError, match="s.zip is truncated or is no archive"):
        load(f"imagefolder:{path}")


def test_zips_that_are_not_read(tmp_path):
    path = write_zip(tmp_path / "s.zip", method=zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="train/cat/0.png is not packed by deflate; unpack the archive"):
        load(f"imagefolder:{path}")
    path = write_zip(tmp_path / "t.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the flag in the first member's entry of the central directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train/cat/0.png is encrypted"):
        load(f"imagefolder:{path}")


def test_damaged_image_in_an_archive_is_named(tmp_path):
    content = encoded(pattern(1))[:60]
    with pytest.raises(ValueError, match="train/cat/z.png is not a readable image"):
        load(f"imagefolder:{write_tar(tmp_path / 's.tar', ('train/cat/z.png', content))}")


def test_archives_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(ValueError, match="s.tar is not a regular file"):
        load(f"imagefolder:{tmp_path}/s.tar")
