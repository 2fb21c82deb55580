"""Weights of a set's images: in its file, in training, and in the losses of the methods."""

import csv
from dataclasses import replace

import pytest
import torch
from conftest import CPU, MODEL, tiny_run
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from selmatch_ext import files
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, Schedule, as_selected, real_subset, to_train_on, weighted
from selmatch_ext.evaluation import evaluate, trained_on
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods import METHODS, Task
from selmatch_ext.seeds import generator
from selmatch_ext.selection.partial_update import marked
from selmatch_ext.settings import Training
from selmatch_ext.studies.continual import restrict_set
from selmatch_ext.training import batch_augmenter, train

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.5] * 10)


def chosen(digits, weights=WEIGHTS):
    """Four images of each class, the last two of them marked as learned."""
    indices = torch.cat([members[:4] for members in digits.members])
    return marked(real_subset(digits, indices, "craig", weights), 4, 0.5)


def test_weights_in_the_file(digits, tmp_path):
    made, path = chosen(digits), tmp_path / "d.safetensors"
    made.save(path)
    loaded = DistilledSet.load(path)
    assert loaded.weights.dtype == torch.float32 and torch.equal(loaded.weights, WEIGHTS)
    assert loaded.digest() == made.digest()
    assert len({made.digest(), chosen(digits, None).digest(), chosen(digits, WEIGHTS.flip(0)).digest()}) == 3
    chosen(digits, None).save(path)
    assert DistilledSet.load(path).weights is None and "weights" not in files.load_tensors(path, "distilled")[0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS.double(), r"weights is torch.float64 \(40,\); it must be torch.float32 \(40,\)"),
        (WEIGHTS[:39], r"weights is torch.float32 \(39,\)"),
        (WEIGHTS[:, None], r"weights is torch.float32 \(40, 1\)"),
        (WEIGHTS.where(torch.arange(40) != 7, -0.5), "weights holds -0.5, that of image 7; allowed are finite numbers"),
        (WEIGHTS.where(torch.arange(40) != 7, torch.nan), "weights holds nan, that of image 7"),
        (WEIGHTS.where(torch.arange(40) != 7, torch.inf), "weights holds inf, that of image 7"),
        (torch.zeros(40), "weights are all 0; at least one must be above 0"),
    ],
)
def test_wrong_weights(digits, tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        chosen(digits, weights)
    path = tmp_path / "d.safetensors"
    chosen(digits).save(path)
    tensors, metadata = files.load_tensors(path, "distilled")
    files.save_tensors(path, "distilled", {**tensors, "weights": weights}, metadata)
    with pytest.raises(ValueError, match=f"d.safetensors is damaged: {message}"):
        DistilledSet.load(path)


def test_copies_and_parts_keep_their_weights(digits):
    made = chosen(digits)
    for same in (as_selected(made), to_train_on(made), replace(made, lr=0.1)):
        assert torch.equal(same.weights, WEIGHTS)
    part = restrict_set(made, torch.tensor([2, 7]), 2)
    assert part.weights.tolist() == [0.5, 2.0, 0.5, 2.0] and part.labels.tolist() == [0, 0, 1, 1]
    assert restrict_set(chosen(digits, None), torch.tensor([2, 7])).weights is None


def test_exported_weights(digits, tmp_path):
    chosen(digits).export(tmp_path / "out")
    found = ImageFolder(tmp_path / "out")
    assert len(found.samples) == 40
    with open(tmp_path / "out" / "weights.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "weight"] and [float(row[1]) for row in rows[1:]] == WEIGHTS.tolist()
    assert all((tmp_path / "out" / row[0]).exists() for row in rows[1:])
    chosen(digits, None).export(tmp_path / "plain")
    assert not (tmp_path / "plain" / "weights.csv").exists()


@pytest.mark.parametrize("soft", [False, True])
def test_targets_make_the_mean_of_weight_times_loss(soft):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=g, dtype=torch.float64)
    weights = torch.rand(7, generator=g, dtype=torch.float64)
    labels = torch.randint(3, (7,), generator=g)
    labels = torch.rand(7, 3, generator=g, dtype=torch.float64).softmax(1) if soft else labels
    each = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(F.cross_entropy(logits, weighted(labels, weights, 3)), (weights * each).mean())


def test_an_epoch_is_sgd_on_weighted_losses():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    images, labels = torch.randn(10, 1, 2, 2, dtype=torch.float64), torch.randint(3, (10,))
    weights = torch.rand(10, dtype=torch.float64) * (torch.arange(10) != 3)
    w, b = (p.detach().clone() for p in model.parameters())
    augmenter = batch_augmenter("none", (2, 2))
    targets = weighted(labels, weights, 3)
    train(model, images.__getitem__, targets, Training(epochs=1, lr=0.1, batch=4), augmenter, generator(0))
    for batch in torch.randperm(10, generator=generator(0)).split(4):
        w, b = w.requires_grad_(), b.requires_grad_()
        losses = F.cross_entropy(images[batch].flatten(1) @ w.T + b, labels[batch], reduction="none")
        gradients = torch.autograd.grad((weights[batch] * losses).mean(), (w, b))
        w, b = (p.detach() - 0.1 * g for p, g in zip((w, b), gradients, strict=True))
    for trained, expected in zip(model.parameters(), (w, b), strict=True):
        torch.testing.assert_close(trained.detach(), expected, rtol=1e-12, atol=1e-12)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_evaluation_trains_by_the_weights(digits, tmp_path):
    how = replace(tiny_run().evaluation, networks=1, distilled_strategy="none", selected_strategy=None)
    context, ones = Context(digits), torch.ones(40)
    plain, weighty = (parameters(trained_on(chosen(digits, w), context, how)) for w in (None, WEIGHTS))
    assert not torch.allclose(plain, weighty)
    torch.testing.assert_close(parameters(trained_on(chosen(digits, ones), context, how)), plain)
    record = tmp_path / "record.json"
    evaluate(chosen(digits), context, how, record)
    with pytest.raises(ValueError, match="set: "):
        evaluate(chosen(digits, None), context, how, record)


def test_a_schedule_is_followed_by_the_weights(digits):
    schedule = Schedule(torch.tensor([0.1, 0.2]), torch.tensor([[0, 1, 2], [3, 4, 5]]), "MLP")
    made = replace(chosen(digits), schedule=schedule)
    context = Context(digits)
    tripled = replace(made, weights=3 * torch.ones(40))
    faster = replace(made, weights=None, schedule=replace(schedule, rates=3 * schedule.rates))
    a, b, c = (parameters(follow_schedule(subset, context)) for subset in (tripled, faster, made))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a, c)


