"""Expert trajectories: the parameters of networks after every epoch of their training on all real images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from selmatch_ext import ranks
from selmatch_ext.clock import measured
from selmatch_ext.context import Context
from selmatch_ext.data.trajectories import ExpertSource, ExpertStore
from selmatch_ext.files import check_writable
from selmatch_ext.models import flat
from selmatch_ext.models.batchnorm import freeze_statistics
from selmatch_ext.precision import precision_scope
from selmatch_ext.provenance import known_name, of_images, to_dict
from selmatch_ext.settings import Experts
from selmatch_ext.training import train_on_real


@measured("experts")
def train_experts(context: Context, settings: Experts, folder: str | Path) -> ExpertStore:
    """Trains the experts that `folder` still lacks and returns the store (MTT, arXiv 2203.11932, section 3.1).

    Row 0 of a trajectory is the initialization, row e the parameters after epoch e. A killed run goes on with the
    missing experts; expert i depends on the seed and i alone. Of several processes each trains every world-th expert.
    Raises ValueError when the folder holds experts of another network, of other images or labels (whatever the data set
    is called), of whitened images or plain ones, or made with other settings."""
    store = ExpertStore(folder, trusted=(settings.model,))
    share = ranks.mine(settings.count)
    how = {key: value for key, value in to_dict(settings).items() if key != "count"}
    metadata = {
        "model": settings.model,
        "dataset": context.data.name,
        **of_images(context.data),
        "seed": context.seed,
        "settings": how,
    }
    if store.count > 0:
        store.check(0, metadata)
        metadata["dataset"] = known_name(store.metadata, context.data.name, store.folder)
    there = [index for index in share if store.path(index).exists()]
    for index in there:
        store.check(index, metadata)
    epochs = settings.training.epochs
    work = {"unit": "epoch", "kind": settings.model, "each": len(context.data.train)}
    bar = ranks.progress(total=len(share) * epochs, initial=len(there) * epochs, desc="experts", **work)
    with bar as progress:
        for index in (index for index in share if index not in there):
            check_writable(store.path(index))
            model = context.network(settings.model, "expert", index)
            rows = [flat.flatten(model.parameters()).cpu()]

            def keep(epoch: int, model: torch.nn.Module = model, rows: list[Tensor] = rows) -> None:
                rows.append(flat.flatten(model.parameters()).cpu())
                progress.update()

            order = context.generator("expert", index)
            train_on_real(model, context, settings.training, settings.strategy, order, keep)
            store.save(index, torch.stack(rows), metadata)
    ranks.barrier()
    return store


def expert_network(store: ExpertSource, context: Context) -> torch.nn.Module:
    """A new network with the experts' architecture. Raises ValueError where their files name a function that the
    store does not trust, or a network with another number of parameters than they hold."""
    data = context.data
    store.check_model_size(data.channels, data.classes, data.image_size)
    return context.network(store.model, "student")


def expert_logits(store: ExpertSource, context: Context, images: Tensor) -> Tensor:
    """(n, K) logits that expert 0 at its last epoch gives normalized images (n, C, H, W); no gradient. BatchNorm, of
    which trajectories hold no statistics, takes them from 16 real images per class."""
    model, data = expert_network(store, context).to(images.dtype), context.data
    flat.load_parameters(model, store.row(0, store.epochs))
    model.eval()  # first: no dropout in the statistics either
    seen = data.train.images[data.sample_each(16, context.generator("statistics"))]
    with torch.no_grad(), precision_scope("float32", context.device):
        freeze_statistics(model, data.normalize(seen, context.device, images.dtype))
        return torch.cat([model(x.to(context.device)) for x in images.split(256)])
