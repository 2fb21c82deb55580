"""The feature space that selection and coverage measure in: networks trained on all training images, kept in files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from selmatch_ext import models, ranks, strict_json
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.origin import changes, known_name
from selmatch_ext.experts import network, real_images, train_on_real
from selmatch_ext.files import check_writable, json_field, load_tensors, save_tensors
from selmatch_ext.seeds import generator
from selmatch_ext.settings import Features, to_dict
from selmatch_ext.training import predict

KIND = "network"


def trained_networks(
    data: ImageData, settings: Features, seed: int, device: torch.device, folder: str | Path, count: int = 1
) -> list[torch.nn.Module]:
    """`count` networks trained on all of `data`'s training images; folder/network_0.safetensors and so on are read if
    they are there, and written if not. Network i depends on `seed` and i alone.

    Raises ValueError when a file holds a network made otherwise."""
    folder = Path(folder)
    with ranks.progress(total=count * settings.training.epochs, desc="networks on all data", unit="epoch") as progress:
        for index in ranks.mine(count):
            if not _path(folder, index).exists():
                _train(data, settings, seed, device, folder, index, progress)
    ranks.barrier()
    return [_load(data, settings, seed, device, folder, index) for index in range(count)]


def split_features(model: torch.nn.Module, data: ImageData, device: torch.device, split: str = "train") -> Tensor:
    """(n, F) float32 on the CPU: what enters the last linear layer for each image of the split, in evaluation mode."""
    count = len(getattr(data, split).labels)
    return predict(model, real_images(data, device, split), count, device, output=models.embed)


def _train(
    data: ImageData, settings: Features, seed: int, device: torch.device, folder: Path, index: int, progress
) -> None:
    check_writable(_path(folder, index))
    model = network(data, settings.model, seed, device, "features", index)
    order = generator(seed, "features", index)
    train_on_real(model, data, settings.training, settings.strategy, order, device, lambda epoch: progress.update())
    how = json.dumps(_how(data, settings, seed, index))
    save_tensors(_path(folder, index), KIND, model.state_dict(), {"how": how})


def _load(
    data: ImageData, settings: Features, seed: int, device: torch.device, folder: Path, index: int
) -> torch.nn.Module:
    path = _path(folder, index)
    state, metadata = load_tensors(path, KIND)
    how = strict_json.mapping(json_field(metadata, "how", path), f"{path}: metadata field 'how'")
    changed = changes(how, json.loads(json.dumps(_how(data, settings, seed, index))))
    if changed:
        raise ValueError(
            f"{path} holds a network made otherwise ({'; '.join(changed)}); choose another --out or delete it"
        )
    known_name(how, data.name, folder)
    model = network(data, settings.model, seed, device, "features", index)
    _check_state(state, model.state_dict(), path)
    model.load_state_dict(state)
    return model


def _check_state(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """ValueError naming the first tensor of `state` that is not as the network expects, or not finite."""
    for name in sorted(state.keys() ^ expected.keys()):
        raise ValueError(f"{path} {'lacks' if name in expected else 'holds an unknown'} tensor {name!r} of the network")
    for name, value in expected.items():
        found = state[name]
        if found.dtype != value.dtype or found.shape != value.shape:
            raise ValueError(
                f"{path}: {name} is {found.dtype} {tuple(found.shape)}; it must be {value.dtype} {tuple(value.shape)}"
            )
        if found.is_floating_point() and not found.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")


def _how(data: ImageData, settings: Features, seed: int, index: int) -> dict:
    made_from = {"data": data.name, "images": data.train.digest(), "zca": data.whitening is not None}
    return {"features": to_dict(settings), **made_from, "seed": seed, "index": index}


def _path(folder: Path, index: int) -> Path:
    return folder / f"network_{index}.safetensors"
