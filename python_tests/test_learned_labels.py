"""Labels that are learned: LD, DD with soft labels, and those of the learned part in trajectory matching."""

from dataclasses import replace

import pytest
import reference
import reference_options
import torch
from conftest import MODEL, run_for
from method_steps import ALL, TRAJECTORY, UNROLLED, assert_same_step, begin, real, task

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, normalized_labels, without_schedule
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods import DD, LD, MTT, SelMatch, Task
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.ld import LDSettings
from selmatch_ext.methods.mtt import chunks
from selmatch_ext.models import flat
from selmatch_ext.models.initial import xavier
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.seeds import generator
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Start
from selmatch_ext.studies.continual import restrict_set


def half_learned(digits, experts=None, dtype=torch.float64):
    """A task of which every second image is learned."""
    start = replace(begin("random", 2, digits, 3), distilled=torch.arange(20) % 2 == 0)
    return Task(start, Context(digits, 3), experts, dtype)


def one_hot(labels):
    return torch.eye(10, dtype=torch.float64)[labels]


def drawn(batch, g):
    return sample_augmentation(batch, 8, 8, strategy=ALL, generator=g)


# label distillation

STEPS = {"model": MODEL, "inner_steps": 3, "batch_syn": 8, "batch_real": 40, "lr_inner": 0.1}


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("model, strategy", [(MODEL, "none"), (MODEL, ALL), (MODEL + "BN", "none")])
def test_label_distillation_step(digits, model, strategy, turn):
    """In turn 1 the network has taken its first step of Adam on the set."""
    t = half_learned(digits)
    method = LD(t, LDSettings(**{**STEPS, "model": model}, lr_network=0.01, strategy=strategy))
    with torch.no_grad():
        method.soft.copy_(torch.rand(10, 10, generator=generator(0, "labels")).double().softmax(1))
    for iteration in range(turn + 1):
        got = method.loss(iteration, generator(0, "step", iteration))

    net, g = t.network(model, "network", 0), generator(0, "step", turn)
    labels = one_hot(t.start.labels).index_copy(0, torch.arange(0, 20, 2), method.soft)
    images, theta = t.start.images.double(), flat.flatten(net.parameters()).detach()
    if turn == 1:
        (batch,) = chunks(20, 8, 1, g)
        x = images[batch] if strategy == "none" else reference.augment(images[batch], drawn(8, g))
        theta = reference_options.first_adam_step(net, theta, x, labels.detach()[batch], 0.01)
        torch.testing.assert_close(method.state["network"], theta, rtol=1e-7, atol=1e-9)
        theta = method.state["network"]
    batches = chunks(20, 8, 3, g)
    tables = None if strategy == "none" else [drawn(len(batch), g) for batch in batches]
    order = torch.randperm(len(digits.train), generator=g)[:40]
    expected = reference_options.label_distillation(
        net, theta, images, labels, batches, 0.1, real(t, order), digits.train.labels[order], tables
    )
    assert list(method.learned) == ["labels"]
    assert_same_step(method, expected, got)


def test_labels_start_uniform_and_stay_probabilities(digits, tmp_path):
    t = half_learned(digits, dtype=torch.float32)
    method = LD(t, LDSettings(**STEPS, lr_labels=0.2))
    assert torch.equal(method.distilled().labels[::2], torch.full((10, 10), 0.1))
    run_for(method, 3, tmp_path, {}, seed=0)
    made = method.distilled()
    assert torch.equal(made.images, t.start.images) and torch.equal(
        made.labels[1::2].double(), one_hot(t.start.labels)[1::2]
    )
    learned = made.labels[::2]
    assert (learned >= 0).all() and (learned == 0).any() and (learned != 0.1).any()
    torch.testing.assert_close(learned.sum(1), torch.ones(10))


def test_normalized_labels():
    given = torch.tensor([[2.0, -1.0, 1.0], [0.2, 0.2, 0.0], [-1.0, 0.0, -2.0]])
    expected = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(normalized_labels(given), expected)


def test_the_network_starts_anew_when_its_loss_no_longer_falls(digits):
    """With patience 2: the means 2.5, 1.5 and 1 fall up to the fourth loss, and do not for the next two."""
    t = task(digits)
    method = LD(t, LDSettings(**STEPS, patience=2))
    method.loss(0, generator(0))
    method.state["age"].zero_()
    ages = []
    for loss in (3.0, 2.0, 1.0, 1.0, 1.0, 1.0):
        method._watch(loss)
        ages.append(int(method.state["age"]))
    assert ages == [1, 2, 3, 4, 5, 0] and method.state["number"] == 1
    method._advance_network(method.combined(), generator(0))
    assert torch.equal(method.state["network"], flat.flatten(t.network(MODEL, "network", 1).parameters()))
    assert not method.state["exp_avg"].any() and method.state["step"] == 0


# dataset distillation

UNROLLED_LABELS = {**UNROLLED, "labels": "learned", "lr": 0.2}


