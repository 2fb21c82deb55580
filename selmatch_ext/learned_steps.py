"""Training as a set's schedule says: the steps that the set was learned for (DD, arXiv 1811.10959)."""

from __future__ import annotations

from collections.abc import Collection

import torch

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.images import ImageData
from selmatch_ext.data.schedule import Schedule
from selmatch_ext.models import flat, from_file
from selmatch_ext.models.batchnorm import freeze_statistics
from selmatch_ext.models.initial import xavier
from selmatch_ext.precision import precision_scope
from selmatch_ext.unroll.sgd import unrolled_sgd


@torch.no_grad()
def follow_schedule(
    subset: DistilledSet, context: Context, k: int = 0, trusted: Collection[str] = ()
) -> torch.nn.Module:
    """Network number k of a set that comes with its training (DD, arXiv 1811.10959, section 4), trained that way, in
    evaluation mode. BatchNorm takes its statistics from 16 real training images per class.

    trusted: functions package.module:function that a set's file may name as its network. Raises ValueError for another
    one, and for a network that does not fit the starts of the schedule."""
    schedule, data, device = subset.schedule, context.data, context.device
    if schedule is None:
        raise ValueError("the set has no schedule to train by")
    check_schedule(schedule, data, trusted)
    model = context.network(schedule.model, "evaluation", k)
    if schedule.starts is None:
        start = xavier(model, context.generator("evaluation", "xavier", k))
    else:
        start = schedule.starts[k % len(schedule.starts)]
    images, targets, rates = (t.to(device) for t in (subset.images, subset.targets(), schedule.rates))
    trained = unrolled_sgd(
        model,
        start.to(device),
        images,
        targets,
        list(schedule.batches),
        rates,
        momentum=schedule.momentum,
        nesterov=schedule.nesterov,
        weight_decay=schedule.weight_decay,
    )
    flat.load_parameters(model, trained)
    seen = [(data.train.labels == c).nonzero().squeeze(1)[:16] for c in range(data.classes)]
    with precision_scope("float32", device):
        freeze_statistics(model, data.normalize(data.train.images[torch.cat(seen)], device))
    return model.eval()


def check_schedule(schedule: Schedule, data: ImageData, trusted: Collection[str]) -> None:
    """ValueError where the schedule comes from a file and names a network that is not in `trusted` and not one of ours,
    or one that does not fit the starts."""
    where, option = f"{schedule.source}: schedule_model", "--evaluation.model"
    held = None if schedule.starts is None else schedule.starts.shape[1]
    if schedule.source is not None:
        from_file.checked_name(schedule.model, where, option, trusted)
        like = data.channels, data.classes, data.image_size
        from_file.check_size(schedule.model, like, where, option, held, trusted)
