"""The options of trajectory matching: moving average, parameters that are left out, the nearest step, flat experts."""

from dataclasses import replace

import pytest
import reference
import reference_options
import torch
from conftest import MODEL, run_for
from method_steps import ALL, TRAJECTORY, assert_same_step, task
from torch.nn import functional as F

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.methods import MTT
from selmatch_ext.methods.end_step import nearest_step
from selmatch_ext.methods.mtt import MTTSettings, chunks
from selmatch_ext.methods.partial_distance import compared
from selmatch_ext.models import flat
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.ranges import SettingError
from selmatch_ext.runner import Run, distill
from selmatch_ext.seeds import generator
from selmatch_ext.selection.start import Chosen
from selmatch_ext.settings import Training
from selmatch_ext.sharpness import sharpness_aware
from selmatch_ext.training import batch_augmenter, train

# moving average (FTD)

AVERAGED = MTTSettings(**TRAJECTORY, ema=0.75, labels="learned", lr_lr=1e-6, lr_images=10.0, experts_per_iteration=2)


def test_the_set_is_the_average_of_what_was_learned(digits, experts, tmp_path):
    """0.75³ s₀ + 0.25 (0.75² s₁ + 0.75 s₂ + s₃), of images, logits and η; beside it the last state."""
    t = task(digits, experts=experts)
    method = MTT(t, AVERAGED)
    seen = [[v.detach().clone() for v in method.learned.values()]]
    for iterations in (1, 2, 3):
        method = MTT(t, AVERAGED)
        run_for(method, iterations, tmp_path, {}, seed=1)
        seen.append([v.detach().clone() for v in method.learned.values()])
    images, lr, logits = (0.421875 * a + 0.25 * (0.5625 * b + 0.75 * c + d) for a, b, c, d in zip(*seen, strict=True))
    made, last = method.distilled(), method.further_sets()["last"]
    torch.testing.assert_close(made.images, images.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.labels, logits.softmax(1).float(), rtol=1e-6, atol=1e-6)
    assert made.lr == pytest.approx(lr.item(), rel=1e-12) and last.lr == seen[3][1].item()
    assert torch.equal(last.images, seen[3][0].float()) and not torch.equal(made.images, last.images)
    assert all(torch.equal(a, b) for a, b in zip(method.learned.values(), seen[3], strict=True))


def test_a_run_in_pieces_has_the_same_average(digits, experts, tmp_path):
    t = task(digits, experts=experts, dtype=torch.float32)
    whole = MTT(t, AVERAGED)
    run_for(whole, 3, tmp_path / "whole", {}, seed=1)
    for iterations in (1, 3):
        last = MTT(t, AVERAGED)
        run_for(last, iterations, tmp_path / "pieces", {}, seed=1)
    assert whole.distilled().digest() == last.distilled().digest()
    assert whole.further_sets()["last"].digest() == last.further_sets()["last"].digest() != last.distilled().digest()


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_the_last_state_is_written_beside_the_average(digits, experts, tmp_path, ema):
    t = task(digits, experts=experts)
    settings = replace(AVERAGED, iterations=1, labels="hard", ema=ema)
    method = distill(Run("mtt", settings), Chosen(t.start), t.context, tmp_path, experts)
    made = DistilledSet.load(tmp_path / "distilled.safetensors")
    assert made.digest() == method.distilled().digest()
    path = tmp_path / "last.safetensors"
    assert path.exists() == (ema > 0)
    if ema:
        assert DistilledSet.load(path).digest() == method.last().digest() != made.digest()


# which parameters are compared, after which step


