"""The rows of the papers' tables as named settings (`selmatch recipes`), each also at a scale for a laptop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from selmatch_ext.settings import (
    DSA,
    Data,
    DATMSettings,
    DCSettings,
    DDSettings,
    DMSettings,
    DSASettings,
    Evaluation,
    Experts,
    Matching,
    MethodRun,
    MTTSettings,
    Run,
    Scores,
    Training,
    Window,
)


@dataclass(frozen=True)
class Recipe:
    """One row. settings: what it is run with; published: test accuracy in %, None where there is none."""

    name: str
    method: str
    settings: Run | MethodRun
    published: float | None = None


# --- SelMatch (arXiv 2406.18561): ipc -> alpha, beta, epochs of evaluation --------------------------------------------

_CIFAR10 = {250: (0.6, 0.5, 1000), 500: (0.2, 0.3, 500), 1000: (0.1, 0.2, 250), 1500: (0.1, 0.2, 167)}
_CIFAR100 = {25: (0.8, 0.8, 1000), 50: (0.6, 0.7, 500), 100: (0.3, 0.6, 250), 150: (0.2, 0.4, 167)}
_TINY = {50: (0.6, 0.8, 500), 100: (0.5, 0.7, 250)}


def _selmatch() -> Iterator[Recipe]:
    evaluation = Evaluation()
    for name, dataset, rows in (("cifar10", "CIFAR10", _CIFAR10), ("cifar100", "CIFAR100", _CIFAR100)):
        for ipc, (alpha, beta, epochs) in rows.items():
            settings = Run(
                data=Data(dataset),
                scores=Scores(f"{name}-cscore.npz"),
                window=Window(ipc, alpha, beta),
                matching=Matching(lr_images=10000.0 if name == "cifar10" and ipc >= 1000 else 1000.0),
                evaluation=replace(evaluation, training=replace(evaluation.training, epochs=epochs)),
            )
            yield Recipe(f"selmatch-{name}-ipc{ipc}", "selmatch", settings)
    for ipc, (alpha, beta, epochs) in _TINY.items():
        training = replace(evaluation.training, epochs=epochs)
        settings = Run(
            data=Data("tinyimagenet:tiny-imagenet-200"),
            scores=Scores("forgetting", "ConvNetD4BN", training=Training(epochs=100)),
            window=Window(ipc, alpha, beta),
            experts=Experts("ConvNetD4BN"),
            matching=Matching(inner_steps=20),
            evaluation=replace(evaluation, model="ResNet18BN_Tiny", training=training),
        )
        yield Recipe(f"selmatch-tinyimagenet-ipc{ipc}", "selmatch", settings)


# --- MTT (arXiv 2203.11932) and DATM (arXiv 2310.05773) ---------------------------------------------------------------

_CONVNET = Experts("ConvNet", training=Training(epochs=50))
_STEP = Training(epochs=300, lr=0.01, momentum=0.9, weight_decay=5e-4, batch=256, schedule="step")
_PLAIN = Evaluation("ConvNet", networks=20, distilled_strategy="none", training=_STEP)
_AUGMENTED = replace(_PLAIN, distilled_strategy=DSA, training=replace(_STEP, epochs=1000))


def _trajectories() -> Iterator[Recipe]:
    evaluation = replace(_AUGMENTED, networks=5)
    data = Data("CIFAR10", zca=True)
    for ipc, published in ((1, 46.3), (10, 65.3), (50, 71.6)):
        row = MethodRun(MTTSettings(ipc=ipc), data, evaluation, _CONVNET)
        yield Recipe(f"mtt-cifar10-ipc{ipc}", "mtt", row, published)
    yield Recipe("datm-cifar10-ipc10", "datm", MethodRun(DATMSettings(ipc=10), data, evaluation, _CONVNET))


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
    for method, kind, table in (("dc", DCSettings, _DC), ("dsa", DSASettings, _DSA), ("dm", DMSettings, _DM)):
        for dataset, figures in table.items():
            for ipc, published in zip((1, 10, 50), figures, strict=True):
                settings, evaluation = kind(ipc=ipc), _PLAIN
                if method != "dc":
                    strategy = DSA.replace("_flip", "") if dataset in ("MNIST", "SVHN") else DSA
                    settings = replace(settings, strategy=strategy)
                    evaluation = replace(_AUGMENTED, distilled_strategy=strategy)
                row = MethodRun(settings, Data(dataset), evaluation)
                yield Recipe(f"{method}-{dataset.lower()}-ipc{ipc}", method, row, published)


# --- DD (arXiv 1811.10959) --------------------------------------------------------------------------------------------


def _unrolled() -> Iterator[Recipe]:
    rows = (
        ("dd-mnist-known-10", "MNIST", DDSettings(steps=1, init="known"), 1, 94.0),
        ("dd-mnist-unknown-100", "MNIST", DDSettings(steps=10, init="unknown"), 20, 80.0),
        ("dd-cifar10-known-100", "CIFAR10", DDSettings(model="AlexNet", init="known", lr_init=0.001), 1, 54.0),
    )
    for name, dataset, settings, networks, published in rows:
        evaluation = replace(_PLAIN, model=settings.model, networks=networks)
        yield Recipe(name, "dd", MethodRun(settings, Data(dataset), evaluation), published)


RECIPES = {r.name: r for rows in (_selmatch, _trajectories, _matching, _unrolled) for r in rows()}


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
# images. The figures are no reproduction, but compare methods.

_MANY_CLASSES = {"CIFAR100": 500, "tinyimagenet": 500}
_CLASS_SIZE = {
    "CIFAR10": 5000,
    "MNIST": 5421,
    "FashionMNIST": 6000,
    "SVHN": 4659,
    **_MANY_CLASSES,
}  # the smallest class


def narrow(model: str) -> str:
    """The name of a ConvNet, at most 32 wide, with depth and norm of a wider one; of ResNet18 with its norm."""
    if model.startswith("ResNet"):
        return "ConvNetW32BN" if "BN" in model else "ConvNetW32"
    if model.startswith("ConvNet"):
        return "ConvNetW32" + re.sub(r"W\d+", "", model.removeprefix("ConvNet"))
    return model


def reduced(settings: Run | MethodRun) -> Run | MethodRun:
    """The same at the scale described above."""
    kind = settings.data.dataset.partition(":")[0]
    per_class = _CLASS_SIZE[kind] // (5 if kind in _MANY_CLASSES else 10)
    training = Training(epochs=15, lr=0.02, momentum=0.9, batch=128)
    changes = {"data": replace(settings.data, per_class=per_class), "evaluation": _brief(settings.evaluation)}
    if settings.experts is not None:
        model = narrow(settings.experts.model)
        changes["experts"] = replace(settings.experts, model=model, count=3, training=training)
    if isinstance(settings, MethodRun):
        return replace(settings, settings=_brief_method(settings.settings), **changes)
    share = settings.window.ipc / _CLASS_SIZE[kind]
    return replace(
        settings,
        scores=Scores("forgetting", narrow(settings.scores.model), runs=1, training=training),
        window=replace(settings.window, ipc=max(2, round(share * per_class))),
        matching=_brief_matching(settings.matching),
        **changes,
    )


def _brief_matching(settings: Matching) -> Matching:
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


def _brief_method(settings):
    """The settings of a method other than SelMatch at the scale described above."""
    if isinstance(settings, Matching):
        return _brief_matching(settings)
    if isinstance(settings, DDSettings):
        return replace(settings, passes=40, halve_every=10, networks=1)
    settings = replace(settings, model=narrow(settings.model), batch_real=64)
    if isinstance(settings, DMSettings):
        return replace(settings, iterations=200)
    loops = {} if settings.ipc == 1 else {"outer_loop": 4, "inner_loop": 10}
    return replace(settings, iterations=20, **loops)


def _brief(evaluation: Evaluation) -> Evaluation:
    training = replace(evaluation.training, epochs=60, batch=64, lr=min(evaluation.training.lr, 0.05))
    return replace(evaluation, model=narrow(evaluation.model), networks=min(3, evaluation.networks), training=training)


def listing() -> list[list[str]]:
    """The table of all recipes, header first."""
    rows = [["recipe", "method", "data", "published (%)"]]
    for r in RECIPES.values():
        rows.append([r.name, r.method, r.settings.data.dataset, "" if r.published is None else f"{r.published:g}"])
    return rows
