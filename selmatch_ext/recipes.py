"""The rows of the papers' tables as named settings (`selmatch recipes`), each also at a scale for a laptop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from selmatch_ext.methods.base import CONVNET, LoopSettings
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.distribution import DMSettings
from selmatch_ext.methods.frepo import FRePoSettings
from selmatch_ext.methods.gradient import DCSettings
from selmatch_ext.methods.kip import KIPSettings
from selmatch_ext.methods.mtt import MTTSettings
from selmatch_ext.methods.selmatch import SelMatchSettings
from selmatch_ext.runner import Run
from selmatch_ext.settings import DSA, Data, Evaluation, Experts, Scores, Start, Training, Window


@dataclass(frozen=True)
class Recipe:
    """One row. settings: what it is run with; published: test accuracy in %, None where there is none."""

    name: str
    settings: Run
    published: float | None = None

    @property
    def method(self) -> str:
        """Its method's name."""
        return self.settings.method


_PAPERS = replace(CONVNET, draw_per="batch")
"""As CONVNET, with the augmentation of the public code of DC, DSA, DM and MTT."""

# --- SelMatch (arXiv 2406.18561): ipc -> alpha, beta, epochs of evaluation --------------------------------------------

_CIFAR10 = {250: (0.6, 0.5, 1000), 500: (0.2, 0.3, 500), 1000: (0.1, 0.2, 250), 1500: (0.1, 0.2, 167)}
_CIFAR100 = {25: (0.8, 0.8, 1000), 50: (0.6, 0.7, 500), 100: (0.3, 0.6, 250), 150: (0.2, 0.4, 167)}
_TINY = {50: (0.6, 0.8, 500), 100: (0.5, 0.7, 250)}


def _selmatch() -> Iterator[Recipe]:
    evaluation = Evaluation()
    for name, dataset, rows in (("cifar10", "CIFAR10", _CIFAR10), ("cifar100", "CIFAR100", _CIFAR100)):
        for ipc, (alpha, beta, epochs) in rows.items():
            settings = Run.of(
                "selmatch",
                data=Data(dataset),
                start=Start("window", ipc, alpha, Window(beta), Scores(f"{name}-cscore.npz")),
                settings=SelMatchSettings(lr_images=10000.0 if name == "cifar10" and ipc >= 1000 else 1000.0),
                evaluation=replace(evaluation, training=replace(evaluation.training, epochs=epochs)),
            )
            yield Recipe(f"selmatch-{name}-ipc{ipc}", settings)
    for ipc, (alpha, beta, epochs) in _TINY.items():
        training = replace(evaluation.training, epochs=epochs)
        scores = Scores("forgetting", "ConvNetD4BN", training=Training(epochs=100))
        settings = Run.of(
            "selmatch",
            data=Data("tinyimagenet:tiny-imagenet-200"),
            start=Start("window", ipc, alpha, Window(beta), scores),
            experts=Experts("ConvNetD4BN"),
            settings=SelMatchSettings(inner_steps=20),
            evaluation=replace(evaluation, model="ResNet18BN_Tiny", training=training),
        )
        yield Recipe(f"selmatch-tinyimagenet-ipc{ipc}", settings)


# --- MTT (arXiv 2203.11932) and DATM (arXiv 2310.05773) ---------------------------------------------------------------

_PLAIN = replace(_PAPERS, networks=20, distilled_strategy="none", training=replace(_PAPERS.training, epochs=300))


def _trajectories() -> Iterator[Recipe]:
    row = {"data": Data("CIFAR10", zca=True), "evaluation": _PAPERS}
    for ipc, published in ((1, 46.3), (10, 65.3), (50, 71.6)):
        yield Recipe(f"mtt-cifar10-ipc{ipc}", Run.of("mtt", start=Start(ipc=ipc), **row), published)
    yield Recipe("datm-cifar10-ipc10", Run.of("datm", **row))


# --- DC (arXiv 2006.05929), DSA (arXiv 2102.08259), DM (arXiv 2110.04181): % at ipc 1, 10 and 50 ----------------------

_DC = {
    "MNIST": (91.7, 97.4, 98.8),
    "FashionMNIST": (70.5, 82.3, 83.6),
    "SVHN": (31.2, 76.1, 82.3),
    "CIFAR10": (28.3, 44.9, 53.9),
}
_DSA = {
    "MNIST": (88.7, 97.8, 99.2),
    "FashionMNIST": (70.6, 84.6, 88.7),
    "SVHN": (27.5, 79.2, 84.4),
    "CIFAR10": (28.8, 52.1, 60.6),
}
_DM = {"CIFAR10": (None, None, None)}