SETTINGS = {
    "dc": {"model": MODEL, "batch_real": 5, "outer_loop": 1, "inner_loop": 1},
    "dm": {"model": MODEL, "batch_real": 5},
    "mtt": {"inner_steps": 2, "expert_epochs": 1, "max_start_epoch": 2, "batch_syn": 20, "strategy": "none"},
    "dd": {"model": "MLP", "steps": 2, "epochs": 1, "networks": 1, "batch_real": 50},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_methods_count_images_by_their_weights(name, digits, experts):
    """An image of weight 0 has no gradient, and weights of 1 change nothing."""
    method = METHODS[name]
    settings = method.settings_type(**SETTINGS[name])

    def loss(weights):
        made = replace(chosen(digits, weights), distilled=torch.ones(40, dtype=torch.bool))
        task = Task(made, Context(digits, 3), experts, torch.float64)
        instance = method(task, settings)
        value = instance.loss(0, generator(1))
        (gradient,) = torch.autograd.grad(value, instance.images)
        return value.detach(), gradient, instance.distilled().weights

    plain, ones, weighty = loss(None), loss(torch.ones(40)), loss(WEIGHTS)
    torch.testing.assert_close(ones[0], plain[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ones[1], plain[1], rtol=1e-8, atol=1e-12)
    assert not torch.allclose(weighty[0], plain[0]) and torch.equal(weighty[2], WEIGHTS) and plain[2] is None
    assert torch.equal(weighty[1].flatten(1).any(1), WEIGHTS > 0)


def test_a_class_without_weight_has_no_mean(digits):
    weights = WEIGHTS.where(torch.arange(40) // 4 != 2, 0.0)
    with pytest.raises(ValueError, match="the weights of class 2 are all 0: it has no mean to match"):
        METHODS["dm"](Task(chosen(digits, weights), Context(digits, 0, CPU)), METHODS["dm"].settings_type(model=MODEL))
