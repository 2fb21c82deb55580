"""A step of trajectory matching and of dataset distillation against its formula, and the starts that each takes."""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import CPU, MODEL, run_for, tiny_run
from method_steps import ALL, CLASSES, TRAJECTORY, UNROLLED, assert_same_step, begin, pick, real, task

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.evaluation import evaluate
from selmatch_ext.experts import expert_logits, train_experts
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods import DATM, DD, MTT
from selmatch_ext.methods.datm import DATMSettings
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.mtt import MTTSettings, chunks, start_epochs
from selmatch_ext.models import build, flat
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.models.initial import xavier
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.runner import Run, distill
from selmatch_ext.seeds import generator
from selmatch_ext.selection.start import Chosen
from selmatch_ext.training import predict

# trajectory matching


@pytest.fixture(scope="module")
def bn_experts(digits, tmp_path_factory):
    settings = replace(tiny_run().experts, model=MODEL + "BN")
    return train_experts(Context(digits), settings, tmp_path_factory.mktemp("bn"))


@pytest.mark.parametrize("gradient", ["exact", "tesla"])
@pytest.mark.parametrize("strategy", ["none", ALL])
@pytest.mark.parametrize("store", ["experts", "bn_experts"])
@pytest.mark.parametrize("method", [MTT, DATM])
def test_trajectory_matching_step(digits, request, method, store, strategy, gradient):
    """MTT with hard labels; DATM with learned ones, and start epochs that grow over the run."""
    store = request.getfixturevalue(store)
    t = task(digits, experts=store)
    more = {"first_max_start_epoch": 1, "iterations": 9} if method is DATM else {}
    settings = method.settings_type(**TRAJECTORY, **more, strategy=strategy, gradient=gradient)
    made, iteration = method(t, settings), 4
    got = made.loss(iteration, generator(0, "step"))

    g = generator(0, "step")
    expert = int(torch.randint(store.count, (), generator=g))
    epoch = int(torch.randint(2 if method is DATM else 3, (), generator=g))
    start, target = (store.row(expert, e).double() for e in (epoch, epoch + 1))
    batches, tables = chunks(20, 7, 3, g), None
    if strategy != "none":
        tables = [sample_augmentation(len(b), 8, 8, strategy=strategy, generator=g) for b in batches]
    labels = made.learned["logits"].exp() if method is DATM else t.start.labels
    labels = labels / labels.sum(1, keepdim=True) if method is DATM else labels
    net = t.network(store.model, "student")
    theta = reference.unrolled_sgd_full_graph(
        net, start.clone().requires_grad_(), made.images, labels, batches, made.lr, tables, gradient == "tesla"
    )
    expected = ((theta - target) ** 2).sum() / ((start - target) ** 2).sum()
    assert_same_step(made, expected, got)


def test_start_epochs_grow_from_the_first_to_the_last():
    settings = DATMSettings(min_start_epoch=2, first_max_start_epoch=4, max_start_epoch=8, iterations=50)
    ends = [start_epochs(settings, i) for i in range(50)]
    assert ends[0] == (2, 4) and ends[-1] == (2, 8) and [e for _, e in ends] == sorted(e for _, e in ends)
    assert {ends.count((2, e)) for e in range(4, 9)} == {10}
    assert start_epochs(MTTSettings(max_start_epoch=5), 0) == (0, 5)


@pytest.mark.parametrize("store", ["experts", "bn_experts"])
def test_expert_logits(digits, request, store):
    store = request.getfixturevalue(store)
    t = task(digits, experts=store)
    net = t.network(store.model, "student")
    flat.load_parameters(net, store.row(0, 3))
    g = generator(t.context.seed, "statistics")
    net = reference.frozen_batchnorm(net, real(t, torch.cat([pick(t, c, 16, g) for c in CLASSES]))).eval()
    torch.testing.assert_close(
        expert_logits(store, t.context, t.start.images.double()), net(t.start.images.double()), rtol=1e-9, atol=1e-9
    )


def test_images_that_the_expert_gets_right(digits, experts):
    t = task(digits, experts=experts, dtype=torch.float32)
    chosen = begin("correct", 2, digits, 3, experts)
    right = expert_logits(experts, t.context, digits.normalize(digits.train.images)).argmax(1) == digits.train.labels
    for c in CLASSES:
        mine = chosen.indices[chosen.labels == c]
        assert len(mine) == 2 and right[mine].sum() == min(2, right[digits.train.labels == c].sum())
    with pytest.raises(ValueError, match="start.select correct needs expert trajectories"):
        begin("correct", 2, digits, 3)


