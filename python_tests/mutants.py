"""Damages files of every kind that the package reads, and reads them: python mutants.py FOLDER SEED SECONDS.

Prints counts as JSON. A file that is read must hold what the original held; anything else must end in one documented
error of one line. Ends with status 1 and the seed and number of each mutant that does not.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from selmatch_ext import evaluation, files, provenance
from selmatch_ext.context import Context
from selmatch_ext.data import folders
from selmatch_ext.data.distilled import DistilledSet, Schedule
from selmatch_ext.data.images import ImageData, ImageSplit
from selmatch_ext.data.trajectories import ExpertStore, import_replay_buffer
from selmatch_ext.data.whitening import fit_whitening
from selmatch_ext.methods.checkpoint import Checkpoint
from selmatch_ext.runner import Run
from selmatch_ext.selection import features
from selmatch_ext.selection.scores import describe_scores, load_scores
from selmatch_ext.settings import Features, Training

DOCUMENTED = (ValueError, TypeError, OSError)
MEMORY = 2**30
CPU = torch.device("cpu")
SETTINGS = {"model": "MLP", "lr": 0.5, "sizes": [1, 2], "window": {"ipc": 2, "beta": None}}
RECORD = {"settings": SETTINGS, "seed": 0, "data": "small", "images": {"test": "ab12"}}
RECORD |= {"accuracies": [[50.0, 25.5], [75.25, 99.0], [0.0, 100.0]]}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_data():
    images = (noise(12, 1, 4, 4) * 50 + 128).clamp(0, 255).to(torch.uint8)
    split = ImageSplit(images, torch.arange(12) % 3, [f"train/{i}.png" for i in range(12)])
    return ImageData("small", split, split, ["a", "b", "c"])


DATA = small_data()


class Kind:
    """A kind of file: `make` writes it, `read` returns what identifies its content. exact: whether a damaged file that
    is read must have the same content, which only a format with checksums can promise."""

    exact = True

    def __init__(self, folder):
        self.folder, self.path = folder, folder / self.file
        folder.mkdir()
        self.make()
        self.content = self.path.read_bytes()
        self.original = self.read()


class PlainSet(Kind):
    file = "set.safetensors"
    extra: dict = {}

    def make(self):
        labels = torch.softmax(noise(6, 3), 1)
        fields = {"mean": DATA.mean, "std": DATA.std, "class_names": ["a", "b", "c"], "method": "mtt"}
        fields |= {"lr": 0.01, "settings": SETTINGS, "indices": torch.arange(6)}
        DistilledSet(noise(6, 1, 4, 4), labels, torch.arange(6) > 2, **{**fields, **self.extra}).save(self.path)

    def read(self):
        s = DistilledSet.load(self.path)
        s.denormalized()
        return s.digest(), s.indices.tolist(), s.lr, s.class_names, s.method, s.settings


class ScheduledSet(PlainSet):
    extra = {"schedule": Schedule(torch.full((2,), 0.1), torch.arange(6).view(2, 3), "MLP", noise(1, 7))}


class WhitenedSet(PlainSet):
    extra = {"whitening": fit_whitening(DATA.normalize(DATA.train.images))}


class Experts(Kind):
    file = "expert_0000.safetensors"

    def make(self):
        ExpertStore(self.folder).save(0, noise(4, 30), {**SETTINGS, "dataset": "small"})

    def read(self):
        store = ExpertStore(self.folder)
        store.check_alike()
        return store.metadata, store.model, [store.row(0, epoch).tolist() for epoch in range(store.epochs + 1)]


class CheckpointFile(Kind):
    file = "checkpoint.safetensors"

    def _method(self):
        learned = {"images": noise(3, 4).requires_grad_(), "lr": torch.tensor(0.5, requires_grad=True)}
        method = types.SimpleNamespace(name="toy", learned=learned, state={"count": torch.tensor([1, 2])})
        return method, torch.optim.Adam(list(learned.values()))

    def make(self):
        method, optimizer = self._method()
        for t in method.learned.values():
            t.grad = torch.ones_like(t)
        optimizer.step()
        Checkpoint(self.path, SETTINGS).save(method, optimizer, [0.5, 0.25])

    def read(self):
        method, optimizer = self._method()
        losses = Checkpoint(self.path, SETTINGS).restore(method, optimizer)
        tensors = {**method.learned, **method.state}
        kept = {f"{n}.{k}": v.tolist() for n, t in method.learned.items() for k, v in optimizer.state[t].items()}
        return losses, {name: t.tolist() for name, t in tensors.items()}, kept


class NetworkCache(Kind):
    file = "network_0.safetensors"
    settings = Features(model="ConvNetD1W4BN", strategy="none", training=Training(epochs=1))

    def make(self):
        features.trained_networks(Context(DATA), self.settings, self.folder)

    def read(self):
        model = features._load(Context(DATA), self.settings, self.folder, 0)
        return {name: t.tolist() for name, t in model.state_dict().items()}


class ImageCache(Kind):
    file = "images.safetensors"

    def make(self):
        folders._write_cache(self.path, DATA, [])

    def read(self):
        data = folders._read_cache(self.path, "small")
        paths = data.train.paths, data.test.paths
        return data.train.digest(), data.test.digest(), paths, data.class_names, data.mean.tolist(), data.std.tolist()


class ScoresNpz(Kind):
    file = "scores.npz"

    def make(self):
        how = json.dumps({"images": "ab", "seed": 0})
        np.savez(self.path, scores=noise(12).numpy(), labels=DATA.train.labels.numpy(), how=how)

    def read(self):
        return describe_scores(self.path), load_scores(self.path, DATA.train.labels, DATA.name).tolist()


class CompressedScores(ScoresNpz):
    def make(self):
        np.savez_compressed(self.path, scores=noise(12).numpy(), labels=DATA.train.labels.numpy())


class ScoresNpy(Kind):
    file, exact = "scores.npy", False

    def make(self):
        np.save(self.path, noise(12).numpy())

    def read(self):
        assert load_scores(self.path, DATA.train.labels, DATA.name).isfinite().all()


class Record(Kind):
    file, exact = "evaluation.json", False

    def make(self):
        files.write_json(self.path, RECORD)

    def read(self):
        header = {key: value for key, value in RECORD.items() if key != "accuracies"}
        with contextlib.redirect_stdout(io.StringIO()):  # says when the data set has another name
            rows = evaluation._recorded(self.path, header, 3, 2)
        assert len(rows) <= 3 and all(len(row) == 2 and all(0 <= v <= 100 for v in row) for row in rows)


class SettingsFile(Kind):
    file, exact = "settings.json", False

    def make(self):
        files.write_json(self.path, SETTINGS)

    def read(self):
        assert all("\n" not in line for line in provenance.other_settings(self.folder, SETTINGS))


class RunSettings(Kind):
    file, exact = "settings.json", False

    def make(self):
        files.write_json(self.path, provenance.to_dict(Run.of("dm")))

    def read(self):
        return provenance.to_dict(Run.load(self.folder))


class ReplayBuffer(Kind):
    file, new_format = "replay_buffer_0.pt", True

    def make(self):
        shapes = [p.shape for p in self._network().parameters()]
        experts = [[[noise(*s, seed=7 * i + e) for s in shapes] for e in range(3)] for i in range(2)]
        torch.save(experts, self.path, _use_new_zipfile_serialization=self.new_format)

    def _network(self):
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))

    def read(self):
        try:
            store = import_replay_buffer(self.path, self.folder / "store", self._network(), {"model": "x"})
            return [[store.row(i, e).tolist() for e in range(store.epochs + 1)] for i in range(store.count)]
        finally:
            shutil.rmtree(self.folder / "store", ignore_errors=True)


class LegacyReplayBuffer(ReplayBuffer):
    new_format, exact = False, False


KINDS = [PlainSet, ScheduledSet, WhitenedSet, Experts, CheckpointFile, NetworkCache, ImageCache, ScoresNpz]
KINDS += [CompressedScores, ScoresNpy, Record, SettingsFile, RunSettings, ReplayBuffer, LegacyReplayBuffer]
ODD = ["null", "NaN", "-Infinity", "1e999", "-1", "true", '""', "[]", "{}", "[" * 5000, "[[0]]", "9" * 5000, "1e30"]


def flip_bits(content, draw, kind):
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def truncate(content, draw, kind):
    return content[: draw.randrange(len(content))]


def lengthen(content, draw, kind):
    return content + draw.randbytes(draw.randint(1, 200))


def overwrite(content, draw, kind):
    """A few bytes by zeros, ones or anything, as sizes and offsets in headers may be."""
    at, length = draw.randrange(len(content)), draw.choice([1, 2, 4, 8, 64])
    return (
        content[:at] + draw.choice([b"\0" * length, b"\xff" * length, draw.randbytes(length)]) + content[at + length :]
    )


def swap_blocks(content, draw, kind):
    length = draw.choice([4, 16, 64])
    a, b = (draw.randrange(max(1, len(content) - length)) for _ in range(2))
    content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]
    return content


def change_digits(content, draw, kind):
    """Numbers in texts: shapes, offsets, values, checksums."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57] or [0]
    for place in draw.sample(places, min(len(places), draw.randint(1, 3))):
        content[place] = 48 + draw.randrange(10)
    return content


