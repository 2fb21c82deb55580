"""One step of each method against its formula in reference.py, in float64, and each continued after a stop."""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import CPU, MODEL, run_for, tiny_run

from selmatch_ext import cli
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.evaluation import evaluate
from selmatch_ext.experts import expert_logits, train_experts
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods import DATM, DC, DD, DM, DSA, METHODS, MTT, Task
from selmatch_ext.methods.datm import DATMSettings
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.distribution import DMSettings
from selmatch_ext.methods.gradient import DCSettings, DSASettings
from selmatch_ext.methods.mtt import MTTSettings, chunks, start_epochs
from selmatch_ext.models import build, flat
from selmatch_ext.models.flat import parameter_count
from selmatch_ext.models.initial import xavier
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.runner import Run, distill
from selmatch_ext.seeds import generator
from selmatch_ext.selection.start import Chosen, choose
from selmatch_ext.settings import Start
from selmatch_ext.training import predict

ALL = "color_crop_cutout_flip_scale_rotate"
CLASSES = range(10)


def task(digits, ipc=2, experts=None, dtype=torch.float64, seed=3):
    return Task(begin("random", ipc, digits, seed), Context(digits, seed), experts, dtype)


def begin(select, ipc, data, seed=0, experts=None):
    """The start that needs no scores and no features."""
    return choose(Start(select, ipc), Context(data, seed), None, None, experts).images


def real(task, indices):
    return task.data.normalize(task.data.train.images[indices], dtype=task.dtype)


def pick(task, label, count, g):
    """The indices that a method draws of a class."""
    members = (task.data.train.labels == label).nonzero().squeeze(1)
    return members[torch.randperm(len(members), generator=g)[:count]]


def assert_same_step(method, expected, got, names=None):
    leaves = [method.learned[name] for name in names or method.learned]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    want, have = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (expected, got))
    for w, h in zip(want, have, strict=True):
        assert w.norm() > 0 and (h - w).norm() <= 1e-9 * w.norm()


def siamese(task, strategy, g):
    if strategy == "none":
        return lambda x: x
    table = sample_augmentation(1, *task.data.image_size, strategy=strategy, siamese=True, generator=g)
    return lambda x: reference.augment(x, table)


# gradient matching


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("strategy", ["none", ALL])
@pytest.mark.parametrize("model", [MODEL, MODEL + "BN"])
def test_gradient_matching_step(digits, model, strategy, turn):
    """In turn 1 the network of turn 0 has been trained on the synthetic images, here as they are."""
    t = task(digits)
    settings = DCSettings(
        model=model, outer_loop=2, inner_loop=2, batch_real=7, batch_train=12, strategy=strategy, lr_network=0.05
    )
    method = (DC if strategy == "none" else DSA)(t, settings)
    for iteration in range(turn + 1):
        got = method.loss(iteration, generator(0, "step", iteration))

    g = generator(0, "step", turn)
    net, images, labels = t.network(model, "network", 0), method.images, t.start.labels
    if turn == 1 and strategy == "none":
        orders = [o for _ in range(2) for o in torch.randperm(20, generator=g).split(12)]
        reference.sgd_on(net, images.detach(), labels, orders, 0.05)
    elif turn == 1:
        tables = []
        for _ in range(2):
            for order in torch.randperm(20, generator=g).split(12):
                table = sample_augmentation(len(order), 8, 8, strategy=strategy, generator=g)
                tables.append((order, table))
        for order, table in tables:
            seen = reference.augment(images.detach()[order], table)
            reference.sgd_on(net, seen, labels[order], [slice(None)], 0.05)
    if model != MODEL:
        net = reference.frozen_batchnorm(net, real(t, torch.cat([pick(t, c, 16, g) for c in CLASSES])))
    batches = []
    for c in CLASSES:
        indices = pick(t, c, 7, g)
        change = siamese(t, strategy, g)
        mine = labels == c
        batches.append((change(real(t, indices)), torch.full((7,), c), change(images[mine]), labels[mine]))
    assert_same_step(method, reference.gradient_matching(net, batches), got)