def _matching() -> Iterator[Recipe]:
    for method, table in (("dc", _DC), ("dsa", _DSA), ("dm", _DM)):
        for dataset, figures in table.items():
            for ipc, published in zip((1, 10, 50), figures, strict=True):
                row = Run.of(method, data=Data(dataset), evaluation=_PLAIN)
                row = replace(row, start=replace(row.start, ipc=ipc))
                if method != "dc":
                    strategy = DSA.replace("_flip", "") if dataset in ("MNIST", "SVHN") else DSA
                    evaluation = replace(_PAPERS, networks=20, distilled_strategy=strategy)
                    settings: Any = row.settings
                    row = replace(row, settings=replace(settings, strategy=strategy), evaluation=evaluation)
                yield Recipe(f"{method}-{dataset.lower()}-ipc{ipc}", row, published)


# --- DD (arXiv 1811.10959) --------------------------------------------------------------------------------------------


def _unrolled() -> Iterator[Recipe]:
    rows = (
        ("dd-mnist-known-10", "MNIST", 1, DDSettings(steps=1, init="known"), 1, 94.0),
        ("dd-mnist-unknown-100", "MNIST", 10, DDSettings(steps=10, init="unknown"), 20, 80.0),
        ("dd-cifar10-known-100", "CIFAR10", 10, DDSettings(model="AlexNet", init="known", lr_init=0.001), 1, 54.0),
    )
    for name, dataset, ipc, settings, networks, published in rows:
        evaluation = replace(_PLAIN, model=settings.model, networks=networks)
        start = Start("noise", ipc=ipc)
        yield Recipe(
            name, Run.of("dd", settings=settings, data=Data(dataset), start=start, evaluation=evaluation), published
        )


# --- FRePo (arXiv 2206.00719) and KIP (arXiv 2011.00050), whose published figures are of convolutional kernels --------


def _regressions() -> Iterator[Recipe]:
    row = Run.of("frepo", data=Data("CIFAR10", zca=True))
    for ipc, steps, published in ((1, 1000, 46.8), (10, 2000, 65.5), (50, 5000, 71.7)):
        evaluation = replace(row.evaluation, training=replace(row.evaluation.training, epochs=steps))
        yield Recipe(f"frepo-cifar10-ipc{ipc}", replace(row, start=Start(ipc=ipc), evaluation=evaluation), published)
    yield Recipe("kip-cifar10-ipc10", Run.of("kip", data=Data("CIFAR10", zca=True)))


# --- a demonstration --------------------------------------------------------------------------------------------------


def _digits() -> Iterator[Recipe]:
    """SelMatch on scikit-learn's digits (8x8, one channel; no flips) within minutes on two CPU cores."""
    strategy, model = "color_crop_cutout_scale_rotate", "ConvNetW32"
    settings = Run.of(
        "selmatch",
        data=Data("digits"),
        start=Start(
            "window",
            ipc=6,
            alpha=0.85,
            window=Window(step=0.2, networks=2),
            scores=Scores("el2n", model, training=Training(epochs=10, lr=0.02, momentum=0.9, batch=64)),
        ),
        experts=Experts(model, count=4, strategy=strategy, training=Training(epochs=20, lr=0.02, batch=64)),
        settings=SelMatchSettings(
            iterations=300,
            inner_steps=20,
            expert_epochs=2,
            max_start_epoch=16,
            batch_syn=30,
            lr_images=300.0,
            lr_init=0.02,
            strategy=strategy,
        ),
        evaluation=Evaluation(
            model=model,
            networks=10,
            distilled_strategy=strategy,
            selected_strategy="crop",
            training=Training(epochs=150, lr=0.02, momentum=0.9, weight_decay=5e-4, batch=30, schedule="cosine"),
        ),
    )
    yield Recipe(DEMO, settings)


DEMO = "selmatch-digits-ipc6"
RECIPES = {
    r.name: r for rows in (_selmatch, _trajectories, _matching, _unrolled, _regressions, _digits) for r in rows()
}


def find(name: str) -> Recipe:
    """ValueError with the names there are for one that is not."""
    if name not in RECIPES:
        near = [known for known in RECIPES if known.split("-")[0] == name.split("-")[0]] or list(RECIPES)
        raise ValueError(f"no recipe is named {name!r}; there are {', '.join(near)} (all of them: selmatch recipes)")
    return RECIPES[name]


# --- reduced scale ----------------------------------------------------------------------------------------------------
#
# For all: a tenth of the training images (of data sets with more than 50 classes a fifth), networks of width 32 in
# place of wider ones and of ResNet18, 3 experts of 15 epochs, at most 3 evaluated networks of 60 epochs. SelMatch: as
# large a share of the images as in the whole recipe; scores are computed. Trajectory matching: 100 iterations of at
# most 20 steps. DC and DSA: 20 networks; DM: 200 iterations; all with 64 real images of a class. DD: 40 passes over the
# images. KIP and FRePo: 300 iterations. The figures are no reproduction, but compare methods.