def odd_number(content, draw, kind):
    """A number or string of a text in JSON replaced by something odd; the length of a safetensors header follows."""
    tensors = kind.file.endswith(".safetensors")
    if not tensors and not kind.file.endswith(".json"):
        return flip_bits(content, draw, kind)
    size = int.from_bytes(content[:8], "little") if tensors else len(content)
    head = bytes(content[8 : 8 + size] if tensors else content).decode()
    starts = [i for i, c in enumerate(head) if c in "0123456789" and not head[i - 1].isalnum()]
    at = draw.choice(starts)
    end = next((i for i in range(at, len(head)) if head[i] not in "0123456789.e-"), len(head))
    odd = draw.choice(ODD)
    head = (head[:at] + odd + head[end:]).encode()
    return len(head).to_bytes(8, "little") + head + content[8 + size :] if tensors else bytearray(head)


def edit_header(content, draw, kind):
    """Two tensors of a safetensors file exchanged, or one with another name, type or shape, or metadata exchanged."""
    if not kind.file.endswith(".safetensors"):
        return overwrite(content, draw, kind)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata, names = header["__metadata__"], [name for name in header if name != "__metadata__"]
    a, b = draw.choice(names), draw.choice(names)
    what = draw.randrange(6)
    if what == 0:
        header[a], header[b] = header[b], header[a]
    elif what == 1:
        header[draw.choice(["x", a + "2", "losses"])] = header.pop(a)
    elif what == 2:
        header[a]["dtype"] = draw.choice(["F32", "I32", "U8", "F64", "F16", "BF16", "BOOL", "I64", "F8_E4M3", "C64"])
    elif what == 3:
        header[a]["shape"] = draw.choice(
            [header[a]["shape"][::-1], [1, *header[a]["shape"]], [10**12, 10**9], [0], [-1]]
        )
    elif what == 4:
        metadata[draw.choice(sorted(metadata))] = metadata[draw.choice(sorted(metadata))]
    else:
        metadata.pop(draw.choice(sorted(metadata)))
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + content[8 + size :]


