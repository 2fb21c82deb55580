"""A small file of every kind that the package reads, and what identifies its content; see mutants.py."""

import contextlib
import io
import json
import shutil
import types

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
