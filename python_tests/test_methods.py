"""The loop that all methods share, trajectory matching and SelMatch."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import CPU, MODEL, tiny_run
from reference import unrolled_sgd_full_graph

from selmatch_ext import files, models, pipeline
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.methods import Method, SelMatch, Task
from selmatch_ext.methods.loop import run
from selmatch_ext.methods.trajectory import chunks, matching_loss
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.seeds import generator
from selmatch_ext.settings import Window


class Bowl(Method):
    """The least a method can be: noisy descent to zero. `spoil` makes the loss of one iteration bad."""

    name = "bowl"
    max_loss = 100.0

    def __init__(self, spoil=None, at=None):
        self.spoil, self.at = spoil, at
        self.state = {}
        self.learned = {"x": torch.full((3,), 2.0, requires_grad=True), "y": torch.tensor(1.0, requires_grad=True)}

    def optimiser(self):
        return torch.optim.SGD(self.learned.values(), lr=0.1, momentum=0.5)

    def loss(self, iteration, generator):
        noise = torch.rand(3, generator=generator)
        loss = ((self.learned["x"] - noise) ** 2).sum() + self.learned["y"] ** 2
        return loss * self.spoil if iteration == self.at else loss

    def advice(self):
        return "Try a smaller lr."


def values(method):
    return {name: t.detach().clone() for name, t in method.learned.items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_in_pieces_ends_with_the_bits_of_one(tmp_path):
    whole, pieces = Bowl(), tmp_path / "pieces"
    losses = run(whole, 9, tmp_path / "whole", {}, seed=1)
    for iterations in (2, 3, 9):
        last = Bowl()
        again = run(last, iterations, pieces, {}, seed=1)
    assert again == losses and equal(values(whole), values(last))
    assert run(Bowl(), 9, pieces, {}, seed=1) == losses  # finished: nothing is done twice


class Stateful(Bowl):
    """Counts in its state, and feels the count; its steps shrink."""

    def __init__(self, *args):
        super().__init__(*args)
        self.state = {"count": torch.zeros(())}

    def optimiser(self):
        return torch.optim.Adam(self.learned.values(), lr=0.1, betas=(0.5, 0.999))

    def decay(self, iteration):
        return 0.5 ** (iteration // 2)

    def loss(self, iteration, generator):
        self.state["count"] += 1
        return super().loss(iteration, generator) + self.state["count"] * self.learned["y"] ** 2


def test_state_adam_and_step_sizes_survive_a_kill(tmp_path):
    whole, pieces = Stateful(), tmp_path / "pieces"
    losses = run(whole, 7, tmp_path / "whole", {}, seed=1)
    for iterations in (1, 4, 7):
        last = Stateful()
        again = run(last, iterations, pieces, {}, seed=1)
    assert again == losses and equal(values(whole), values(last)) and last.state["count"] == 7


def test_a_bad_loss_leaves_the_state_of_the_last_good_one(tmp_path):
    good, bad, restored = Stateful(), Stateful(math.nan, 2), Stateful()
    run(good, 1, tmp_path / "good", {}, seed=1)
    with pytest.raises(FloatingPointError):
        run(bad, 9, tmp_path / "bad", {}, seed=1)
    run(restored, 1, tmp_path / "bad", {}, seed=1)
    assert restored.state["count"] == 1 and equal(values(restored), values(good))


def test_step_sizes_follow_decay(tmp_path):
    class Slide(Bowl):
        def optimiser(self):
            return torch.optim.SGD(self.learned.values(), lr=1.0)

        def decay(self, iteration):
            return [1.0, 0.25][iteration]

        def loss(self, iteration, generator):
            return self.learned["x"].sum() + self.learned["y"]

    slide = Slide()
    run(slide, 2, tmp_path, {}, seed=1)
    assert slide.learned["y"].item() == 1.0 - 1.25


def test_another_seed_another_run(tmp_path):
    assert run(Bowl(), 2, tmp_path / "a", {}, seed=1) != run(Bowl(), 2, tmp_path / "b", {}, seed=2)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    run(Bowl(), 2, tmp_path, {}, seed=1)
    path = tmp_path / "checkpoint.safetensors"
    content = path.read_bytes()
    tensors, _ = files.load_tensors(path, "checkpoint")
    for kept in (0, 50, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="checkpoint.safetensors is truncated or is no safetensors file"):
            run(Bowl(), 3, tmp_path, {}, seed=1)
    for kind, message in (("expert", "expert file; expected kind checkpoint"), ("checkpoint", "'settings' is missing")):
        files.save_tensors(path, kind, tensors)
        with pytest.raises(ValueError, match=message):
            run(Bowl(), 3, tmp_path, {}, seed=1)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    run(Bowl(), 2, tmp_path, {"matching": {"lr": 1.0}}, seed=1)
    with pytest.raises(ValueError, match=r"matching\.lr: 1\.0 → 2\.0"):
        run(Bowl(), 3, tmp_path, {"matching": {"lr": 2.0}}, seed=1)
    with pytest.raises(ValueError, match="seed: 1 → 2"):
        run(Bowl(), 3, tmp_path, {"matching": {"lr": 1.0}}, seed=2)


@pytest.mark.parametrize("spoil", [math.nan, math.inf, 1e6])
def test_a_bad_loss_stops_the_run_with_the_last_good_state(tmp_path, spoil):
    good = Bowl()
    losses = run(good, 1, tmp_path / "good", {}, seed=1)  # the second update led to the bad loss
    with pytest.raises(FloatingPointError, match=r"iteration 3: the loss is .* Try a smaller lr"):
        run(Bowl(spoil, at=2), 9, tmp_path / "bad", {}, seed=1)
    saved = Bowl()
    assert run(saved, 1, tmp_path / "bad", {}, seed=1) == losses and equal(values(saved), values(good))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    class Root(Bowl):
        def loss(self, iteration, generator):
            return (self.learned["x"] * 0).sqrt().sum() + self.learned["y"]

    with pytest.raises(FloatingPointError, match="gradient of x is not finite"):
        run(Root(), 1, tmp_path, {}, seed=1)


def test_a_state_the_method_refuses_is_not_kept(tmp_path):
    class Picky(Bowl):
        def check(self):
            if self.learned["y"].item() < 0.5:
                raise FloatingPointError("y is too small")

    with pytest.raises(FloatingPointError, match="iteration 3: y is too small"):
        run(Picky(), 9, tmp_path / "picky", {}, seed=1)
    # what it saved is the state after two iterations, momentum included: an easier method goes on from there
    easy = Bowl()
    whole = run(easy, 9, tmp_path / "whole", {}, seed=1)
    went_on = Bowl()
    assert run(went_on, 9, tmp_path / "picky", {}, seed=1) == whole and equal(values(went_on), values(easy))


def test_a_loss_that_cannot_be_computed_stops_the_run_with_the_last_good_state(tmp_path):
    class Diverging(Bowl):
        def loss(self, iteration, generator):
            if iteration == 2:
                raise FloatingPointError("training stopped: the loss of epoch 1 is nan")
            return super().loss(iteration, generator)

    good, saved = Bowl(), Bowl()
    losses = run(good, 1, tmp_path / "good", {}, seed=1)
    with pytest.raises(FloatingPointError, match=r"iteration 3: training stopped: .* nan\. .* Try a smaller lr"):
        run(Diverging(), 9, tmp_path / "bad", {}, seed=1)
    assert run(saved, 1, tmp_path / "bad", {}, seed=1) == losses and equal(values(saved), values(good))


def test_losses_round_nothing_that_is_not_asked_for(tmp_path):
    """The loop's float32 on the CPU: autocast around the run does not reach the loss."""
    seen = []

    class Product(Bowl):
        def loss(self, iteration, generator):
            product = torch.outer(self.learned["x"], self.learned["x"]) @ self.learned["x"]
            seen.append(product.dtype)
            return product.sum() + self.learned["y"]

    with torch.autocast("cpu", torch.bfloat16):
        run(Product(), 1, tmp_path, {}, seed=1)
    assert seen == [torch.float32]


