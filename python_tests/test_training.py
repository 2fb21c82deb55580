"""Training, experts, scores and evaluation."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, MODEL, CountFirstLayers, random_set, tiny_run
from torch.nn import functional as F

from selmatch_ext import models
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet, real_subset
from selmatch_ext.data.images import ImageSplit
from selmatch_ext.data.trajectories import ExpertStore
from selmatch_ext.evaluation import Accuracy, evaluate
from selmatch_ext.experts import train_experts
from selmatch_ext.fused import training as fused_training
from selmatch_ext.fused.training import fast
from selmatch_ext.models import flat
from selmatch_ext.ops.dsa import augment
from selmatch_ext.precision import precision_scope
from selmatch_ext.seeds import derive, generator
from selmatch_ext.selection import difficulty as difficulty_module
from selmatch_ext.selection.difficulty import compute_scores
from selmatch_ext.settings import Scores, Training
from selmatch_ext.training import batch_augmenter, combined_augmenter, learning_rate, train


def nothing(indices, generator):
    return batch_augmenter("none", (8, 8))(indices, generator)


def test_one_epoch_is_sgd_with_momentum_and_weight_decay_over_a_permutation():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    images, labels = torch.randn(10, 1, 2, 2, dtype=torch.float64), torch.randint(3, (10,))
    w, b = (p.detach().clone() for p in model.parameters())
    settings = Training(epochs=1, lr=0.1, momentum=0.9, weight_decay=0.01, batch=4)
    train(model, images.__getitem__, labels, settings, nothing, generator(0, "order"))

    order = torch.randperm(10, generator=generator(0, "order"))
    velocity = [torch.zeros_like(w), torch.zeros_like(b)]
    for batch in (order[:4], order[4:8], order[8:]):
        w, b = w.requires_grad_(), b.requires_grad_()
        loss = F.cross_entropy(images[batch].flatten(1) @ w.T + b, labels[batch])
        gradients = torch.autograd.grad(loss, (w, b))
        velocity = [0.9 * v + g + 0.01 * p for v, g, p in zip(velocity, gradients, (w, b), strict=True)]
        w, b = (p.detach() - 0.1 * v for p, v in zip((w, b), velocity, strict=True))
    for trained, expected in zip(model.parameters(), (w, b), strict=True):
        torch.testing.assert_close(trained.detach(), expected, rtol=1e-12, atol=1e-12)


def test_learning_rate_schedules():
    cosine = Training(epochs=5, lr=0.1, schedule="cosine")
    assert learning_rate(cosine, 0) == pytest.approx(0.1)
    assert learning_rate(cosine, 2) == pytest.approx(0.1 * 0.505)
    assert learning_rate(cosine, 4) == pytest.approx(0.001)
    assert learning_rate(Training(epochs=5, lr=0.1), 4) == 0.1
    halves = [learning_rate(Training(epochs=n, lr=0.1, schedule="step"), e) for n in (4, 5) for e in range(n)]
    assert halves == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_training_stops_when_the_loss_is_not_finite(digits):
    model = models.build("MLP", 1, 10, (8, 8))
    images = digits.normalize(digits.train.images)
    with pytest.raises(FloatingPointError, match="lr 1e[+]30"):
        train(model, images.__getitem__, digits.train.labels, Training(epochs=3, lr=1e30), nothing, generator(0))


def test_combined_augmentation_treats_real_and_distilled_images_differently():
    mask = torch.arange(40) % 2 == 0
    augmenter = combined_augmenter(mask, "color", "flip", (8, 8))
    indices = torch.randperm(40, generator=generator(1))
    p = augmenter(indices, generator(2))
    x = torch.rand(40, 3, 8, 8, dtype=torch.float64)
    y = augment(x, p)
    flipped_or_same = ((y == x) | (y == x.flip(3))).flatten(1).all(1)
    assert torch.equal(flipped_or_same, ~mask[indices])


@pytest.mark.parametrize("per_image", [True, False])
def test_each_image_or_each_batch_draws_an_operation(per_image):
    augmenter = combined_augmenter(torch.ones(40, dtype=torch.bool), "color_flip_scale", None, (8, 8), per_image)
    p = augmenter(torch.arange(40), generator(2))
    kinds = {code for code in p.ops.flatten().tolist() if code != 0}  # a flip that is not made has code 0
    assert len(kinds) == 3 if per_image else len(kinds) <= 1
    assert len(p.params.flatten(1).unique(dim=0)) > 1


def test_experts_start_at_their_initialization_and_depend_on_their_number_alone(digits, experts, tmp_path):
    settings = tiny_run().experts
    first = Context(digits).network(MODEL, "expert", 0)
    assert torch.equal(experts.row(0, 0), flat.flatten(first.parameters()).detach())
    assert not torch.equal(experts.row(0, 0), experts.row(1, 0))
    again = train_experts(Context(digits), replace(settings, count=1), tmp_path)
    again = train_experts(Context(digits), settings, tmp_path)  # continues with the second
    assert all(torch.equal(again.row(1, e), experts.row(1, e)) for e in range(4))
    with pytest.raises(ValueError, match="epochs"):
        train_experts(Context(digits), replace(settings, training=Training(epochs=2)), tmp_path)
    with pytest.raises(ValueError, match="seed"):
        train_experts(Context(digits, 1), settings, tmp_path)


def test_experts_of_other_contents_under_the_same_name_are_refused(digits, experts):
    images, labels = digits.train.images.clone(), digits.train.labels.clone()
    images[5, 0, 3, 3] ^= 1
    labels[7] = (labels[7] + 1) % 10
    for changed in (ImageSplit(images, digits.train.labels), ImageSplit(digits.train.images, labels)):
        with pytest.raises(ValueError, match="images: [0-9a-f]{64} → [0-9a-f]{64}"):
            train_experts(Context(replace(digits, train=changed)), tiny_run().experts, experts.folder)


def test_experts_of_whitened_images_are_not_those_of_plain_ones(digits, experts, tmp_path):
    settings = replace(tiny_run().experts, count=1)
    with pytest.raises(ValueError, match="zca: False → True"):
        train_experts(Context(digits.whitened()), settings, experts.folder)
    older = ExpertStore(tmp_path)
    older.save(0, torch.stack([experts.row(0, e) for e in range(4)]), {**experts.metadata, "zca": False})
    older.check(0, {"zca": False})
    older.path(0).unlink()
    older.save(0, torch.stack([experts.row(0, e) for e in range(4)]), _without(experts.metadata, "zca"))
    assert train_experts(Context(digits), replace(settings, count=2), tmp_path).count == 2


def _without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


@pytest.mark.parametrize("source", ["forgetting", "el2n"])
def test_scores_put_the_hard_images_first(digits, source):
    settings = Scores(source=source, model=MODEL, runs=1, training=Training(epochs=6, lr=0.1, momentum=0.9, batch=64))
    scores = compute_scores(Context(digits), settings)
    assert scores.shape == (len(digits.train.labels),) and scores.dtype == torch.float32
    other = Context(digits, 5).network(MODEL)
    images = digits.normalize(digits.train.images)
    train(other, images.__getitem__, digits.train.labels, settings.training, nothing, generator(5))
    with torch.no_grad():
        loss = F.cross_entropy(other(images), digits.train.labels, reduction="none")
    hard = scores.argsort(descending=True)[: len(scores) // 5]
    assert loss[hard].mean() > 2 * loss.mean()


def test_el2n_is_the_error_norm_averaged_over_epochs_and_runs(digits, monkeypatch):
    logits = torch.randn(6, len(digits.train.labels), 10, generator=torch.Generator().manual_seed(0))
    seen = iter(logits)
    monkeypatch.setattr(difficulty_module, "predict", lambda *a: next(seen))
    scores = compute_scores(Context(digits), Scores(source="el2n", model=MODEL, runs=3, training=Training(epochs=2)))
    errors = logits.softmax(-1) - F.one_hot(digits.train.labels, 10)
    torch.testing.assert_close(scores, errors.square().sum(-1).sqrt().mean(0))


def test_evaluation_continues_and_compares_on_the_same_networks(digits, tmp_path):
    settings = tiny_run().evaluation
    subset = real_subset(digits, torch.arange(0, 1000, 10), "every tenth")
    whole = evaluate(subset, Context(digits, 3), settings)["test"]
    record = tmp_path / "evaluation.json"
    evaluate(subset, Context(digits, 3), settings, record)
    saved = json.loads(record.read_text())
    record.write_text(json.dumps({**saved, "accuracies": saved["accuracies"][:1]}))
    assert evaluate(subset, Context(digits, 3), settings, record)["test"] == whole
    with pytest.raises(ValueError, match="networks: 2 → 3"):
        evaluate(subset, Context(digits, 3), replace(settings, networks=3), record)
    with pytest.raises(ValueError, match="seed"):
        evaluate(subset, Context(digits, 4), settings, record)
    with pytest.raises(ValueError, match="set: "):
        evaluate(replace(subset, images=-subset.images), Context(digits, 3), settings, record)


def test_a_damaged_record_of_an_evaluation_is_named(digits, tmp_path):
    (tmp_path / "record.json").write_text('{"accuracies": [[')
    with pytest.raises(ValueError, match="record.json is damaged"):
        evaluate(random_set(digits, 1), Context(digits), tiny_run().evaluation, tmp_path / "record.json")


def test_evaluation_takes_soft_labels(digits):
    hard = real_subset(digits, torch.arange(0, 1000, 10), "every tenth")
    soft: DistilledSet = replace(hard, labels=F.one_hot(hard.labels, 10).float())
    settings = replace(tiny_run().evaluation, networks=1)
    accuracies = [evaluate(s, Context(digits, 3), settings)["test"].mean for s in (hard, soft)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=1.0)


def test_accuracy_summary():
    accuracy = Accuracy([50.0, 52.0, 54.0])
    assert (accuracy.mean, accuracy.std) == (52.0, 2.0)
    assert Accuracy([50.0]).std == 0.0


def test_streams_are_independent_and_leave_the_global_generator_alone(digits):
    assert derive(0, "expert", 1) != derive(0, "expert", 2) != derive(1, "expert", 2)
    before = torch.get_rng_state()
    evaluate(real_subset(digits, torch.arange(50), "first"), Context(digits), tiny_run().evaluation)
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_follows_from_the_generator_and_leaves_the_global_one_alone(digits):
    images, trained = digits.normalize(digits.train.images), []
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        linear = models.build("MLP", 1, 10, (8, 8), generator=generator(0))
        model = torch.nn.Sequential(torch.nn.Dropout(0.5), linear)
        train(model, images.__getitem__, digits.train.labels, Training(epochs=2), nothing, generator(seed))
        assert torch.equal(before, torch.get_rng_state())
        before = torch.manual_seed(seed + 10).get_state()
        trained.append(flat.flatten(model.parameters()).detach())
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_dropout_draws_new_masks_in_each_batch_and_epoch():
    masks = []
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3))

    def note(module, inputs, output):
        if module.training:
            masks.append(tuple((output == 0).flatten().tolist()))

    model[1].register_forward_hook(note)
    images, labels = torch.ones(10, 1, 8, 8), torch.zeros(10, dtype=torch.int64)
    train(model, images.__getitem__, labels, Training(epochs=3, batch=5), nothing, generator(0))
    assert len(set(masks)) == len(masks) == 6


def older_tf32_flags():
    """As code from before torch 2.9 reads them."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        pass
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("before", ["nothing", "older", "newer"])
def test_older_tf32_flags_can_be_read_within(before):
    """On a GPU a model's forward may look at them. They raise where torch's older and newer switches disagree."""
    code = f"""
import torch
from test_training import older_tf32_flags, precision_scope
if {before!r} == "older":
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("high")
if {before!r} == "newer":
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.mkldnn.matmul
values = [s.fp32_precision for s in switches]
for precision, expected in (("float32", (False, False, "highest")), ("tf32", (True, True, "high"))) * 2:
    with precision_scope(precision, torch.device("cuda")):
        assert older_tf32_flags() == expected
    assert [s.fp32_precision for s in switches] == values
if {before!r} != "newer":
    assert older_tf32_flags() == ((False, True, "high") if {before!r} == "older" else (True, False, "highest"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_precision_is_only_what_was_asked_for():
    a = torch.randn(4, 4)
    with precision_scope("float32", CPU):
        assert (a @ a).dtype == torch.float32
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [s.fp32_precision for s in switches]
    for precision, expected in (("tf32", "tf32"), ("float32", "ieee")):
        with precision_scope(precision, torch.device("cuda")):
            assert [s.fp32_precision for s in switches] == [expected] * 2
        assert [s.fp32_precision for s in switches] == before
    with precision_scope("bfloat16", CPU):
        assert (a @ a).dtype == torch.bfloat16
    assert (a @ a).dtype == torch.float32
    with pytest.raises(ValueError, match="tf32.*CUDA"), precision_scope("tf32", CPU):
        pass
    with pytest.raises(ValueError, match="float32, tf32 or bfloat16.*'half'"), precision_scope("half", CPU):
        pass


def shared_batch_norm(draw):
    """BatchNorm without parameters, and two that share theirs: no parameter's name says whose statistics are whose."""
    norms = torch.nn.BatchNorm2d(8, affine=False), torch.nn.BatchNorm2d(8), torch.nn.BatchNorm2d(8)
    norms[2].weight, norms[2].bias = norms[1].weight, norms[1].bias
    model = models.build("ConvNetD3W8BN", 3, 5, 16, generator=draw)
    for place, norm in zip((1, 5, 9), norms, strict=True):
        model.features[place] = norm
    return model


