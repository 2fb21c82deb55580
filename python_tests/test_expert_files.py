"""Expert trajectories and replay buffers from strangers: what they hold is checked before it is used."""

import pickle
import zipfile

import pytest
import torch
from strangers import Bomb, toy

from selmatch_ext import files
from selmatch_ext.data.trajectories import ExpertStore, import_replay_buffer


def test_experts_with_other_values_than_numbers(tmp_path):
    store = ExpertStore(tmp_path)
    wrong = torch.zeros(3, 5)
    wrong[1, 2] = torch.nan
    for trajectory, metadata, message in (
        (wrong, "{}", "expert_0000.safetensors: the parameters of epoch 1 are not finite"),
        (torch.zeros(3, 5).double(), "{}", "trajectory is torch.float64; it must be torch.float32"),
        (torch.zeros(3, 5), "null", "metadata field 'expert' is None; it must be an object"),
        (torch.zeros(3, 5), '{"model": 3}', "expert_0000.safetensors: model is 3; it must be a string"),
        (torch.zeros(1, 5), "{}", r"trajectory has shape \(1, 5\)"),
    ):
        files.save_tensors(
            store.path(0), "expert", {"trajectory": trajectory}, {"expert": metadata}, by_row=["trajectory"]
        )
        with pytest.raises(ValueError, match=message):
            [store.row(0, epoch) for epoch in range(3)]
            assert store.model
    files.save_tensors(store.path(0), "expert", {"trajectory": torch.zeros(3, 5)}, {"expert": "{}"})
    with pytest.raises(ValueError, match="'trajectory' has no checksum for each of its rows"):
        store.row(0, 0)


def test_experts_that_differ_are_refused_before_the_run(tmp_path):
    store = ExpertStore(tmp_path)
    store.save(0, torch.randn(3, 5), {"model": "MLP"})
    ExpertStore(tmp_path / "other").save(0, torch.randn(4, 5), {"model": "MLP"})
    (tmp_path / "other" / "expert_0000.safetensors").rename(store.path(1))
    with pytest.raises(ValueError, match="expert_0001.safetensors has 3 epochs, 5 parameters .*; expert 0 has 2, 5"):
        store.check_alike()


def epochs(count=3):
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(p.shape, generator=g) for p in toy().parameters()] for _ in range(count)]


def unusual(tensor):
    changed = epochs()
    changed[1][2] = tensor
    return [changed]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([Bomb()], "bytearray"),
        (unusual(torch.ones(2, 2).to_sparse()), "sparse"),
        (unusual(torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.quint8)), "qtensor"),
        (unusual(torch.ones(2, 2, device="meta")), "meta"),
        (unusual(torch.ones(2, 2, dtype=torch.cfloat)), "expert 0, epoch 1 .*must be a list of float tensors"),
        (unusual(torch.zeros(1).expand(10**9, 10**9)), "declares a size of 1000000000"),
        (unusual(None), "expert 0, epoch 1 is a list of 3; it must be a list of float tensors"),
        ([[[p.clone() for p in toy().parameters()]] * 3], "repeats|epochs are equal|share"),
        ([[epoch[:] for epoch in [epochs(1)[0]] * 40]], "epochs"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_replay_buffers(tmp_path, content, message):
    path = tmp_path / "buffer.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"buffer.pt.*({message})") as caught:
        import_replay_buffer(path, tmp_path / "store", toy(), {})
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_a_buffer_that_aliasing_made_equal(tmp_path):
    """What the public code writes on a CPU: p.detach().cpu() of the same parameters after every epoch."""
    network, expert = toy(), []
    for _ in range(4):
        with torch.no_grad():
            for p in network.parameters():
                p += 1
        expert.append([p.detach().cpu() for p in network.parameters()])
    torch.save([expert], tmp_path / "buffer.pt")
    with pytest.raises(
        ValueError, match=r"buffer.pt: expert 0: all 4 epochs are equal. The public code .* \.clone\(\)"
    ):
        import_replay_buffer(tmp_path / "buffer.pt", tmp_path / "store", toy(), {})


def test_a_buffer_with_compressed_or_changed_members(tmp_path):
    path = tmp_path / "buffer.pt"
    torch.save([epochs()], path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="buffer.pt .* is compressed or encrypted"):
        import_replay_buffer(path, tmp_path / "store", toy(), {})
    value = epochs()[1][0].numpy().tobytes()
    at = content.index(value)
    path.write_bytes(content[: at + 3] + bytes([content[at + 3] ^ 1]) + content[at + 4 :])
    with pytest.raises(ValueError, match="buffer.pt .* has changed since the file was written: its checksum differs"):
        import_replay_buffer(path, tmp_path / "store", toy(), {})
    path.write_bytes(pickle.dumps([1]) + b"\0" * 100)
    with pytest.raises(ValueError, match="buffer.pt is truncated or is no replay buffer"):
        import_replay_buffer(path, tmp_path / "store", toy(), {})