def test_dropout_in_a_loss_follows_from_the_seed_and_the_iteration(tmp_path):
    class Dropping(Bowl):
        def loss(self, iteration, generator):
            return torch.nn.functional.dropout(self.learned["x"], 0.5).square().sum() + self.learned["y"] ** 2

    whole, last = Dropping(), Dropping()
    before = torch.get_rng_state()
    losses = run(whole, 8, tmp_path / "whole", {}, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    run(Dropping(), 3, tmp_path / "pieces", {}, seed=1)
    torch.rand(7)
    assert run(last, 8, tmp_path / "pieces", {}, seed=1) == losses and equal(values(whole), values(last))
    assert len({loss / (2.0**i) for i, loss in enumerate(losses)}) == 8


def test_chunks_walk_through_permutations():
    batches = chunks(10, 4, 7, generator(0))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert torch.equal(torch.cat(batches[:3]).sort().values, torch.arange(10))
    assert torch.equal(torch.cat(batches[3:6]).sort().values, torch.arange(10))
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:6]))


@pytest.mark.parametrize("model", [MODEL, MODEL + "BN"])
@pytest.mark.parametrize("strategy", ["none", "color_crop_cutout_flip_scale_rotate"])
def test_matching_loss_is_the_formula(digits, experts, model, strategy):
    """Against the oracle with the graph of every step kept, in float64; the draws are replayed in their order."""
    settings = replace(tiny_run().matching, strategy=strategy)
    net = models.build(MODEL, 1, 10, (8, 8)) if model == MODEL else models.build(model, 1, 10, (8, 8))
    store = experts if model == MODEL else _Scaled(net)
    images = digits.normalise(digits.train.images[:40]).double().requires_grad_()
    labels, lr = digits.train.labels[:40], torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    loss = matching_loss(net.double(), store, images, labels, lr, settings, generator(0, "draws"), (0, 2))
    gradients = torch.autograd.grad(loss, (images, lr))

    g = generator(0, "draws")
    expert, epoch = int(torch.randint(store.count, (), generator=g)), int(torch.randint(2, (), generator=g))
    start, target = store.row(expert, epoch).double(), store.row(expert, epoch + 1).double()
    batches = chunks(40, settings.batch_syn, settings.inner_steps, g)
    tables = None
    if strategy != "none":
        tables = [sample_augmentation(len(b), 8, 8, strategy=strategy, generator=g) for b in batches]
    student = unrolled_sgd_full_graph(net, start.requires_grad_(), images, labels, batches, lr, tables)
    expected = ((student - target) ** 2).sum() / ((start.detach() - target) ** 2).sum()
    expected_gradients = torch.autograd.grad(expected, (images, lr))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert (got - wanted).norm() <= 1e-9 * wanted.norm()


