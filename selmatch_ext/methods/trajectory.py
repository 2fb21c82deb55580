"""The step of matching training trajectories (MTT, arXiv 2203.11932), which MTT, DATM and SelMatch share."""

from __future__ import annotations

import torch
from torch import Tensor

from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.methods.base import Task
from selmatch_ext.models import flat
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.models.statistics import freeze_statistics
from selmatch_ext.ops.distance import trajectory_distance
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.precision import precision_scope
from selmatch_ext.seeds import generator
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
    epochs: tuple[int, int],
) -> Tensor:
    """‖θ̂_N − θ*_{t+M}‖² / ‖θ*_t − θ*_{t+M}‖² for a random expert and start epoch t (equation 2 of the paper).

    images: (n, C, H, W) and labels: (n,) int64 or (n, K) probabilities, the whole synthetic set; lr: 0-d. epochs: the
    range that t is drawn from, its end excluded.
    Differentiable in images, labels and lr. Draws from `generator` (CPU): the expert, t, the batches, one DSA operation
    a step."""
    expert = int(torch.randint(store.count, (), generator=generator))
    epoch = int(torch.randint(*epochs, (), generator=generator))
    start = store.row(expert, epoch).to(images)
    target = store.row(expert, epoch + settings.expert_epochs).to(images)
    batches = chunks(len(images), settings.batch_syn, settings.inner_steps, generator)
    augmentations = None
    if settings.strategy != "none":
        augmentations = [
            sample_augmentation(
                len(b), *images.shape[-2:], strategy=settings.strategy, generator=generator, device=images.device
            )
            for b in batches
        ]
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
        cuda_graphs=settings.cuda_graphs,
    )
    return trajectory_distance(student, start, target)


def start_epochs(settings: Matching, iteration: int) -> tuple[int, int]:
    """The range of start epochs in an iteration, its end excluded: with first_max_start_epoch it grows in equal steps
    from there to max_start_epoch over the run (sequential generation; DATM, arXiv 2310.05773, section 3.3)."""
    first, end = settings.first_max_start_epoch, settings.max_start_epoch
    if first is not None:
        end = first + (end + 1 - first) * iteration // settings.iterations
    return settings.min_start_epoch, min(end, settings.max_start_epoch)


def check_experts(store: ExpertStore, model: torch.nn.Module, settings: Matching) -> None:
    """ValueError when there are no trajectories, they are not of `model`, or too short for the start epochs and M."""
    if store.count == 0:
        raise ValueError(f"no expert trajectories in {store.folder}; train some with `selmatch experts`")
    if store.parameters != parameter_count(model):
        raise ValueError(
            f"the experts in {store.folder} have {store.parameters} parameters, {type(model).__name__} has "
            f"{parameter_count(model)}"
        )
    store.check_alike()
    if not 0 <= settings.min_start_epoch < settings.max_start_epoch:
        raise ValueError(
            f"min_start_epoch must be at least 0 and below max_start_epoch {settings.max_start_epoch}, got "
            f"{settings.min_start_epoch}"
        )
    first = settings.first_max_start_epoch
    if first is not None and not settings.min_start_epoch < first <= settings.max_start_epoch:
        raise ValueError(
            f"first_max_start_epoch must be above min_start_epoch {settings.min_start_epoch} and at most "
            f"max_start_epoch {settings.max_start_epoch}, got {first}"
        )
    last = settings.max_start_epoch - 1 + settings.expert_epochs
    if last > store.epochs:
        raise ValueError(
            f"max_start_epoch {settings.max_start_epoch} and expert_epochs {settings.expert_epochs} need trajectories "
            f"of {last} epochs; those in {store.folder} have {store.epochs}"
        )


def expert_logits(task: Task, images: Tensor) -> Tensor:
    """(n, K) logits that expert 0 at its last epoch gives normalised images (n, C, H, W); no gradient. BatchNorm, of
    which trajectories keep no statistics, takes them from 16 real images per class."""
    model = task.expert_network()
    flat.load(model, task.experts.row(0, task.experts.epochs))
    model.eval()  # first: no dropout in the statistics either
    with torch.no_grad(), precision_scope("float32", task.device):
        freeze_statistics(model, task.real(task.sample_each(16, generator(task.seed, "statistics"))))
        return torch.cat([model(x.to(task.device, task.dtype)) for x in images.split(256)])
