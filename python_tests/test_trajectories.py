"""The expert store, and the import of replay buffers."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from selmatch_ext import files
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.trajectories import ExpertStore, import_replay_buffer

METADATA = {"model": "ConvNet", "dataset": "digits", "seed": 0, "settings": {"lr": 0.01, "sizes": (1, 2)}}


def trajectory(seed=0, epochs=3, parameters=5):
    return torch.randn((epochs + 1, parameters), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path):
    store = ExpertStore(tmp_path / "experts")
    for i in range(3):
        store.save(i, trajectory(i), {**METADATA, "seed": i})
    return store


def test_rows_come_back(store):
    again = ExpertStore(store.folder)
    assert (again.count, again.epochs, again.parameters) == (3, 3, 5)
    assert again.metadata == {**METADATA, "settings": {"lr": 0.01, "sizes": [1, 2]}}
    for i in range(3):
        for epoch in range(4):
            assert torch.equal(again.row(i, epoch), trajectory(i)[epoch])
    assert sorted(p.name for p in store.folder.iterdir()) == [f"expert_000{i}.safetensors" for i in range(3)]


def test_rows_are_copies(store):
    row = store.row(0, 0)
    row.zero_()
    assert torch.equal(store.row(0, 0), trajectory(0)[0])
    assert row.untyped_storage().nbytes() == row.nbytes


def test_experts_are_counted_up_to_the_first_missing_one(store):
    store.path(1).unlink()
    assert store.count == 1
    with pytest.raises(IndexError, match="expert is 2; .* holds experts 0 to 0"):
        store.row(2, 0)


def test_what_is_not_there(store, tmp_path):
    for expert in (-1, 3):
        with pytest.raises(IndexError, match=f"expert is {expert}; .* holds experts 0 to 2"):
            store.row(expert, 0)
    for epoch in (-1, 4):
        with pytest.raises(IndexError, match=rf"epoch is {epoch}; .*expert_0001.safetensors has epochs 0 to 3"):
            store.row(1, epoch)
    empty = ExpertStore(tmp_path / "none")
    assert empty.count == 0
    for name in ("epochs", "parameters"):
        with pytest.raises(FileNotFoundError, match="there is no expert in .*none"):
            getattr(empty, name)


def test_experts_must_agree(store):
    with pytest.raises(ValueError, match="expert 3 has 2 epochs and 5 parameters; those in .* have 3 and 5"):
        store.save(3, trajectory(epochs=2), METADATA)
    with pytest.raises(ValueError, match="expert 3 has 3 epochs and 6 parameters"):
        store.save(3, trajectory(parameters=6), METADATA)
    with pytest.raises(ValueError, match="made with other settings .model: ConvNet → ConvNetBN"):
        store.save(3, trajectory(), {**METADATA, "model": "ConvNetBN"})
    with pytest.raises(ValueError, match="dataset: digits → MNIST"):
        store.save(3, trajectory(), {**METADATA, "dataset": "MNIST"})
    assert store.count == 3


def test_check(store):
    store.check(1, {**METADATA, "seed": 1})
    store.check(1, {"model": "ConvNet"})
    with pytest.raises(ValueError, match=r"expert_0001.safetensors was made with other settings .seed: 1 → 2"):
        store.check(1, {"seed": 2})
    with pytest.raises(ValueError, match=r"settings.lr: 0.01 → 0.1"):
        store.check(1, {"settings": {"lr": 0.1, "sizes": (1, 2)}})


def test_wrong_trajectories(tmp_path):
    store = ExpertStore(tmp_path)
    for wrong in (trajectory().double(), trajectory()[0], trajectory()[:1], trajectory(parameters=0)):
        with pytest.raises(ValueError, match=r"expert 0: trajectory is .* it must be torch.float32 \(epochs \+ 1, P\)"):
            store.save(0, wrong, METADATA)
    for value in (float("nan"), float("-inf")):
        wrong = trajectory()
        wrong[2, 1] = value
        with pytest.raises(ValueError, match="expert 0: the parameters of epoch 2 are not finite"):
            store.save(0, wrong, METADATA)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_experts(store):
    path = store.path(0)
    content = path.read_bytes()
    for kept in (0, 50, len(content) - 1):
        path.write_bytes(content[:kept])
        for use in (lambda: store.row(0, 0), lambda: store.epochs, lambda: store.metadata):
            with pytest.raises(ValueError, match=r"expert_0000.safetensors is truncated or is no safetensors file"):
                use()
    images = torch.zeros(2, 1, 4, 4)
    labels, mask = torch.tensor([0, 0]), torch.tensor([True, False])
    DistilledSet(images, labels, mask, None, torch.zeros(1), torch.ones(1), ["a"], "selmatch").save(path)
    with pytest.raises(ValueError, match="is a selmatch_ext distilled file; expected kind expert"):
        store.row(0, 0)
    files.save_tensors(path, "expert", {"trajectory": torch.zeros(3)}, {"expert": "{}"})
    with pytest.raises(ValueError, match=r"trajectory has shape \(3,\)"):
        _ = store.epochs


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cannot write .*file is a file, not a folder"):
        ExpertStore(tmp_path / "file").save(0, trajectory(), METADATA)


READ_ROWS = """
import sys
from selmatch_ext.data.trajectories import ExpertStore
def peak():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
store = ExpertStore(sys.argv[1])
store.row(0, 0)
before = peak()
for epoch in range(10):
    store.row(0, epoch * 4)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's count of resident pages")
