"""The rows of the papers' tables as named settings (`selmatch recipes`), each also at a scale for a laptop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from selmatch_ext.settings import Data, Evaluation, Experts, Matching, Run, Scores, Training, Window


@dataclass(frozen=True)
class Recipe:
    """One row. settings: what it is run with; published, ours: test accuracy in %, None where there is none."""

    name: str
    method: str
    settings: Run
    published: float | None = None
    ours: float | None = None


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


RECIPES = {recipe.name: recipe for recipe in _selmatch()}


def find(name: str) -> Recipe:
    """ValueError with the names there are for one that is not."""
    if name not in RECIPES:
        near = [known for known in RECIPES if known.split("-")[0] == name.split("-")[0]] or list(RECIPES)
        raise ValueError(f"no recipe is named {name!r}; there are {', '.join(near)} (all of them: selmatch recipes)")
    return RECIPES[name]


# --- reduced scale ----------------------------------------------------------------------------------------------------
#
# A tenth of the training images (of data sets with more than 50 classes a fifth), as large a share of them in the set,
# networks of width 32 in place of wider ones and of ResNet18, few experts of 15 epochs, 100 iterations of 20 steps, and
# 3 networks evaluated for 60 epochs. Scores are computed. Figures are then no reproduction, but compare methods.

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


def reduced(settings: Run) -> Run:
    """The same at the scale described above."""
    kind = settings.data.dataset.partition(":")[0]
    per_class = _CLASS_SIZE[kind] // (5 if kind in _MANY_CLASSES else 10)
    share = settings.window.ipc / _CLASS_SIZE[kind]
    training = Training(epochs=15, lr=0.02, momentum=0.9, batch=128)
    return replace(
        settings,
        data=replace(settings.data, per_class=per_class),
        scores=Scores("forgetting", narrow(settings.scores.model), runs=1, training=training),
        window=replace(settings.window, ipc=max(2, round(share * per_class))),
        experts=replace(settings.experts, model=narrow(settings.experts.model), count=3, training=training),
        matching=replace(
            settings.matching,
            iterations=100,
            inner_steps=20,
            expert_epochs=1,
            max_start_epoch=12,
            batch_syn=50,
            lr_images=300.0,
            lr_init=0.02,
            keep="activations",
        ),
        evaluation=_brief(settings.evaluation),
    )


def _brief(evaluation: Evaluation) -> Evaluation:
    training = replace(evaluation.training, epochs=60, batch=64, lr=min(evaluation.training.lr, 0.05))
    return replace(evaluation, model=narrow(evaluation.model), networks=3, training=training)


def listing() -> list[list[str]]:
    """The table of all recipes, header first."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:g}"

    rows = [["recipe", "method", "data", "published (%)", "ours (%)"]]
    for r in RECIPES.values():
        rows.append([r.name, r.method, r.settings.data.dataset, figure(r.published), figure(r.ours)])
    return rows
