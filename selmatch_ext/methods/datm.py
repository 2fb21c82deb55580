"""Difficulty-aligned trajectory matching (DATM, arXiv 2310.05773)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selmatch_ext.methods.base import Defaults
from selmatch_ext.methods.mtt import MTT, MTTSettings
from selmatch_ext.ranges import Count, Positive, Rate
from selmatch_ext.settings import Start


@dataclass(frozen=True)
class DATMSettings(MTTSettings):
    """Difficulty-aligned trajectory matching (arXiv 2310.05773); defaults for CIFAR-10 with 10 images per class."""

    inner_steps: Count = 80
    expert_epochs: Count = 2
    first_max_start_epoch: Count | None = 10
    max_start_epoch: Count = 20
    lr_images: Positive = 100.0
    labels: Literal["hard", "soft", "learned"] = "learned"
    lr_labels: Rate = 2.0


class DATM(MTT):
    """MTT with other defaults: the upper end of the start epochs grows, the images to begin with are such that expert 0
    classifies them correctly, and labels are learned, beginning with that expert's logits."""

    name = "datm"
    settings_type = DATMSettings
    defaults = Defaults(start=Start("correct"))