@pytest.mark.parametrize("name", ["ConvNetD2W32", "ConvNetD2W32BN", "ConvNetD2W8LNASwishMP", shared_batch_norm])
def test_fused_kernels_train_the_same(name):
    """Loss, gradients and running statistics of the fast path against those of the module itself."""
    draw = torch.Generator().manual_seed(0)
    plain = name(draw) if callable(name) else models.build(name, 3, 5, 16, generator=draw)
    copied = copy.deepcopy(plain)
    x, y = torch.randn(12, 3, 16, 16, generator=draw), torch.randint(5, (12,), generator=draw)
    network = fast(copied, x)
    assert network is not copied
    losses = [F.cross_entropy(f(x), y) for f in (plain, network)]
    losses[0].backward()
    with CountFirstLayers() as counted:
        losses[1].backward()
    assert counted.calls == ({"conv_block_backward": 1} if "D2W32" in str(name) else {})
    assert abs(losses[0] - losses[1]) < 1e-5
    gradients = [flat.flatten([p.grad for p in m.parameters()]) for m in (plain, copied)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    for a, b in zip(plain.buffers(), copied.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_images_in_training():
    model = models.build("ConvNetD2W32BN", 3, 5, 16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain, fused = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (model, fast(model, x)))
    assert (plain - fused).norm() < 1e-4 * plain.norm()


def test_the_fast_path_leaves_what_it_cannot_do_to_the_module():
    x = torch.zeros(2, 3, 8, 8)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh())
    assert fast(model, x) is model
    model = models.build("ConvNetD1W8", 3, 5, 8)
    assert fast(model, x.double()) is model and fast(model.eval(), x) is model
    kept = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.InstanceNorm2d(4, track_running_stats=True))
    assert fast(kept, x) is kept
    frozen = models.build("ConvNetD1W8BN", 3, 5, 8)
    frozen.features[1].eval()
    assert fast(frozen, x) is frozen