# dataset distillation


@pytest.mark.parametrize("strategy", ["none", ALL])
@pytest.mark.parametrize("model", [MODEL, MODEL + "BN"])
@pytest.mark.parametrize("init", ["unknown", "known", "loaded", "loaded, attack", "loaded, 3 epochs"])
def test_dataset_distillation_step(digits, request, init, model, strategy):
    init, _, how = init.partition(", ")
    pool, objective = 3 if how == "3 epochs" else 1, "attack" if how == "attack" else "basic"
    store = request.getfixturevalue("experts" if model == MODEL else "bn_experts") if init == "loaded" else None
    t = task(digits, experts=store)
    settings = DDSettings(**{**UNROLLED, "model": model}, init=init, strategy=strategy, pool_epochs=pool)
    method, iteration = DD(t, replace(settings, objective=objective, attack_class=3, target_class=7)), 25
    per_pass = -(-len(digits.train) // 50)
    assert method.iterations == 400 * per_pass
    got = method.loss(iteration, generator(0, "step"))

    g, net = generator(0, "step"), t.network(model, "network")
    if init == "loaded":  # the last expert is kept for the test
        starts = [store.row(0, 3 - int(k)).double() for k in torch.randint(pool, (2,), generator=g)]
    else:
        names = [("known",)] if init == "known" else [(25, 0), (25, 1)]
        starts = [xavier(net, generator(t.context.seed, "xavier", *name)) for name in names]
    turn, part = divmod(iteration, per_pass)
    order = torch.randperm(len(digits.train), generator=generator(t.context.seed, "order", turn))[
        50 * part : 50 * part + 50
    ]
    batches = [torch.arange(step, 20, 2) for step in (0, 1, 0, 1)]
    tables = None
    if strategy != "none":
        tables = [[sample_augmentation(10, 8, 8, strategy=strategy, generator=g) for _ in batches] for _ in starts]
    wanted, raw = digits.train.labels[order], method.raw
    if objective == "attack":
        wanted = torch.tensor([7 if label == 3 else label for label in wanted.tolist()])
    expected = reference.dataset_distillation(
        net, starts, method.images, t.start.labels, batches, raw, real(t, order), wanted, tables
    )
    torch.testing.assert_close(torch.log(1 + torch.exp(raw)), torch.full((4,), 0.05).double(), rtol=1e-6, atol=0)
    assert_same_step(method, expected, got)


def test_the_attack_wants_the_target_class(digits):
    method = DD(task(digits), DDSettings(**UNROLLED, objective="attack", attack_class=3, target_class=7))
    assert method.wanted(torch.tensor([0, 3, 7, 3])).tolist() == [0, 7, 7, 7]
    with pytest.raises(ValueError, match="must be two classes from 0 to 9, got 3 and 3"):
        DD(task(digits), DDSettings(**UNROLLED, objective="attack", attack_class=3, target_class=3))


def test_the_pool_has_the_last_epochs_of_all_experts_but_the_last(digits):
    class Store:
        count, epochs, metadata, folder = 3, 4, {"dataset": "digits"}, "store"
        model_name, parameters = MODEL, parameter_count(build(MODEL, 1, 10, 8))

        def check_alike(self):
            pass

        def row(self, expert, epoch):
            return torch.tensor([expert, epoch])

    settings = DDSettings(**{**UNROLLED, "networks": 100}, init="loaded", pool_epochs=2)
    starts = DD(task(digits, experts=Store()), settings).initial(0, generator(0, "pool"))
    assert len(starts) == 100 and {tuple(s.tolist()) for s in starts} == {(0, 3), (0, 4), (1, 3), (1, 4)}
    with pytest.raises(ValueError, match="pool_epochs is 5, but the experts were trained for 4 epochs"):
        DD(task(digits, experts=Store()), replace(settings, pool_epochs=5))
    with pytest.raises(ValueError, match="pool_epochs is 0; allowed is a whole number from 1 to"):
        replace(settings, pool_epochs=0)


def test_adapt_wants_experts_of_other_data(digits, experts):
    """Whatever the data sets are called."""
    flipped = replace(digits.train, images=digits.train.images.flip(3))
    for name in ("digits", "renamed"):
        same, other = (task(replace(digits, name=name, train=t), experts=experts) for t in (digits.train, flipped))
        assert DD(other, DDSettings(**UNROLLED, init="loaded", objective="adapt"))
        assert DD(same, DDSettings(**UNROLLED, init="loaded"))
        with pytest.raises(
            ValueError, match=f"the same images .'digits'. as the objective is on .{name}.: adapt wants"
        ):
            DD(same, DDSettings(**UNROLLED, init="loaded", objective="adapt"))
        with pytest.raises(ValueError, match="other images .*: adapt wants another data set"):
            DD(other, DDSettings(**UNROLLED, init="loaded"))
    t = task(digits, experts=experts)
    with pytest.raises(ValueError, match="needs init loaded"):
        DD(t, DDSettings(**UNROLLED, objective="adapt"))
    with pytest.raises(ValueError, match="more than test_networks 2; there are 2"):
        DD(t, DDSettings(**UNROLLED, init="loaded", test_networks=2))


def test_adapt_runs_with_experts_that_were_trained_here(digits, experts, tmp_path):
    other = replace(digits, name="other digits", train=replace(digits.train, images=digits.train.images.flip(3)))
    start = Chosen(begin("random", 2, other, 3))
    settings = DDSettings(**{**UNROLLED, "batch_real": 1300}, init="loaded", objective="adapt", passes=1)
    made = distill(Run("dd", settings), start, Context(other, 3), tmp_path / "adapt", experts).distilled()
    assert made.settings["experts"]["dataset"] == "digits" and not torch.equal(made.images, start.images.images)
    with pytest.raises(ValueError, match="other images .'digits'. as the objective is on .digits."):
        basic = Run("dd", replace(settings, objective="basic"))
        distill(basic, start, Context(replace(other, name="digits"), 3), tmp_path / "basic", experts)


def test_the_learning_rates_of_steps_are_positive(digits):
    with pytest.raises(ValueError, match="lr_init is 0.0; allowed is above 0 to"):
        DD(task(digits), DDSettings(**{**UNROLLED, "lr_init": 0.0}))


def test_the_rates_may_have_a_step_size_of_their_own(digits, tmp_path):
    settings = DDSettings(**UNROLLED, lr=0.03)
    for lr_rates, step in ((None, 0.03), (0.002, 0.002), (0.0, 0.0)):
        method = DD(task(digits), replace(settings, lr_rates=lr_rates))
        before = [t.detach().clone() for t in (method.images, method.raw)]
        run_for(method, 1, tmp_path / str(lr_rates), {}, seed=0)
        for old, new, lr in zip(before, (method.images, method.raw), (0.03, step), strict=True):
            first = old - lr * new.grad / (new.grad.abs() + 1e-8)  # Adam's first step
            torch.testing.assert_close(new.detach(), first, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="lr_rates is -0.1; allowed is 0 to"):
        DD(task(digits), replace(settings, lr_rates=-0.1))


def test_xavier(digits):
    net = task(digits).network(MODEL + "BN", "x")
    parts = flat.unflatten(xavier(net, generator(0, "x")), net)
    for name, p in net.named_parameters():
        if "classifier" in name or name.split(".")[1] in ("0", "4"):
            fans = torch.nn.init._calculate_fan_in_and_fan_out(p) if p.dim() > 1 else None
            spread = (2 / sum(fans)) ** 0.5 if fans else 0.0
            assert abs(parts[name].std() - spread) < 0.2 * spread + 1e-12
        else:
            assert torch.equal(parts[name], p)


def test_a_schedule_is_followed_and_survives_the_file(digits, tmp_path):
    t = task(digits, dtype=torch.float32)
    method = DD(t, DDSettings(**UNROLLED, init="known"))
    method.distilled().save(tmp_path / "d.safetensors")
    made = DistilledSet.load(tmp_path / "d.safetensors")
    assert made.digest() == method.distilled().digest() and made.schedule.model == MODEL
    net = t.network(MODEL, "network")
    start = xavier(net, generator(t.context.seed, "xavier", "known"))
    assert torch.equal(made.schedule.starts, start[None])
    model = follow_schedule(made, Context(digits, 9))
    batches = [torch.arange(step, 20, 2) for step in (0, 1, 0, 1)]
    theta = reference.unrolled_sgd_full_graph(
        net, start.requires_grad_(), made.images, made.labels, batches, torch.full((4,), 0.05)
    )
    torch.testing.assert_close(flat.flatten(model.parameters()), theta, rtol=1e-4, atol=1e-6)
    settings = replace(tiny_run().evaluation, networks=1)
    guess = predict(model, Context(digits).real_images("test"), len(digits.test), CPU).argmax(1)
    accuracy = 100 * (guess == digits.test.labels).double().mean().item()
    assert evaluate(made, Context(digits, 9), settings)["test"].values == [accuracy]
