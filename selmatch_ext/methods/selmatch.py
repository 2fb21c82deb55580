"""SelMatch (arXiv 2406.18561): trajectory matching from a window of real images of the right difficulty, of which the
easier part is learned and the harder part stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

from selmatch_ext.methods.base import Defaults
from selmatch_ext.methods.mtt import MTT, MTTSettings
from selmatch_ext.ranges import Count, Positive
from selmatch_ext.settings import Evaluation, Experts, Start


@dataclass(frozen=True)
class SelMatchSettings(MTTSettings):
    """SelMatch (arXiv 2406.18561): trajectory matching from a selected window; defaults for CIFAR-10 at 5 %."""

    iterations: Count = 10000
    inner_steps: Count = 55
    expert_epochs: Count = 2
    max_start_epoch: Count = 80
    batch_syn: Count = 125
    lr_init: Positive = 0.001


class SelMatch(MTT):
    """MTT with other defaults: the start is a window, and 0.6 of it is learned (section 3 of the paper).

    The defaults are the paper's, but for two: difficulty is forgetting, counted here over 3 networks of 20 epochs (the
    paper's C-scores come from a file), and β is searched for (the paper's is 0.5)."""

    name = "selmatch"
    settings_type = SelMatchSettings
    defaults = Defaults(Start("window", ipc=250, alpha=0.6), Experts(), Evaluation())
