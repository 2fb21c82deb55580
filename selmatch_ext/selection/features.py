"""The feature space that selection and coverage measure in: networks trained on all training images, kept in files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from selmatch_ext import models, ranks
from selmatch_ext.context import Context
from selmatch_ext.files import check_writable, json_field, load_tensors, save_tensors
from selmatch_ext.provenance import check_same, known_name, of_images, to_dict
from selmatch_ext.settings import Features
from selmatch_ext.training import predict, train_on_real

KIND = "network"


def trained_networks(context: Context, settings: Features, folder: str | Path, count: int = 1) -> list[torch.nn.Module]:
    """`count` networks trained on all training images; folder/network_0.safetensors and so on are read if
    they are there, and written if not. Network i depends on the seed and i alone.

    Raises ValueError when a file holds a network made otherwise."""
    folder = Path(folder)
    missing = [index for index in ranks.mine(count) if not _path(folder, index).exists()]
    work = {"unit": "epoch", "kind": settings.model, "each": len(context.data.train)}
    total = len(missing) * settings.training.epochs
    with ranks.progress(total=total, desc="networks on all data", **work) as progress:
        for index in missing:
            _train(context, settings, folder, index, progress)
    ranks.barrier()
    return [_load(context, settings, folder, index) for index in range(count)]


def split_features(model: torch.nn.Module, context: Context, split: str = "train") -> Tensor:
    """(n, F) float32 on the CPU: what enters the last linear layer for each image of the split, in evaluation mode."""
    count = len(getattr(context.data, split).labels)
    return predict(model, context.real_images(split), count, context.device, output=models.embed)


def _train(context: Context, settings: Features, folder: Path, index: int, progress: tqdm) -> None:
    check_writable(_path(folder, index))
    model = context.network(settings.model, "features", index)
    order = context.generator("features", index)
    train_on_real(model, context, settings.training, settings.strategy, order, lambda epoch: progress.update())
    how = json.dumps(_how(context, settings, index))
    save_tensors(_path(folder, index), KIND, model.state_dict(), {"how": how})


def _load(context: Context, settings: Features, folder: Path, index: int) -> torch.nn.Module:
    path = _path(folder, index)
    state, metadata = load_tensors(path, KIND)
    made_from = check_same(path, json_field(metadata, "how", path), _how(context, settings, index))
    known_name(made_from, context.data.name, folder)
    model = context.network(settings.model, "features", index)
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


def _how(context: Context, settings: Features, index: int) -> dict:
    made_from = {"data": context.data.name, **of_images(context.data)}
    return {"features": to_dict(settings), **made_from, "seed": context.seed, "index": index}


def _path(folder: Path, index: int) -> Path:
    return folder / f"network_{index}.safetensors"