@pytest.mark.parametrize("momentum", [1.0, 0.1])
def test_statistics_of_batch_norm(digits, momentum):
    """Those of the batch, or as the public code takes them."""
    t, model = task(digits), "ConvNetD1W4BN"
    settings = DCSettings(model=model, outer_loop=1, inner_loop=1, batch_real=7, bn_momentum=momentum)
    method = DC(t, settings)
    got, g = method.loss(0, generator(0, "step", 0)), generator(0, "step", 0)
    sample = real(t, torch.cat([pick(t, c, 16, g) for c in CLASSES]))
    net = reference.frozen_batchnorm(t.network(model, "network", 0), sample, momentum)
    batches, labels = [], t.start.labels
    for c in CLASSES:
        i = pick(t, c, 7, g)
        batches.append((real(t, i), torch.full((7,), c), method.images[labels == c], labels[labels == c]))
    assert_same_step(method, reference.gradient_matching(net, batches), got)


@pytest.mark.parametrize("metric", ["mse", "cos"])
def test_other_metrics(digits, metric):
    t = task(digits)
    method = DC(t, DCSettings(model=MODEL, outer_loop=1, inner_loop=1, batch_real=5, metric=metric))
    got, g, net = method.loss(0, generator(0, "x")), generator(0, "x"), t.network(MODEL, "network", 0)
    indices, batches, labels = [pick(t, c, 5, g) for c in CLASSES], [], t.start.labels
    # augmentation none draws nothing, so that the picks follow one another
    for c, i in enumerate(indices):
        batches.append((real(t, i), torch.full((5,), c), method.images[labels == c], labels[labels == c]))
    assert_same_step(method, reference.gradient_matching(net, batches, metric), got)


def test_networks_are_fresh_after_the_outer_loop(digits):
    t = task(digits, ipc=1)
    method = DC(t, DCSettings(model=MODEL, outer_loop=2, inner_loop=1, batch_real=4, iterations=3))
    assert method.iterations == 6
    for iteration in range(3):
        method.loss(iteration, generator(0, iteration))
    assert torch.equal(method.state["network"], flat.flatten(t.network(MODEL, "network", 1).parameters()))


def test_loops_of_the_paper(digits):
    assert DC(task(digits, ipc=10), DCSettings(model=MODEL)).iterations == 10_000
    with pytest.raises(ValueError, match="for ipc 1, 10, 20, 30, 40, 50, not 2: give outer_loop"):
        DC(task(digits), DCSettings(model=MODEL))
    with pytest.raises(ValueError, match="outer_loop is 0; allowed is a whole number from 1 to"):
        DC(task(digits, ipc=10), DCSettings(model=MODEL, outer_loop=0))


@pytest.mark.parametrize("kind", [DC, DM])
def test_networks_get_no_gradients(digits, tmp_path, monkeypatch, kind):
    """Only the images are learned."""
    built, build = [], Context.network
    monkeypatch.setattr(Context, "network", lambda *name: built.append(build(*name)) or built[-1])
    loops = {"outer_loop": 1, "inner_loop": 1} if kind is DC else {}
    run_for(kind(task(digits), kind.settings_type(model=MODEL, batch_real=4, **loops)), 1, tmp_path, {}, seed=0)
    assert built and all(p.grad is None for net in built for p in net.parameters())


def test_a_diverging_inner_training_leaves_the_last_good_state(digits, tmp_path):
    settings = DCSettings(model=MODEL, outer_loop=9, inner_loop=9, batch_real=4, lr_network=1e30)
    with pytest.raises(
        FloatingPointError, match=r"dc stopped at iteration \d: training stopped.* lr_network \(1e\+30\)"
    ):
        run_for(DC(task(digits), settings), 9, tmp_path, {}, seed=0)
    assert (tmp_path / "checkpoint.safetensors").exists()


# distribution matching


@pytest.mark.parametrize("strategy", ["none", ALL])
@pytest.mark.parametrize("model", [MODEL, MODEL + "BN"])
def test_distribution_matching_step(digits, model, strategy):
    t = task(digits)
    method = DM(t, DMSettings(model=model, batch_real=9, strategy=strategy))
    got, g = method.loss(4, generator(0, "step")), generator(0, "step")
    wanted, mine = [], []
    for c in CLASSES:
        indices = pick(t, c, 9, g)
        change = siamese(t, strategy, g)
        wanted.append(change(real(t, indices)))
        mine.append(change(method.images[t.start.labels == c]))
    expected = reference.distribution_matching(t.network(model, "network", 4), wanted, mine)
    assert_same_step(method, expected, got)


