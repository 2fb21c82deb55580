"""Scores of a set: probabilities that stand for them, their file, and training by the squared error."""

from dataclasses import replace

import pytest
import torch
from conftest import random_set, tiny_run

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.soft_labels import Regression, centered, probabilities
from selmatch_ext.evaluation import trained_on
from selmatch_ext.seeds import generator
from selmatch_ext.selection.start import choose
from selmatch_ext.settings import Start, Training
from selmatch_ext.studies.continual import restrict_set
from selmatch_ext.training import batch_augmenter, learning_rate, train


def scores(count, classes=10, seed=0):
    return torch.randn(count, classes, generator=generator(seed, "scores"))


def test_probabilities_are_the_nearest_ones():
    """By bisection: max(v − t, 0) sums to 1 for one t."""
    given = scores(50, 7).double()
    values, low = given + 1 / 7, (given + 1 / 7).min(1).values - 1
    high = values.max(1).values
    for _ in range(80):
        middle = (low + high) / 2
        above = (values - middle.unsqueeze(1)).clamp(min=0).sum(1) > 1
        low, high = middle.where(above, low), high.where(above, middle)
    expected = (values - low.unsqueeze(1)).clamp(min=0)
    torch.testing.assert_close(probabilities(given), expected, rtol=0, atol=1e-12)
    assert torch.equal(probabilities(given).argmax(1), given.argmax(1))


def test_probabilities_undo_centering():
    labels = torch.tensor([2, 0, 1])
    torch.testing.assert_close(probabilities(centered(labels, 3)), torch.eye(3)[labels])
    soft = torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(probabilities(centered(soft, 3)), soft)
    wild = probabilities(1e6 * scores(20))
    assert (wild >= 0).all() and (wild.sum(1) - 1).abs().max() < 1e-6


def test_scores_are_saved_and_checked(digits, tmp_path):
    subset = random_set(digits, 1)
    held = replace(subset, scores=scores(10))
    held.save(tmp_path / "set.safetensors")
    again = DistilledSet.load(tmp_path / "set.safetensors")
    assert torch.equal(again.scores, held.scores) and again.digest() == held.digest() != subset.digest()
    assert torch.equal(again.regression().scores, held.scores)
    assert torch.equal(subset.regression().scores, centered(subset.labels, 10))
    with pytest.raises(ValueError, match=r"scores is torch.float32 \(10, 9\); it must be torch.float32 \(10, 10\)"):
        replace(subset, scores=scores(10, 9))
    with pytest.raises(ValueError, match="scores hold NaN"):
        replace(subset, scores=scores(10) / 0)
    assert restrict_set(held, torch.tensor([1, 4])).scores is None
    marked = replace(held, distilled=~held.distilled)
    marked.save(tmp_path / "start.safetensors")
    started = choose(Start(str(tmp_path / "start.safetensors")), Context(digits), None, None).images
    assert started.scores is None and torch.equal(started.labels, held.labels)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_by_the_squared_error_is_the_plain_loop(digits, optimizer, weights):
    context, y = Context(digits), scores(6).double()
    x = digits.normalize(digits.train.images[:6], dtype=torch.float64)
    settings = Training(4, lr=0.05, batch=4, optimizer=optimizer, weight_decay=0.01, warmup=2, schedule="cosine")
    nets = [context.network("MLP", "net").double() for _ in range(2)]
    none = batch_augmenter("none", digits.image_size)
    train(nets[0], x.__getitem__, Regression(y, weights), settings, none, generator(0, "order"))
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    plain, g = kinds[optimizer](nets[1].parameters(), lr=1.0, weight_decay=0.01), generator(0, "order")
    for rate in (0.025, 0.05, 0.05, 0.0005):
        plain.param_groups[0]["lr"] = rate
        for i in torch.randperm(6, generator=g).split(4):
            errors = (nets[1](x[i]) - y[i]).square().sum(1) / 2
            plain.zero_grad()
            (errors if weights is None else errors * weights[i]).mean().backward()
            plain.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_rates_rise_and_then_follow_the_schedule():
    settings = Training(12, lr=1.0, warmup=4, schedule="cosine")
    rates = [learning_rate(settings, epoch) for epoch in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[-1] == pytest.approx(0.01)
    assert rates[4:] == [learning_rate(replace(settings, epochs=8, warmup=0), epoch) for epoch in range(8)]
    flat = Training(3, lr=1.0, warmup=5)
    assert [learning_rate(flat, epoch) for epoch in range(3)] == pytest.approx([0.2, 0.4, 0.6])


def test_evaluations_regress_on_scores_where_they_are_asked_to(digits):
    """Scores of shifted classes: a network trained by the squared error follows them, one by the cross-entropy
    labels."""
    subset = random_set(digits, 10)
    shifted = replace(subset, scores=centered((subset.labels + 1) % 10, 10))
    training = Training(epochs=60, lr=0.02, momentum=0.9, batch=50)
    how = replace(
        tiny_run().evaluation, model="MLP", distilled_strategy="none", selected_strategy=None, training=training
    )
    x = digits.normalize(digits.train.images)
    for loss, shift in (("mse", 1), ("cross-entropy", 0)):
        guess = trained_on(shifted, Context(digits), replace(how, loss=loss))(x).argmax(1)
        assert (guess == (digits.train.labels + shift) % 10).double().mean() > 0.8