def test_reading_rows_reads_only_rows(tmp_path):
    store, parameters = ExpertStore(tmp_path), 200_000
    store.save(0, torch.zeros(41, parameters), METADATA)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed rows are given back and not counted
    result = subprocess.run(
        [sys.executable, "-c", READ_ROWS, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    assert int(result.stdout) < 4 * 4 * parameters  # four rows at most, of a file of 41


# replay buffers


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))


def buffer(experts=2, epochs=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [p.shape for p in network().parameters()]
    return [[[torch.randn(s, generator=g) for s in shapes] for _ in range(epochs)] for _ in range(experts)]


def flat(epoch):
    return torch.cat([p.reshape(-1) for p in epoch])


@pytest.mark.parametrize("new_format", [True, False])
def test_import(tmp_path, new_format):
    experts = buffer()
    experts[1][0] = [nn.Parameter(p) for p in experts[1][0]]
    path = tmp_path / "replay_buffer_0.pt"
    torch.save(experts, path, _use_new_zipfile_serialization=new_format)
    metadata = {"model": "ConvNet", "dataset": "CIFAR10"}
    store = import_replay_buffer(path, tmp_path / "store", network(), metadata)
    assert (store.count, store.epochs, store.parameters) == (2, 3, 12)
    assert store.metadata == {**metadata, "source": "replay_buffer_0.pt:0"}
    for i, expert in enumerate(experts):
        for epoch, parameters in enumerate(expert):
            assert torch.equal(store.row(i, epoch), flat(parameters))
    assert import_replay_buffer(path, tmp_path / "store", network(), metadata).count == 2  # not twice
    torch.save(buffer(seed=1), tmp_path / "replay_buffer_1.pt")
    assert import_replay_buffer(tmp_path / "replay_buffer_1.pt", tmp_path / "store", network(), metadata).count == 4


def test_import_repeated_after_a_kill(tmp_path):
    torch.save(buffer(3), tmp_path / "b.pt")
    store = import_replay_buffer(tmp_path / "b.pt", tmp_path / "store", network(), METADATA)
    store.path(2).unlink()
    assert import_replay_buffer(tmp_path / "b.pt", tmp_path / "store", network(), METADATA).count == 3
    assert torch.equal(store.row(2, 3), flat(buffer(3)[2][3]))


def wrong_buffers():
    short, missing, shape, nan, whole, nested = (buffer() for _ in range(6))
    short[1].pop()
    missing[1][2].pop()
    shape[0][1][2] = torch.zeros(2, 3)
    nan[1][3][0][0, 1] = float("nan")
    whole[0][0] = [p.long() for p in whole[0][0]]
    nested[1] = nested[1][0][0]
    return [
        ({"a": torch.zeros(1)}, "holds a dict of 1; a replay buffer is a list of experts"),
        ([], "holds a list of 0; a replay buffer is a list of experts"),
        (torch.zeros(3), "holds a Tensor; a replay buffer is a list"),
        ([buffer()[0][:1]], "expert 0 is a list of 1; it must be a list of at least two epochs"),
        (short, "expert 1 has 3 epochs, but expert 0 has 4"),
        (missing, r"expert 1, epoch 2 does not fit the model: it has 2 tensors, the model 3; number 2 has shape none"),
        (shape, r"expert 0, epoch 1 does not fit the model: .* number 2 has shape \(2, 3\), the model's \(2, 2\)"),
        (nan, "expert 1: the parameters of epoch 3 are not finite"),
        (whole, "expert 0, epoch 0 is a list of 3; it must be a list of float tensors"),
        (nested, "expert 1 is a Tensor; it must be a list"),
    ]


@pytest.mark.parametrize(("content", "message"), wrong_buffers())
def test_replay_buffers_that_do_not_fit(tmp_path, content, message):
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=message) as caught:
        import_replay_buffer(tmp_path / "b.pt", tmp_path / "store", network(), METADATA)
    assert str(tmp_path / "b.pt") in str(caught.value)
    assert not (tmp_path / "store").exists()


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.filterwarnings("ignore:.*TorchScript.*")
def test_truncated_foreign_and_hostile_replay_buffers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "b.pt"
    with pytest.raises(FileNotFoundError, match=r"replay buffer .*b.pt does not exist"):
        import_replay_buffer(path, tmp_path / "store", network(), METADATA)
    torch.save(buffer(), path)
    content = path.read_bytes()
    broken = [content[:kept] for kept in (0, 10, 200, len(content) // 2, len(content) - 30)]
    for data in [*broken, b"not a buffer", pickle.dumps([Attack()], protocol=2)]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="b.pt is truncated or is no replay buffer that can be read safely"):
            import_replay_buffer(path, tmp_path / "store", network(), METADATA)
    torch.save([Attack()], path)
    with pytest.raises(ValueError, match="b.pt is truncated or is no replay buffer"):
        import_replay_buffer(path, tmp_path / "store", network(), METADATA)
    assert [p.name for p in tmp_path.iterdir()] == ["b.pt"]  # nothing was run, nothing written


def test_import_that_fails_on_the_way_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store = ExpertStore(tmp_path / "store")
    store.save(0, trajectory(epochs=3, parameters=12), METADATA)
    torch.save(buffer(3), tmp_path / "b.pt")
    save = ExpertStore.save

    def full(self, expert, *rest):
        if expert == 3:
            raise OSError("disk full")
        save(self, expert, *rest)

    monkeypatch.setattr(ExpertStore, "save", full)
    with pytest.raises(OSError, match="disk full"):
        import_replay_buffer(tmp_path / "b.pt", store.folder, network(), METADATA)
    assert store.count == 1 and len(list(store.folder.iterdir())) == 1