_MANY_CLASSES = {"CIFAR100": 500, "tinyimagenet": 500}
_CLASS_SIZE = {
    "CIFAR10": 5000,
    "MNIST": 5421,
    "FashionMNIST": 6000,
    "SVHN": 4659,
    **_MANY_CLASSES,
}  # the smallest class


def narrow(model: str) -> str:
    """The name of a ConvNet, at most 32 wide, with depth and norm of a wider one; of ResNet18 with its norm. FRePo's
    network begins 16 wide."""
    if model.startswith("ResNet"):
        return "ConvNetW32BN" if "BN" in model else "ConvNetW32"
    if model.startswith("ConvNet"):
        return "ConvNetW32" + re.sub(r"W\d+", "", model.removeprefix("ConvNet"))
    if model.startswith("FRePoNet"):
        return re.sub(r"(FRePoNet(?:D\d+)?)(?:W\d+)?", r"\1W16", model)
    return model


def reduced(settings: Run) -> Run:
    """The same at the scale described above."""
    kind = settings.data.dataset.partition(":")[0]
    if kind not in _CLASS_SIZE:
        raise ValueError(f"--reduced goes with the data sets {', '.join(_CLASS_SIZE)}; the settings have {kind}")
    per_class = _CLASS_SIZE[kind] // (5 if kind in _MANY_CLASSES else 10)
    training = Training(epochs=15, lr=0.02, momentum=0.9, batch=128)
    start, scores = settings.start, settings.start.scores
    if start.select == "window":
        scores = Scores("forgetting", narrow(scores.model), runs=1, training=training)
        ipc = max(2, round(start.ipc / _CLASS_SIZE[kind] * per_class))
        start = replace(start, scores=scores, ipc=ipc)
    brief = _BRIEF.get(settings.method)
    experts = replace(settings.experts, model=narrow(settings.experts.model), count=3, training=training)
    return replace(
        settings,
        data=replace(settings.data, per_class=per_class),
        start=start,
        experts=experts,
        settings=settings.settings if brief is None else brief(settings.settings, start.ipc),
        evaluation=_brief(settings.evaluation),
    )


def _brief_matching(settings: MTTSettings, ipc: int) -> MTTSettings:
    first = None if settings.first_max_start_epoch is None else 6
    return replace(
        settings,
        iterations=100,
        inner_steps=min(20, settings.inner_steps),
        expert_epochs=1,
        first_max_start_epoch=first,
        max_start_epoch=12,
        batch_syn=50,
        lr_images=300.0,
        lr_init=0.02,
        keep="activations",
    )


def _brief_gradients(settings: DCSettings, ipc: int) -> DCSettings:
    loops: dict[str, Any] = {} if ipc == 1 else {"outer_loop": 4, "inner_loop": 10}
    return replace(settings, model=narrow(settings.model), batch_real=64, iterations=20, **loops)


def _brief_features(settings: DMSettings, ipc: int) -> DMSettings:
    return replace(settings, model=narrow(settings.model), batch_real=64, iterations=200)


def _brief_unrolled(settings: DDSettings, ipc: int) -> DDSettings:
    return replace(settings, passes=40, halve_every=10, networks=1)


def _brief_kernels(settings: KIPSettings, ipc: int) -> KIPSettings:
    return replace(settings, iterations=300, batch_real=1000)


def _brief_pool(settings: FRePoSettings, ipc: int) -> FRePoSettings:
    return replace(
        settings, model=narrow(settings.model), iterations=300, batch_real=256, optimizer="adam", lr_images=0.01
    )


_BRIEF: dict[str, Callable[[Any, int], LoopSettings]] = {
    **dict.fromkeys(("mtt", "datm", "selmatch"), _brief_matching),
    **dict.fromkeys(("dc", "dsa"), _brief_gradients),
    "dm": _brief_features,
    "dd": _brief_unrolled,
    "kip": _brief_kernels,
    "frepo": _brief_pool,
}


def _brief(evaluation: Evaluation) -> Evaluation:
    training = replace(evaluation.training, epochs=60, batch=64, lr=min(evaluation.training.lr, 0.05))
    return replace(evaluation, model=narrow(evaluation.model), networks=min(3, evaluation.networks), training=training)


def listing() -> list[list[str]]:
    """The table of all recipes, header first."""
    rows = [["recipe", "method", "data", "published (%)"]]
    for r in RECIPES.values():
        rows.append([r.name, r.method, r.settings.data.dataset, "" if r.published is None else f"{r.published:g}"])
    return rows