@pytest.mark.parametrize("cuda, expected", [("13.0", True), (None, False)])
def test_the_fast_path_runs_where_there_are_kernels(cuda, expected, monkeypatch):
    monkeypatch.setattr(fused_training, "build_info", lambda: {"cuda": cuda})
    has_kernels = fused_training._has_kernels
    assert has_kernels(CPU) and not has_kernels(torch.device("meta"))
    assert has_kernels(torch.device("cuda", 1)) is expected


def test_batch_norm_of_one_value_per_channel_is_torchs_error():
    x = torch.randn(1, 3, 8, 8)
    for statistics in (True, False):
        norm = torch.nn.BatchNorm2d(4, track_running_stats=statistics)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8), norm, torch.nn.Flatten())
        for run in (model, fast(model, x)):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                run(x)


def test_bfloat16_on_the_fast_path():
    draw = torch.Generator().manual_seed(0)
    model = models.build("ConvNetD2W32BN", 3, 5, 16, generator=draw)
    x = torch.randn(12, 3, 16, 16, generator=draw)
    exact = fast(model, x)(x)
    with precision_scope("bfloat16", CPU):  # as `train` calls it
        rounded = fast(model, x, "bfloat16")(x)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, fast(model, x, "bfloat16")(x))
    assert 1e-5 < (exact - rounded).norm() / exact.norm() < 0.05