# trajectory matching


TRAJECTORY = {"inner_steps": 3, "expert_epochs": 1, "max_start_epoch": 3, "batch_syn": 7, "lr_init": 0.05}


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


def test_selected_images_stay_in_every_method(digits, tmp_path):
    start = begin("random", 2, digits)
    start = replace(start, distilled=torch.arange(20) % 2 == 0)
    method = DM(Task(start, Context(digits)), DMSettings(model=MODEL, batch_real=4))
    run_for(method, 2, tmp_path, {}, seed=0)
    changed = (method.distilled().images != start.images).flatten(1).any(1)
    assert torch.equal(changed, start.distilled)


# dataset distillation


UNROLLED = {"model": MODEL, "steps": 2, "epochs": 2, "networks": 2, "batch_real": 50, "lr_init": 0.05}


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


# all of them


SMALL = {
    "dc": DCSettings(model=MODEL + "BN", outer_loop=3, inner_loop=2, batch_real=6, iterations=2),
    "dsa": DSASettings(model=MODEL, outer_loop=3, inner_loop=2, batch_real=6, iterations=2),
    "dm": DMSettings(model=MODEL + "BN", batch_real=6, iterations=6),
    "dd": DDSettings(**{**UNROLLED, "batch_real": 700}, passes=3, halve_every=1),
    "mtt": MTTSettings(**TRAJECTORY, lr_lr=1e-8, iterations=6, lr_images=10.0),
    "datm": DATMSettings(**TRAJECTORY, lr_lr=1e-8, iterations=6, first_max_start_epoch=1, lr_images=10.0),
    "selmatch": replace(tiny_run().settings, iterations=6),
}


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_continued_each_method_ends_with_the_same_bits(digits, experts, tmp_path, name):
    t = task(digits, experts=experts, dtype=torch.float32)
    whole, pieces = METHODS[name](t, SMALL[name]), tmp_path / "pieces"
    assert whole.iterations == 6
    losses = run_for(whole, 6, tmp_path / "whole", {}, seed=1)
    for iterations in (1, 2, 5, 6):
        last = METHODS[name](t, SMALL[name])
        again = run_for(last, iterations, pieces, {}, seed=1)
    assert again == losses
    for a, b in zip([*whole.learned.values()], [*last.learned.values()], strict=True):
        assert torch.equal(a, b)
    assert whole.distilled().digest() == last.distilled().digest() != t.start.digest()


@pytest.mark.parametrize("name", METHODS)
def test_each_method_from_the_command_line(digits, experts, tmp_path, name):
    arguments = ["distill", name, "--data.dataset", "digits", "--device", "cpu", "--out", str(tmp_path)]
    small = {k: v for k, v in vars(SMALL[name]).items() if v != getattr(type(SMALL[name])(), k)}
    for key, value in small.items():
        arguments += [f"--{key.replace('_', '-')}", str(value)]
    arguments += ["--start.ipc", "2"]
    if name == "selmatch":
        arguments += ["--start.select", "random", "--start.alpha", "1"]
    if name in ("mtt", "datm", "selmatch"):
        arguments += ["--experts", str(experts.folder)]
    assert cli.main(arguments) == 0
    made = DistilledSet.load(tmp_path / "distilled.safetensors")
    assert made.method == name and len(made) == 20 and made.distilled.all()
    assert (made.schedule is not None) == (name == "dd") and made.labels.is_floating_point() == (name == "datm")


def test_methods_that_need_experts_say_so(digits, capsys, tmp_path):
    assert cli.main(["distill", "mtt", "--data.dataset", "digits", "--out", str(tmp_path)]) == 1
    assert "mtt needs expert trajectories" in capsys.readouterr().err


def test_errors_where_a_task_has_no_experts_or_a_set_no_schedule(digits):
    with pytest.raises(ValueError, match="needs expert trajectories"):
        task(digits, 1).expert_network()
    with pytest.raises(ValueError, match="no schedule to train by"):
        follow_schedule(begin("random", 1, digits), Context(digits))
