"""Methods whose inner steps have momentum and weight decay: their losses, what continues a killed run, and what is
saved of those steps with a set."""

from dataclasses import replace

import pytest
import reference
import torch
from conftest import MODEL, run_for
from method_steps import TRAJECTORY, UNROLLED, assert_same_step, real, task
from test_distilled import example
from test_forged_files import forged

from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.data.schedule import Schedule
from selmatch_ext.learned_steps import follow_schedule
from selmatch_ext.methods import DD, METHODS, MTT
from selmatch_ext.methods.dd import DDSettings
from selmatch_ext.methods.mtt import MTTSettings, chunks
from selmatch_ext.models import flat
from selmatch_ext.models.initial import xavier
from selmatch_ext.ranges import SettingError
from selmatch_ext.seeds import generator

GIVEN = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}
INNER = {f"inner_{name}": value for name, value in GIVEN.items()}
MATCHING = {**TRAJECTORY, "lr_init": 0.01}  # momentum makes the steps longer
NESTEROV = pytest.mark.parametrize("nesterov", [False, True])


@NESTEROV
def test_a_step_of_trajectory_matching(digits, experts, nesterov):
    t = task(digits, experts=experts)
    made = MTT(t, MTTSettings(**MATCHING, **INNER | {"inner_nesterov": nesterov}, strategy="none"))
    got = made.loss(0, generator(0, "step"))
    g = generator(0, "step")
    expert, epoch = (int(torch.randint(n, (), generator=g)) for n in (experts.count, 3))
    start, target = (experts.row(expert, e).double() for e in (epoch, epoch + 1))
    given, batches = GIVEN | {"nesterov": nesterov}, chunks(20, 7, 3, g)
    inputs = start.clone().requires_grad_(), made.images, t.start.labels, batches, made.lr
    theta = reference.unrolled_sgd_full_graph(t.network(experts.model, "student"), *inputs, **given)
    assert_same_step(made, ((theta - target) ** 2).sum() / ((start - target) ** 2).sum(), got)


@NESTEROV
def test_a_step_of_dataset_distillation(digits, nesterov):
    t = task(digits)
    method = DD(t, DDSettings(**UNROLLED, **INNER | {"inner_nesterov": nesterov}))
    got = method.loss(0, generator(0, "step"))
    net = t.network(MODEL, "network")
    starts = [xavier(net, generator(t.context.seed, "xavier", 0, k)) for k in range(2)]
    order = torch.randperm(len(digits.train), generator=generator(t.context.seed, "order", 0))[:50]
    data = method.images, t.start.labels, [torch.arange(step, 20, 2) for step in (0, 1, 0, 1)], method.raw
    wanted = real(t, order), digits.train.labels[order]
    given = GIVEN | {"nesterov": nesterov}
    assert_same_step(method, reference.dataset_distillation(net, starts, *data, *wanted, None, **given), got)


SMALL = {
    "dd": DDSettings(**{**UNROLLED, "batch_real": 700}, **INNER, passes=2),
    "mtt": MTTSettings(**MATCHING, **INNER, lr_lr=1e-8, iterations=4, lr_images=10.0),
}


@pytest.mark.parametrize("name", SMALL)
def test_stopped_and_continued_with_the_same_bits(digits, experts, tmp_path, name):
    t = task(digits, experts=experts, dtype=torch.float32)
    whole, pieces = METHODS[name](t, SMALL[name]), tmp_path / "pieces"
    losses = run_for(whole, 4, tmp_path / "whole", {}, seed=1)
    for iterations in (1, 3, 4):
        last = METHODS[name](t, SMALL[name])
        again = run_for(last, iterations, pieces, {}, seed=1)
    assert again == losses and len(losses) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.learned.values(), last.learned.values(), strict=True))
    assert whole.distilled().digest() == last.distilled().digest() != t.start.digest()


def test_a_schedule_is_followed_with_its_momentum_and_survives_the_file(digits, tmp_path):
    t = task(digits, dtype=torch.float32)
    DD(t, DDSettings(**UNROLLED, **INNER, init="known")).distilled().save(tmp_path / "d.safetensors")
    made = DistilledSet.load(tmp_path / "d.safetensors")
    assert {name: getattr(made.schedule, name) for name in GIVEN} == GIVEN
    start = made.schedule.starts[0].clone().requires_grad_()
    inputs = start, made.images, made.labels, list(made.schedule.batches), made.schedule.rates
    theta = reference.unrolled_sgd_full_graph(t.network(MODEL, "network"), *inputs, **GIVEN)
    followed = flat.flatten(follow_schedule(made, Context(digits, 9)).parameters())
    torch.testing.assert_close(followed, theta, rtol=1e-4, atol=1e-6)
    assert (followed - made.schedule.starts[0]).norm() > 0.1


def schedule(**optimizer):
    return Schedule(torch.tensor([0.1, 0.02]), torch.tensor([[0, 2, 4], [1, 3, 5]]), "LeNet", **optimizer)


def test_the_digest_tells_the_optimizers_of_schedules_apart():
    """It is in the records of evaluations. Plain SGD leaves the digest, and the file, as they were without it."""
    options = [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}, {"weight_decay": 0.5}]
    sets = [example(schedule=schedule(**given)) for given in options]
    assert len({made.digest() for made in sets}) == 4
    assert set(sets[0].schedule.tensors()) == {"schedule_rates", "schedule_batches"}


@pytest.mark.parametrize(
    "optimizer, message",
    [
        ({"momentum": -0.5}, "schedule.momentum is -0.5; it must be a finite number, 0 or above"),
        ({"weight_decay": float("nan")}, "schedule.weight_decay is nan"),
        ({"nesterov": True}, "schedule.nesterov is True; with momentum 0 it must be False"),
    ],
)
def test_optimizers_of_schedules_that_make_no_sense(optimizer, message):
    with pytest.raises(ValueError, match=message):
        example(schedule=schedule(**optimizer))


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(2, dtype=torch.float64), r"schedule_optimizer is torch.float64 \(2,\); it must be torch.float64"),
        (torch.zeros(3), r"schedule_optimizer is torch.float32 \(3,\)"),
        (torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64), "schedule_optimizer holds 2.0 for whether"),
        (torch.tensor([-0.5, 0.0, 0.0], dtype=torch.float64), "schedule.momentum is -0.5"),
    ],
)
def test_files_with_an_optimizer_that_makes_no_sense(tmp_path, tensor, message):
    path = tmp_path / "set.safetensors"
    example(schedule=schedule(momentum=0.5)).save(path)
    forged(path, {"schedule_optimizer": tensor})
    with pytest.raises(ValueError, match=f"set.safetensors is damaged: {message}"):
        DistilledSet.load(path)


@pytest.mark.parametrize("settings", [MTTSettings(), DDSettings()], ids=["mtt", "dd"])
def test_settings_out_of_range(settings):
    for name, value, allowed in (
        ("inner_momentum", 1.0, "0 to below 1"),
        ("inner_weight_decay", -0.1, "0 to"),
        ("inner_nesterov", True, "False where inner_momentum is 0"),
    ):
        with pytest.raises(SettingError, match=f"{name} is {value}; allowed is {allowed}"):
            replace(settings, **{name: value})
