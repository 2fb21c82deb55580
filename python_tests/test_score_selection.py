"""CCS, D2, moderate, GraNd, AUM and uncertainty against plain loops, torch's formulas and autograd."""

from dataclasses import replace

import numpy as np
import pytest
import reference_selection as reference
import torch
from conftest import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from selmatch_ext import models
from selmatch_ext.context import Context
from selmatch_ext.data.load import load_data
from selmatch_ext.seeds import generator
from selmatch_ext.selection import aum, grand, uncertainty
from selmatch_ext.selection.d2 import d2
from selmatch_ext.selection.difficulty import COMPUTED, compute_scores, training_difficulty
from selmatch_ext.selection.moderate import moderate
from selmatch_ext.selection.strata import ccs, shares, strata_of
from selmatch_ext.selection.window import whole
from selmatch_ext.settings import Data, Graph, Scores, Training
from selmatch_ext.training import predict, train_on_real


@st.composite
def case(draw, most=14):
    """Labels of classes in mixed order, difficulties with many ties or none, features, and a generator's seed."""
    counts = draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**32))
    g = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=g)]
    levels = draw(st.sampled_from([1, 3, 1000]))
    scores = torch.randint(levels, (len(labels),), generator=g) / levels - draw(st.sampled_from([0.0, 0.5]))
    return labels, scores, torch.rand(len(labels), 3, generator=g), counts, seed


def hardest_first(members, scores, cutoff):
    ranked = sorted(members, key=lambda i: (-scores[i].item(), i))
    return ranked[whole(cutoff, len(ranked)) :]


@settings(max_examples=80, deadline=None)
@given(case(40), st.sampled_from([0.0, 0.1, 0.3, 0.5]), st.sampled_from([1, 2, 7, 50]), st.data())
def test_ccs_takes_of_each_stratum_what_the_plain_count_says(found, cutoff, strata, data):
    labels, scores, _, counts, seed = found
    ipc = data.draw(st.integers(1, min(count - whole(cutoff, count) for count in counts)))
    chosen = ccs(scores, labels, ipc, cutoff, strata, generator(seed))
    assert torch.equal(chosen, ccs(scores, labels, ipc, cutoff, strata, generator(seed)))
    for label, mine in enumerate(chosen.view(-1, ipc).tolist()):
        kept = hardest_first([i for i in range(len(labels)) if labels[i] == label], scores, cutoff)
        taken, parts = reference.ccs_counts([scores[i].item() for i in kept], ipc, strata)
        assert sum(taken) == ipc and [kept.index(i) for i in mine] == sorted(kept.index(i) for i in mine)
        assert [sum(parts[kept.index(i)] == k for i in mine) for k in range(strata)] == taken


def test_ccs_by_hand_and_at_random():
    """Scores 0, 0, 0, 0, 0.6, 0.9 after the hardest is cut off, two strata: the smaller one gives both."""
    scores = torch.tensor([5.0, 0, 0, 0, 0, 0.6, 0.9])
    labels = torch.zeros(7, dtype=torch.int64)
    hits = torch.zeros(7)
    for seed in range(300):
        chosen = ccs(scores, labels, 4, 0.2, 2, generator(seed))
        assert chosen[:2].tolist() == [6, 5]
        hits[chosen] += 1
    assert hits[0] == 0 and (hits[1:5] / 300 - 0.5).abs().max() < 0.12
    assert strata_of(torch.tensor([0.0, 0.49, 0.5, 1]), 2).tolist() == [0, 0, 1, 1]
    assert shares([5, 0, 1, 5], 8) == [3, 0, 1, 4]
    with pytest.raises(ValueError, match="total is 3; allowed is at most 2"):
        shares([1, 1], 3)