@pytest.mark.parametrize("strategy", ["none", ALL])
@pytest.mark.parametrize("options", [{"skip_smallest": 0.5}, {"skip_first": 0.3}, {"end_step": "nearest"}, "all"])
def test_step_with_options(digits, experts, options, strategy):
    """Four steps of a large rate: the student passes the target, and the nearest step is not the last one."""
    if options == "all":
        options = {"skip_smallest": 0.25, "skip_first": 0.5, "end_step": "nearest"}
    t = task(digits, experts=experts)
    settings = MTTSettings(**{**TRAJECTORY, "inner_steps": 4, "lr_init": 0.2}, strategy=strategy, **options)
    method = MTT(t, settings)
    got = method.loss(0, generator(0, "step"))

    g = generator(0, "step")
    expert, epoch = (int(torch.randint(n, (), generator=g)) for n in (experts.count, 3))
    start, target = (experts.row(expert, e).double() for e in (epoch, epoch + 1))
    batches, tables = chunks(20, 7, 4, g), [None] * 4
    if strategy != "none":
        tables = [sample_augmentation(len(b), 8, 8, strategy=strategy, generator=g) for b in batches]
    net, students = t.network(experts.model, "student"), []
    for end in range(1, 5):
        given = None if strategy == "none" else tables[:end]
        inputs = start.clone().requires_grad_(), method.images, t.start.labels, batches[:end], method.lr
        students.append(reference.unrolled_sgd_full_graph(net, *inputs, given))
    student = students[-1]
    if "end_step" in options:
        student = min(students, key=lambda s: (s - target).abs().sum().item())
        assert student is not students[-1]
    expected = reference_options.partial_distance(
        student, start, target, options.get("skip_first", 0), options.get("skip_smallest", 0)
    )
    assert_same_step(method, expected, got)


def test_parameters_that_are_compared():
    student, target = torch.tensor([0.0, 5.0, 1.0, -3.0, 1.0, 2.0]), torch.zeros(6)
    assert compared(student, target, 0, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert compared(student, target, 0, 0.5).tolist() == [1, 3, 5]
    assert compared(student, target, 1 / 3, 0.25).tolist() == [3, 4, 5]
    assert compared(student, target, 0, 0.99).tolist() == [1]
    with pytest.raises(SettingError, match="skip_smallest is 1.0; allowed is 0 to below 1"):
        MTTSettings(skip_smallest=1.0)
    with pytest.raises(SettingError, match="end_step is nearest; allowed is last where inner_momentum is above 0"):
        MTTSettings(end_step="nearest", inner_momentum=0.5)


def test_the_nearest_step_leaves_global_draws_as_they_were():
    """By the sum of absolute differences the second of (3, 3), (0, 5), (0, 9), (0, 5); by squares it were the first."""
    states = torch.tensor([[3.0, 3.0], [0.0, 5.0], [0.0, 9.0], [0.0, 5.0]])
    before = torch.get_rng_state()
    assert nearest_step(lambda _, i: states[i] + 0 * torch.rand(()), states[0], torch.zeros(2), 4) == 2
    assert torch.equal(before, torch.get_rng_state())


# flat experts (FTD)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_of_flat_training(digits, alpha, adaptive):
    images, labels = digits.normalize(digits.train.images[:9], dtype=torch.float64), digits.train.labels[:9]
    model = Context(digits).network(MODEL, "flat").double()
    theta = flat.flatten(model.parameters()).detach().requires_grad_()
    expected = theta.detach() - 0.1 * reference_options.sharpness_aware_gradient(
        lambda at: F.cross_entropy(reference_options.outputs(model, at, images), labels), theta, 0.5, alpha, adaptive
    )
    settings = Training(1, 0.1, sharpness_rho=0.5, sharpness_alpha=alpha, sharpness_adaptive=adaptive)
    train(model, images.__getitem__, labels, settings, batch_augmenter("none", (8, 8)), generator(0))
    torch.testing.assert_close(flat.flatten(model.parameters()).detach(), expected, rtol=1e-9, atol=1e-12)
    assert (expected - theta).abs().max() > 1e-3


def test_flat_training_leaves_alone_what_has_no_gradient():
    used, unused = torch.tensor([3.0, 0.0], requires_grad=True), torch.ones(2, requires_grad=True)
    used.square().sum().backward()
    with sharpness_aware([used, unused], Training(sharpness_rho=0.5, sharpness_alpha=1.0)):
        assert used.tolist() == [3.5, 0.0] and used.grad is None
        used.square().sum().backward()
    assert used.tolist() == [3.0, 0.0] and used.grad.tolist() == [7.0, 0.0] and unused.grad is None
