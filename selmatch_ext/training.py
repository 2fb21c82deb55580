"""The one loop in which networks are trained: experts, score networks and evaluations all pass through `train`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selmatch_ext.allocator import reused_memory
from selmatch_ext.context import Context
from selmatch_ext.data.soft_labels import Regression
from selmatch_ext.fused.training import fast
from selmatch_ext.models.batchnorm import refuses_one_image
from selmatch_ext.ops.dsa import Augmentation, augment, mix_augmentations
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.precision import precision_scope
from selmatch_ext.seeds import global_stream
from selmatch_ext.settings import Training
from selmatch_ext.sharpness import sharpness_aware
from selmatch_ext.stages import stage
from selmatch_ext.threads import threads_for, using
from selmatch_ext.transfers import steps_to_device

Take = Callable[[Tensor], Tensor]  # indices (b,) -> images (b, C, H, W), normalized
Augmenter = Callable[[Tensor, torch.Generator], Augmentation]  # indices (b,), generator -> what to do with each image


def batch_augmenter(strategy: str, image_size: tuple[int, int]) -> Augmenter:
    """An augmenter that draws one operation of `strategy` for each batch, as DSA does in its mode "single"; each image
    of the batch gets parameters of its own."""
    return lambda indices, generator: sample_augmentation(
        len(indices), *image_size, strategy=strategy, generator=generator
    )


def combined_augmenter(
    distilled: Tensor, dsa: str, simple: str | None, image_size: tuple[int, int], per_image: bool = True
) -> Augmenter:
    """SelMatch's combined augmentation (section 3 of the paper): distilled images get one operation of `dsa` each,
    real ones get all of `simple`; None: the same as distilled ones. One table, so one launch a batch.

    distilled: (n,) bool on the CPU, over the set that the indices count through. per_image: each distilled image draws
    its operation, else each batch draws one."""

    def sample(indices: Tensor, generator: torch.Generator) -> Augmentation:
        size = (len(indices), *image_size)
        mine = sample_augmentation(*size, strategy=dsa, per_sample=per_image, generator=generator)
        if simple is None:
            return mine
        other = sample_augmentation(*size, strategy=simple, mode="multi", generator=generator)
        return mix_augmentations(distilled[indices], mine, other)

    return sample


def train(
    model: nn.Module,
    take: Take,
    labels: Tensor | Regression,
    settings: Training,
    augmenter: Augmenter,
    generator: torch.Generator,
    after_epoch: Callable[[int], object] | None = None,
) -> None:
    """Trains `model` in place, by the cross-entropy or, where `labels` are a Regression, by the squared error.

    labels: (n,) int64, or (n, K) float probabilities, on the model's device; rows of probabilities times the weights of
    the images (`data.distilled.weighted`) make the loss of a batch the mean of weight times loss.
    Order and augmentation are drawn from `generator` (CPU), dropout from a stream of it. after_epoch(epoch) is called
    after each, counted from 1. A last batch of one image is left out where BatchNorm cannot take statistics from it.
    Raises ValueError where all batches are such, and FloatingPointError when an epoch ends with a loss that is not
    finite."""
    device = labels.device
    batches = _batches(model, take, labels, settings)
    backward = "tf32" if settings.precision == "tf32" else "float32"  # bfloat16 follows the forward pass
    threads = threads_for(model, take(torch.zeros(1, dtype=torch.int64, device=device)), settings.batch)
    network = None
    optimizer = _optimizer(model, settings)
    for epoch in range(settings.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, epoch)
        model.train()
        with global_stream(generator, device), using(threads), reused_memory():
            order = torch.randperm(len(labels), generator=generator).split(settings.batch)[:batches]
            tables = [augmenter(indices, generator) for indices in order]
            for indices, p in zip(*steps_to_device(order, tables, device), strict=True):
                with precision_scope(settings.precision, device):
                    x = augment(take(indices), p)
                    network = fast(model, x, settings.precision) if network is None else network
                    loss = _loss(network(x), labels, indices)
                optimizer.zero_grad()
                with precision_scope(backward, device):
                    loss.backward()
                if settings.sharpness_rho:
                    with sharpness_aware(model.parameters(), settings):
                        with precision_scope(settings.precision, device):
                            again = _loss(network(x), labels, indices)
                        with precision_scope(backward, device):
                            again.backward()
                optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"training stopped: the loss of epoch {epoch + 1} is {loss.item()} at lr {settings.lr}; "
                "try a smaller lr"
            )
        if after_epoch is not None:
            after_epoch(epoch + 1)


def _optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    s, parameters = settings, model.parameters()
    if s.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=s.lr, weight_decay=s.weight_decay)
    return torch.optim.SGD(parameters, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)


def _loss(outputs: Tensor, labels: Tensor | Regression, indices: Tensor) -> Tensor:
    if isinstance(labels, Regression):
        return labels.loss(outputs, indices)
    return F.cross_entropy(outputs, labels[indices])


def train_on_real(
    model: nn.Module,
    context: Context,
    settings: Training,
    strategy: str,
    generator: torch.Generator,
    after_epoch: Callable[[int], object],
) -> None:
    """`train` on the whole training split, with one operation of `strategy` for each batch."""
    augmenter = batch_augmenter(strategy, context.data.image_size)
    labels = context.data.train.labels.to(context.device)
    sizes = {"batch": settings.batch, "images": f"{len(labels)} of {tuple(context.data.train.images.shape[1:])}"}
    with stage("training on all images", "a smaller training.batch", **sizes, device=context.device):
        train(model, context.real_images(), labels, settings, augmenter, generator, after_epoch)


def _batches(model: nn.Module, take: Take, labels: Tensor | Regression, settings: Training) -> int:
    """Number of batches per epoch, without a last one of a single image that BatchNorm cannot train on."""
    count, batches = len(labels), -(-len(labels) // settings.batch)
    if min(count, settings.batch) > 1 and count % settings.batch != 1:
        return batches
    with precision_scope("float32", labels.device):
        if not refuses_one_image(model, take(torch.zeros(1, dtype=torch.int64, device=labels.device))):
            return batches
    if min(count, settings.batch) == 1:
        raise ValueError(
            f"batch is {settings.batch} with {count} images: BatchNorm of this network cannot take statistics from one "
            "image at a time; allowed is 2 and above, with as many images, or a network without BatchNorm"
        )
    return batches - 1


def learning_rate(settings: Training, epoch: int) -> float:
    """The learning rate of `epoch`, counted from 0.

    During the first settings.warmup epochs it rises in equal steps, to lr in the last of them. Afterwards, by
    settings.schedule: "constant" stays at lr; "cosine" falls from lr to lr / 100 in the last epoch; "step" is lr in the
    first half of all epochs and lr / 10 in the second."""
    if epoch < settings.warmup:
        return settings.lr * (epoch + 1) / settings.warmup
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "step":
        return settings.lr if 2 * epoch < settings.epochs else settings.lr / 10
    progress = (epoch - settings.warmup) / max(1, settings.epochs - 1 - settings.warmup)
    return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def predict(
    model: nn.Module,
    take: Take,
    count: int,
    device: torch.device,
    batch: int = 512,
    output: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits (count, K) of images 0..count−1 in evaluation mode, on the CPU; the mode is put back afterwards.

    output(model, images): what to return in their place, e.g. models.embed for the features (count, F)."""
    was_training = model.training
    model.eval()
    see = model if output is None else partial(output, model)
    with precision_scope("float32", device):
        results = [see(take(indices)).cpu() for indices in torch.arange(count, device=device).split(batch)]
    model.train(was_training)
    return torch.cat(results)