def forge(content, draw, kind):
    """A file with right checksums, as `save_tensors` would write it of other tensors or metadata."""
    if not kind.file.endswith(".safetensors"):
        return change_digits(content, draw, kind)
    kind.path.write_bytes(kind.content)
    form = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["format"]
    name = form.removeprefix(files.FORMAT)
    tensors, metadata = files.load_tensors(kind.path, name)
    key = draw.choice(sorted(tensors))
    t = tensors[key]
    changed = [
        t.double(),
        t[None],
        t.flatten()[:1],
        t.flatten()[:0],
        t.float() * float("nan"),
        t.float() - 1e6,
        t.to(torch.cfloat),
    ]
    tensors[key] = draw.choice(
        [*changed, t.to(torch.uint8), t.expand(2, *t.shape), tensors[draw.choice(sorted(tensors))]]
    )
    if draw.random() < 0.2:
        del tensors[key]
    if draw.random() < 0.3:
        metadata[draw.choice(sorted(metadata))] = draw.choice(ODD)
    by_row = ("trajectory",) if "trajectory" in tensors and tensors["trajectory"].ndim else ()
    files.save_tensors(kind.path, name, tensors, metadata, by_row=by_row)
    return bytearray(kind.path.read_bytes())


MUTATIONS = [flip_bits, truncate, lengthen, overwrite, swap_blocks, change_digits, odd_number, edit_header, forge]


def outcome(kind, exact):
    """What reading the mutant at kind.path comes to: same, accepted, refused, or a sentence that says what is wrong."""
    present = sorted(kind.folder.iterdir())
    began = time.monotonic()
    try:
        found = kind.read()
        result = "accepted" if not exact else "same" if found == kind.original else "accepted with another content"
    except DOCUMENTED as error:
        result = "refused" if "\n" not in str(error).strip() and kind.path.stem in str(error) else f"message {error!r}"
    except BaseException:
        result = traceback.format_exc()
    if sorted(kind.folder.iterdir()) != present:
        result = f"wrote {sorted(kind.folder.iterdir())}"
    if time.monotonic() - began > 20:
        result = "took longer than 20 seconds"
    return result


def main(folder, seed, seconds):
    warnings.simplefilter("ignore")
    kinds = [make(Path(folder) / make.__name__) for make in KINDS]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts, wrong, number, end = Counter(), [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        kind, draw = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
        mutate = draw.choice(MUTATIONS)
        mutant = bytes(mutate(bytearray(kind.content), draw, kind))
        kind.path.write_bytes(mutant)
        result = outcome(kind, kind.exact and mutate is not forge)
        known = result in ("same", "accepted", "refused")
        counts[type(kind).__name__, result if known else "wrong"] += 1
        if not known:
            wrong.append(f"{type(kind).__name__}, {mutate.__name__}, seed {seed}, number {number}: {result}")
        number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = {}
    for (name, result), count in sorted(counts.items()):
        table.setdefault(name, {})[result] = count
    print(json.dumps({"mutants": number, "peak_kb": peak, "kinds": table, "wrong": len(wrong)}))
    print("\n".join(wrong[:20]), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
