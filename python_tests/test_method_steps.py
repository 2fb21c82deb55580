"""A step of gradient and of distribution matching against its formula; each method after a stop, and its command."""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import MODEL, run_for, tiny_run
from method_steps import ALL, CLASSES, TRAJECTORY, UNROLLED, assert_same_step, begin, pick, real, siamese, task

from selmatch_ext import cli
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods import DC, DM, DSA, METHODS, Task
from selmatch_ext.methods.datm import DATMSettings
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.distribution import DMSettings
from selmatch_ext.methods.frepo import FRePoSettings
from selmatch_ext.methods.gradient import DCSettings, DSASettings
from selmatch_ext.methods.kip import KIPSettings, LabelSolveSettings
from selmatch_ext.methods.mtt import MTTSettings
from selmatch_ext.models import flat
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.seeds import generator

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


def test_gradient_matching_without_siamese_augmentation(digits):
    """The real and the synthetic batch of a class draw their own operations, one after the other."""
    t = task(digits)
    settings = DSASettings(model=MODEL, outer_loop=1, inner_loop=1, batch_real=7, strategy=ALL, siamese=False)
    method = DSA(t, settings)
    got, g, net = method.loss(0, generator(0, "x")), generator(0, "x"), t.network(MODEL, "network", 0)
    batches, labels = [], t.start.labels
    for c in CLASSES:
        indices = pick(t, c, 7, g)
        first, second = siamese(t, ALL, g), siamese(t, ALL, g)
        images = method.images[labels == c]
        batches.append((first(real(t, indices)), torch.full((7,), c), second(images), labels[labels == c]))
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


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("strategy", ["none", ALL])
@pytest.mark.parametrize("model", [MODEL, MODEL + "BN"])
def test_distribution_matching_step(digits, model, strategy, shared):
    t = task(digits)
    method = DM(t, DMSettings(model=model, batch_real=9, strategy=strategy, siamese=shared))
    got, g = method.loss(4, generator(0, "step")), generator(0, "step")
    wanted, mine = [], []
    for c in CLASSES:
        indices = pick(t, c, 9, g)
        change = siamese(t, strategy, g)
        wanted.append(change(real(t, indices)))
        change = change if shared else siamese(t, strategy, g)
        mine.append(change(method.images[t.start.labels == c]))
    expected = reference.distribution_matching(t.network(model, "network", 4), wanted, mine)
    assert_same_step(method, expected, got)


def test_selected_images_stay_in_every_method(digits, tmp_path):
    start = begin("random", 2, digits)
    start = replace(start, distilled=torch.arange(20) % 2 == 0)
    method = DM(Task(start, Context(digits)), DMSettings(model=MODEL, batch_real=4))
    run_for(method, 2, tmp_path, {}, seed=0)
    changed = (method.distilled().images != start.images).flatten(1).any(1)
    assert torch.equal(changed, start.distilled)


# all of them


SMALL = {
    "dc": DCSettings(model=MODEL + "BN", outer_loop=3, inner_loop=2, batch_real=6, iterations=2),
    "dsa": DSASettings(model=MODEL, outer_loop=3, inner_loop=2, batch_real=6, iterations=2),
    "dm": DMSettings(model=MODEL + "BN", batch_real=6, iterations=6),
    "dd": DDSettings(**{**UNROLLED, "batch_real": 700}, passes=3, halve_every=1),
    "mtt": MTTSettings(**TRAJECTORY, lr_lr=1e-8, iterations=6, lr_images=10.0),
    "datm": DATMSettings(**TRAJECTORY, lr_lr=1e-8, iterations=6, first_max_start_epoch=1, lr_images=10.0),
    "selmatch": replace(tiny_run().settings, iterations=6),
    "kip": KIPSettings(batch_real=40, iterations=6, strategy="crop"),
    "label-solve": LabelSolveSettings(depth=2),
    "frepo": FRePoSettings(
        model="FRePoNetD2W4BN", batch_real=30, batch_train=15, iterations=6, networks=2, max_age=2, lr_images=0.1
    ),
}
SOFT = "datm", "kip", "label-solve", "frepo"


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_continued_each_method_ends_with_the_same_bits(digits, experts, tmp_path, name):
    t = task(digits, experts=experts, dtype=torch.float32)
    whole, pieces = METHODS[name](t, SMALL[name]), tmp_path / "pieces"
    assert whole.iterations == (1 if name == "label-solve" else 6)
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
    assert (made.schedule is not None) == (name == "dd") and made.labels.is_floating_point() == (name in SOFT)


def test_methods_that_need_experts_say_so(digits, capsys, tmp_path):
    assert cli.main(["distill", "mtt", "--data.dataset", "digits", "--out", str(tmp_path)]) == 1
    assert "mtt needs expert trajectories" in capsys.readouterr().err


def test_errors_where_a_task_has_no_experts_or_a_set_no_schedule(digits):
    with pytest.raises(ValueError, match="needs expert trajectories"):
        task(digits, 1).expert_network()
    with pytest.raises(ValueError, match="no schedule to train by"):
        follow_schedule(begin("random", 1, digits), Context(digits))