@settings(max_examples=60, deadline=None)
@given(case(), st.sampled_from([0.0, 0.3]), st.integers(1, 6), st.sampled_from([0.0, 0.1, 3.0]), st.data())
def test_d2_is_that_of_a_plain_loop(found, cutoff, neighbors, gamma, data):
    labels, scores, features, counts, _ = found
    ipc = data.draw(st.integers(1, min(count - whole(cutoff, count) for count in counts)))
    chosen = d2(scores, features, labels, ipc, Graph(cutoff, neighbors, gamma))
    for label, mine in enumerate(chosen.view(-1, ipc).tolist()):
        kept = sorted(hardest_first([i for i in range(len(labels)) if labels[i] == label], scores, cutoff))
        values = [scores[i].item() for i in kept]
        values = [v - min(0.0, *values) for v in values]
        expected = reference.d2(values, features[kept].double().tolist(), ipc, neighbors, gamma)
        assert mine == [kept[i] for i in expected]


def test_d2_keeps_away_from_what_it_has():
    """Two near each other and one apart: after the hardest the one apart, though the neighbor is harder."""
    features = torch.tensor([[0.0], [0.01], [9]])
    chosen = d2(torch.tensor([3.0, 2.9, 1]), features, torch.zeros(3, dtype=torch.int64), 2, Graph(0.0, 1, 0.1))
    assert chosen.tolist() == [0, 2]


@settings(max_examples=60, deadline=None)
@given(case(), st.data())
def test_moderate_is_that_of_a_plain_loop(found, data):
    labels, _, features, counts, _ = found
    ipc = data.draw(st.integers(1, min(counts)))
    for label, mine in enumerate(moderate(features, labels, ipc).view(-1, ipc).tolist()):
        members = [i for i in range(len(labels)) if labels[i] == label]
        x = features[members].double()
        center = x.mean(0)
        gaps = (x - center).norm(dim=1).numpy()
        gaps = np.abs(gaps - np.median(gaps))
        expected = reference.moderate(x.tolist(), ipc)
        # Of an even number the two in the middle are equally near, and rounding decides
        np.testing.assert_allclose(gaps[[members.index(i) for i in mine]], gaps[expected], atol=1e-12)
        assert len(set(mine)) == ipc


def test_equal_features_keep_their_order():
    labels = torch.tensor([0, 1] * 4)
    same = torch.ones(8, 2)
    assert moderate(same, labels, 2).tolist() == [0, 2, 1, 3]
    assert d2(torch.ones(8), same, labels, 4, Graph(0.0, 5, 0.1)).view(2, 4).sort(1).values.tolist() == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]


def test_refusals():
    labels, scores, x = torch.tensor([0, 0, 0, 1, 1]), torch.zeros(5), torch.zeros(5, 2)
    message = "cutoff 0.5 leaves 1 of 2 images of class 1, and ipc is 2; allowed is a cutoff of at most 0"
    with pytest.raises(ValueError, match=message):
        ccs(scores, labels, 2, 0.5, 5, generator(0))
    with pytest.raises(ValueError, match=message):
        d2(scores, x, labels, 2, Graph(0.5))
    with pytest.raises(ValueError, match="cutoff is 1.5; allowed is 0 to 1"):
        ccs(scores, labels, 1, 1.5, 5, generator(0))
    with pytest.raises(ValueError, match="strata is 0; allowed is 1 and above"):
        ccs(scores, labels, 1, 0.0, 0, generator(0))
    for choose in (
        lambda ipc: ccs(scores, labels, ipc, 0.0, 5, generator(0)),
        lambda ipc: d2(scores, x, labels, ipc, Graph(0.0)),
        lambda ipc: moderate(x, labels, ipc),
    ):
        for ipc in (0, 3):
            with pytest.raises(ValueError, match=f"ipc is {ipc}; allowed is 1 to 2, the size of class 1"):
                choose(ipc)
    with pytest.raises(ValueError, match="difficulty holds 1 values that are NaN"):
        d2(scores.where(torch.arange(5) != 2, torch.nan), x, labels, 1, Graph(0.0))
    with pytest.raises(ValueError, match="features holds 5 values that are NaN"):
        d2(scores, x.where(torch.arange(2) > 0, torch.nan), labels, 1, Graph(0.0))