class _Scaled:
    """Stands for a store: trajectories that shrink an initialisation."""

    count = 2

    def __init__(self, model):
        self.start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def row(self, expert, epoch):
        return self.start * (1 - 0.1 * epoch - 0.05 * expert)


def start(digits):
    hardness = torch.linspace(0, 1, len(digits.train.labels))
    return pipeline.starting_set(digits, hardness, Window(ipc=6, alpha=0.5, beta=0.2))


def selmatch(digits, experts, **changes):
    return SelMatch(Task(start(digits), digits, 0, CPU, experts), replace(tiny_run().matching, **changes))


def test_selmatch_changes_the_easy_images_and_only_them(digits, experts, tmp_path):
    method = selmatch(digits, experts)
    losses = run(method, 3, tmp_path, {}, seed=0)
    before, after = start(digits), method.distilled()
    changed = (before.images != after.images).flatten(1).any(1)
    assert torch.equal(changed, before.distilled) and changed.sum() == 30
    assert after.lr != method.settings.lr_init and after.method == "selmatch"
    assert torch.equal(after.indices, before.indices)
    assert all(0 < loss < 10 for loss in losses)


def test_selmatch_lowers_the_loss(digits, experts, tmp_path):
    losses = run(selmatch(digits, experts, lr_images=100.0), 40, tmp_path, {}, seed=0)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_an_exploding_run_says_what_to_try(digits, experts, tmp_path):
    with pytest.raises(FloatingPointError, match=r"iteration \d.*η is .*lr_images"):
        run(selmatch(digits, experts, lr_images=1e9, lr_init=0.5), 30, tmp_path, {}, 0)
    restored = selmatch(digits, experts, lr_images=1e9, lr_init=0.5)
    losses = run(restored, 0, tmp_path, {}, 0)
    assert all(loss <= 100.0 for loss in losses) and restored.images.isfinite().all()


def test_a_learning_rate_below_zero_stops_the_run(digits, experts, tmp_path):
    with pytest.raises(FloatingPointError, match="η became -"):
        run(selmatch(digits, experts, lr_lr=1e3), 30, tmp_path, {}, 0)


def test_trajectories_that_are_too_short_are_refused(digits, experts):
    with pytest.raises(ValueError, match="max_start_epoch 4 and expert_epochs 1 need trajectories of 4 epochs.*have 3"):
        selmatch(digits, experts, max_start_epoch=4)
    nothing: DistilledSet = replace(start(digits), distilled=torch.zeros(60, dtype=torch.bool))
    with pytest.raises(ValueError, match="alpha times ipc"):
        SelMatch(Task(nothing, digits, 0, CPU, experts), tiny_run().matching)
