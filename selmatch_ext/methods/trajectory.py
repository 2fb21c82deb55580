"""Matching training trajectories (MTT, arXiv 2203.11932): the step that SelMatch and its relatives share."""

from __future__ import annotations

import torch
from torch import Tensor

from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.ops.distance import trajectory_distance
from selmatch_ext.ops.dsa import Augmentation, sample_augmentation
from selmatch_ext.settings import Matching
from selmatch_ext.unroll.sgd import unrolled_sgd


def chunks(count: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """`steps` index tensors: consecutive chunks of at most `batch` of a random permutation of `count`, and of a new one
    whenever it has run out (algorithm 1 of the paper)."""
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += torch.randperm(count, generator=generator).split(batch)
    return batches[:steps]


def matching_loss(
    model: torch.nn.Module,
    store: ExpertStore,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    settings: Matching,
    generator: torch.Generator,
) -> Tensor:
    """‖θ̂_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖² for a random expert and start epoch t (equation 2 of the paper).

    images: (n, C, H, W) and labels: (n,) int64 or (n, K) probabilities, the whole synthetic set; lr: 0-d.
    Differentiable in all three. Draws from `generator` (CPU): the expert, t, the batches, one DSA operation a step."""
    expert = int(torch.randint(store.count, (), generator=generator))
    epoch = int(torch.randint(settings.max_start_epoch, (), generator=generator))
    start = store.row(expert, epoch).to(images)
    target = store.row(expert, epoch + settings.expert_epochs).to(images)
    batches = chunks(len(images), settings.batch_syn, settings.inner_steps, generator)
    augmentations = None
    if settings.strategy != "none":
        augmentations = [_draw(len(b), images, settings.strategy, generator) for b in batches]
    student = unrolled_sgd(
        model,
        start,
        images,
        labels,
        [b.to(images.device) for b in batches],
        lr,
        augmentations=augmentations,
        engine=settings.engine,
        keep=settings.keep,
        gradient=settings.gradient,
        precision=settings.precision,
    )
    return trajectory_distance(student, start, target)


def _draw(batch: int, images: Tensor, strategy: str, generator: torch.Generator) -> Augmentation:
    p = sample_augmentation(batch, *images.shape[-2:], strategy=strategy, generator=generator)
    return Augmentation(*(t.to(images.device) for t in p))


def check_experts(store: ExpertStore, model: torch.nn.Module, settings: Matching) -> None:
    """ValueError when there are no trajectories, they are not of `model`, or too short for the start epochs and M."""
    if store.count == 0:
        raise ValueError(f"no expert trajectories in {store.folder}; train some with `selmatch experts`")
    if store.parameters != parameter_count(model):
        raise ValueError(
            f"the experts in {store.folder} have {store.parameters} parameters, {type(model).__name__} has "
            f"{parameter_count(model)}"
        )
    if settings.max_start_epoch < 1:
        raise ValueError(f"max_start_epoch must be at least 1, got {settings.max_start_epoch}")
    last = settings.max_start_epoch - 1 + settings.expert_epochs
    if last > store.epochs:
        raise ValueError(
            f"max_start_epoch {settings.max_start_epoch} and expert_epochs {settings.expert_epochs} need trajectories "
            f"of {last} epochs; those in {store.folder} have {store.epochs}"
        )