# scores


def predictions(n=9, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, classes, generator=g),
        torch.rand(n, 5, generator=g),
        torch.randint(classes, (n,), generator=g),
    )


def test_gradient_norm_is_that_of_autograd():
    logits, features, labels = predictions()
    plain = reference.last_layer_gradients(logits, features, labels).norm(dim=1)
    torch.testing.assert_close(grand.gradient_norm(logits, features, labels), plain.float())


def test_uncertainty_by_the_formulas_of_torch():
    p = predictions()[0].double().softmax(1)
    torch.testing.assert_close(uncertainty.entropy(p), torch.distributions.Categorical(p).entropy())
    ranked = p.sort(1, descending=True).values
    torch.testing.assert_close(uncertainty.least_confidence(p), 1 - ranked[:, 0])
    torch.testing.assert_close(uncertainty.margin(p), ranked[:, 0] - ranked[:, 1])
    sure = torch.eye(3)[:2]
    for name, expected in (("entropy", 0.0), ("least_confidence", 0.0), ("margin", 1.0)):
        assert getattr(uncertainty, name)(sure).tolist() == [expected] * 2
    assert uncertainty.margin(torch.ones(2, 1)).tolist() == [1, 1]


def test_aum_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6]])
    margins = aum.own_margin(p, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(margins, torch.tensor([0.5, -0.1, -0.4]))
    assert aum.own_margin(torch.ones(2, 1), torch.tensor([0, 0])).tolist() == [1, 1]
    history = torch.stack([torch.stack([margins, margins + 0.1]), torch.stack([margins, margins - 0.1])])
    torch.testing.assert_close(aum.area(history), 2 * margins)


TINY = Scores(model=MODEL, runs=2, training=Training(epochs=3, lr=0.05, batch=25))


@pytest.mark.parametrize("source", ["grand", "aum", "least-confidence", "entropy", "margin"])
def test_scores_are_of_networks_while_they_train(source, tmp_path):
    """Against the same networks trained here, asked after every epoch."""
    context = Context(load_data(Data("digits", per_class=10), 0), 2)
    labels = context.data.train.labels
    seen = []
    for run in range(2):
        model, after = context.network(MODEL, "scores", run), []

        def ask(epoch, model=model, after=after):
            images = context.real_images()
            logits = predict(model, images, len(labels), context.device)
            features = predict(model, images, len(labels), context.device, output=models.embed)
            p = logits.softmax(1)
            onehot = F.one_hot(labels, 10)
            top = p.sort(1, descending=True).values
            after.append(
                {
                    "grand": (p - onehot).norm(dim=1) * (1 + features.square().sum(1)).sqrt(),
                    "aum": (p * onehot).sum(1) - (p - 2 * onehot).max(1).values,
                    "least-confidence": 1 - top[:, 0],
                    "entropy": -(p * p.clamp(min=1e-30).log()).sum(1),
                    "margin": top[:, 0] - top[:, 1],
                }[source]
            )

        train_on_real(model, context, TINY.training, "none", context.generator("scores", run), ask)
        seen.append(torch.stack(after))
    history = torch.stack(seen)
    expected = {"grand": history.mean((0, 1)), "aum": history.sum(1).mean(0)}.get(source, history[:, -1].mean(0))
    asked = replace(TINY, source=source)
    scores = compute_scores(context, asked)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    kept = training_difficulty(context, asked, tmp_path / "scores.npz")
    sign = -1 if source in ("aum", "margin") else 1
    assert torch.equal(kept, sign * scores.double()) and source in COMPUTED
    again = training_difficulty(context, replace(TINY, source=f"{source}:{tmp_path / 'scores.npz'}"), tmp_path / "none")
    assert torch.equal(again, kept)