def test_step_of_soft_label_dataset_distillation(digits):
    """Labels that are no probabilities, of the images that are learned; Adam's first step on them is of size lr."""
    t = half_learned(digits)
    method = DD(t, DDSettings(**UNROLLED_LABELS))
    learned = method.learned["labels"]
    assert torch.equal(learned, one_hot(t.start.labels)[::2])
    with torch.no_grad():
        learned.copy_(torch.randn(10, 10, generator=generator(0, "labels")))
    got = method.loss(0, generator(0, "step"))
    net = t.network(MODEL, "network")
    starts = [xavier(net, generator(t.context.seed, "xavier", 0, k)) for k in range(2)]
    order = torch.randperm(len(digits.train), generator=generator(t.context.seed, "order", 0))[:50]
    labels = one_hot(t.start.labels).index_copy(0, torch.arange(0, 20, 2), learned)
    batches = [torch.arange(step, 20, 2) for step in (0, 1, 0, 1)]
    expected = reference.dataset_distillation(
        net, starts, method.combined(), labels, batches, method.raw, real(t, order), digits.train.labels[order], None
    )
    assert_same_step(method, expected, got)


def test_soft_labels_of_a_schedule_are_followed_and_survive_the_file(digits, tmp_path):
    t = half_learned(digits, dtype=torch.float32)
    method = DD(t, DDSettings(**UNROLLED_LABELS, init="known"))
    before = method.learned["labels"].detach().clone()
    run_for(method, 1, tmp_path, {}, seed=0)
    change = (method.learned["labels"] - before).detach().abs()
    torch.testing.assert_close(change, torch.full_like(change, 0.2), rtol=1e-3, atol=0)
    method.distilled().save(tmp_path / "d.safetensors")
    made = DistilledSet.load(tmp_path / "d.safetensors")
    assert torch.equal(made.labels[1::2].double(), one_hot(t.start.labels)[1::2]) and made.labels[::2].min() < 0
    start = made.schedule.starts[0].clone().requires_grad_()
    theta = reference.unrolled_sgd_full_graph(
        t.network(MODEL, "network"), start, made.images, made.labels, list(made.schedule.batches), made.schedule.rates
    )
    followed = flat.flatten(follow_schedule(made, Context(digits, 9)).parameters())
    torch.testing.assert_close(followed, theta, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="soft labels are not probabilities"):
        replace(made, schedule=None)
    alone = without_schedule(made)
    assert alone.schedule is None and torch.equal(alone.labels, normalized_labels(made.labels))
    chosen = choose(Start(str(tmp_path / "d.safetensors")), Context(digits), None, None).images
    assert torch.equal(chosen.labels, alone.labels)
    assert restrict_set(made, torch.tensor([0, 3])).schedule is None


def test_learned_labels_allow_fewer_images_than_classes(digits, tmp_path):
    t = task(digits, dtype=torch.float32)
    rows = torch.tensor([2, 5, 9, 11])
    fields = {name: getattr(t.start, name)[rows] for name in ("images", "labels", "distilled", "indices")}
    few = Task(replace(t.start, **fields), t.context, None, torch.float32)
    method = DD(few, DDSettings(**UNROLLED_LABELS))
    assert [batch.tolist() for batch in method.batches] == [[0, 1], [2, 3]] * 2
    run_for(method, 1, tmp_path, {}, seed=0)
    assert method.distilled().labels.shape == (4, 10)
    with pytest.raises(ValueError, match="each step takes equally many images of each class"):
        DD(few, DDSettings(**UNROLLED))


# trajectory matching


@pytest.mark.parametrize("labels", ["soft", "learned"])
@pytest.mark.parametrize("kind", [MTT, SelMatch])
def test_labels_of_the_learned_part_in_trajectory_matching(digits, experts, kind, labels):
    """Those of the other images stay one-hot, to the bit."""
    t = half_learned(digits, experts)
    method = kind(t, kind.settings_type(**TRAJECTORY, labels=labels, strategy="none"))
    got = method.loss(0, generator(0, "step"))
    g = generator(0, "step")
    expert, epoch = (int(torch.randint(n, (), generator=g)) for n in (experts.count, 3))
    start, target = (experts.row(expert, e).double() for e in (epoch, epoch + 1))
    net = t.network(experts.model, "student")
    logits = reference_options.outputs(net, experts.row(0, 3).double(), t.start.images[::2].double()).detach()
    torch.testing.assert_close(method.logits.detach(), logits, rtol=1e-9, atol=1e-9)
    leaf = method.logits if labels == "learned" else logits
    rows = leaf.exp() / leaf.exp().sum(1, keepdim=True)
    soft = one_hot(t.start.labels).index_copy(0, torch.arange(0, 20, 2), rows)
    theta = reference.unrolled_sgd_full_graph(
        net, start.clone().requires_grad_(), method.combined(), soft, chunks(20, 7, 3, g), method.lr
    )
    assert_same_step(method, ((theta - target) ** 2).sum() / ((start - target) ** 2).sum(), got)
    assert ("logits" in method.learned) == (labels == "learned")


def test_only_the_labels_of_learned_images_change(digits, experts, tmp_path):
    t = half_learned(digits, experts, torch.float32)
    settings = SelMatch.settings_type(**TRAJECTORY, labels="learned", lr_labels=50.0, lr_images=10.0, lr_lr=1e-8)
    method = SelMatch(t, settings)
    before = method.distilled()
    run_for(method, 2, tmp_path, {}, seed=0)
    made = method.distilled()
    assert torch.equal(made.labels[1::2].double(), one_hot(t.start.labels)[1::2])
    assert (made.labels != before.labels).any(1).tolist() == [True, False] * 10
