"""Expert trajectories and the scores that come from watching networks train."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from selmatch_ext import models, ranks
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.origin import known_name
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.files import check_writable
from selmatch_ext.models import flat
from selmatch_ext.seeds import derive, generator
from selmatch_ext.selection.scores import el2n, forgetting_events
from selmatch_ext.settings import Experts, Scores, Training, to_dict
from selmatch_ext.stages import stage
from selmatch_ext.training import batch_augmenter, predict, train


def train_experts(
    data: ImageData, settings: Experts, folder: str | Path, seed: int, device: torch.device
) -> ExpertStore:
    """Trains the experts that `folder` still lacks and returns the store (MTT, arXiv 2203.11932, section 3.1).

    Row 0 of a trajectory is the initialisation, row e the parameters after epoch e. A killed run goes on with the
    missing experts; expert i depends on `seed` and i alone. Of several processes each trains every world-th expert.
    Raises ValueError when the folder holds experts of another network, of other images or labels (whatever the data set
    is called), of whitened images or plain ones, or made with other settings."""
    store = ExpertStore(folder, trusted=(settings.model,))
    share = ranks.mine(settings.count)
    how = {key: value for key, value in to_dict(settings).items() if key != "count"}
    metadata = {
        "model": settings.model,
        "dataset": data.name,
        "images": data.train.digest(),
        "zca": data.whitening is not None,
        "seed": seed,
        "settings": how,
    }
    if store.count > 0:
        store.check(0, metadata)
        metadata["dataset"] = known_name(store.metadata, data.name, store.folder)
    with ranks.progress(total=len(share) * settings.training.epochs, desc="experts", unit="epoch") as progress:
        for index in share:
            if store.path(index).exists():
                store.check(index, metadata)
                progress.update(settings.training.epochs)
                continue
            check_writable(store.path(index))
            model = network(data, settings.model, seed, device, "expert", index)
            rows = [flat.flatten(model.parameters()).cpu()]

            def keep(epoch: int, model=model, rows=rows) -> None:
                rows.append(flat.flatten(model.parameters()).cpu())
                progress.update()

            order = generator(seed, "expert", index)
            train_on_real(model, data, settings.training, settings.strategy, order, device, keep)
            store.save(index, torch.stack(rows), metadata)
    ranks.barrier()
    return store


def compute_scores(data: ImageData, settings: Scores, seed: int, device: torch.device) -> Tensor:
    """Difficulty (n,) float32 of every training image, higher = harder: forgetting events (arXiv 1812.05159) or EL2N
    (arXiv 2107.07075), averaged over `settings.runs` networks watched after every epoch."""
    labels, epochs = data.train.labels, settings.training.epochs
    measure = _is_right if settings.source == "forgetting" else _error_norm
    watched = {}
    with ranks.progress(total=len(ranks.mine(settings.runs)) * epochs, desc="scores", unit="epoch") as progress:
        for run in ranks.mine(settings.runs):
            model = network(data, settings.model, seed, device, "scores", run)
            take, seen = real_images(data, device), []

            def watch(epoch: int, model=model, take=take, seen=seen) -> None:
                seen.append(measure(predict(model, take, len(labels), device), labels))
                progress.update()

            order = generator(seed, "scores", run)
            train_on_real(model, data, settings.training, settings.strategy, order, device, watch)
            watched[run] = torch.stack(seen)
    blank = torch.zeros(epochs, len(labels), dtype=torch.bool if settings.source == "forgetting" else torch.float32)
    history = torch.stack(ranks.collect(watched, settings.runs, blank))
    return forgetting_events(history) if settings.source == "forgetting" else history.mean((0, 1))


def _is_right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) == labels


def _error_norm(logits: Tensor, labels: Tensor) -> Tensor:
    return el2n(F.softmax(logits, 1).unsqueeze(0), labels)


def network(data: ImageData, model: str, seed: int, device: torch.device, *stream: str | int) -> torch.nn.Module:
    """A freshly initialised network for `data`; its weights come from the named random stream."""
    weights = torch.Generator().manual_seed(derive(seed, *stream, "weights"))
    return models.build(model, data.channels, data.classes, data.image_size, generator=weights).to(device)


def real_images(data: ImageData, device: torch.device, split: str = "train"):
    """Indices -> normalised images of the split, which stays on the device as uint8."""
    images = getattr(data, split).images.to(device)
    return lambda indices: data.normalise(images[indices])


def train_on_real(
    model: torch.nn.Module,
    data: ImageData,
    settings: Training,
    strategy: str,
    generator: torch.Generator,
    device: torch.device,
    after_epoch,
) -> None:
    """`train` on the whole training split with one DSA operation a batch."""
    augmenter = batch_augmenter(strategy, data.image_size)
    labels = data.train.labels.to(device)
    sizes = {"batch": settings.batch, "images": f"{len(labels)} of {tuple(data.train.images.shape[1:])}"}
    with stage("training on all images", "a smaller training.batch", **sizes, device=device):
        train(model, real_images(data, device), labels, settings, augmenter, generator, after_epoch)
