"""The loop that all methods share, trajectory matching and SelMatch."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import run_for, tiny_run

from selmatch_ext import files
from selmatch_ext.context import Context
from selmatch_ext.data.distilled import DistilledSet
from selmatch_ext.methods import Method, SelMatch, Task
from selmatch_ext.methods.mtt import chunks
from selmatch_ext.seeds import generator
from selmatch_ext.selection.window_search import window_set
from selmatch_ext.settings import Start, Window


class Bowl(Method):
    """The least a method can be: noisy descent to zero. `spoil` makes the loss of one iteration bad."""

    name = "bowl"
    max_loss = 100.0

    def __init__(self, spoil=None, at=None):
        self.spoil, self.at = spoil, at
        self.state = {}
        self.learned = {"x": torch.full((3,), 2.0, requires_grad=True), "y": torch.tensor(1.0, requires_grad=True)}

    def optimizer(self):
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
    losses = run_for(whole, 9, tmp_path / "whole", {}, seed=1)
    for iterations in (2, 3, 9):
        last = Bowl()
        again = run_for(last, iterations, pieces, {}, seed=1)
    assert again == losses and equal(values(whole), values(last))
    assert run_for(Bowl(), 9, pieces, {}, seed=1) == losses  # finished: nothing is done twice


class Stateful(Bowl):
    """Counts in its state, and feels the count; its steps shrink."""

    def __init__(self, *args):
        super().__init__(*args)
        self.state = {"count": torch.zeros(())}

    def optimizer(self):
        return torch.optim.Adam(self.learned.values(), lr=0.1, betas=(0.5, 0.999))

    def decay(self, iteration):
        return 0.5 ** (iteration // 2)

    def loss(self, iteration, generator):
        self.state["count"] += 1
        return super().loss(iteration, generator) + self.state["count"] * self.learned["y"] ** 2


def test_state_adam_and_step_sizes_survive_a_kill(tmp_path):
    whole, pieces = Stateful(), tmp_path / "pieces"
    losses = run_for(whole, 7, tmp_path / "whole", {}, seed=1)
    for iterations in (1, 4, 7):
        last = Stateful()
        again = run_for(last, iterations, pieces, {}, seed=1)
    assert again == losses and equal(values(whole), values(last)) and last.state["count"] == 7


def test_a_bad_loss_leaves_the_state_of_the_last_good_one(tmp_path):
    good, bad, restored = Stateful(), Stateful(math.nan, 2), Stateful()
    run_for(good, 1, tmp_path / "good", {}, seed=1)
    with pytest.raises(FloatingPointError):
        run_for(bad, 9, tmp_path / "bad", {}, seed=1)
    run_for(restored, 1, tmp_path / "bad", {}, seed=1)
    assert restored.state["count"] == 1 and equal(values(restored), values(good))


def test_step_sizes_follow_decay(tmp_path):
    class Slide(Bowl):
        def optimizer(self):
            return torch.optim.SGD(self.learned.values(), lr=1.0)

        def decay(self, iteration):
            return [1.0, 0.25][iteration]

        def loss(self, iteration, generator):
            return self.learned["x"].sum() + self.learned["y"]

    slide = Slide()
    run_for(slide, 2, tmp_path, {}, seed=1)
    assert slide.learned["y"].item() == 1.0 - 1.25


def test_another_seed_another_run(tmp_path):
    assert run_for(Bowl(), 2, tmp_path / "a", {}, seed=1) != run_for(Bowl(), 2, tmp_path / "b", {}, seed=2)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    run_for(Bowl(), 2, tmp_path, {}, seed=1)
    path = tmp_path / "checkpoint.safetensors"
    content = path.read_bytes()
    tensors, _ = files.load_tensors(path, "checkpoint")
    for kept in (0, 50, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="checkpoint.safetensors is truncated or is no safetensors file"):
            run_for(Bowl(), 3, tmp_path, {}, seed=1)
    for kind, message in (("expert", "expert file; expected kind checkpoint"), ("checkpoint", "'settings' is missing")):
        files.save_tensors(path, kind, tensors)
        with pytest.raises(ValueError, match=message):
            run_for(Bowl(), 3, tmp_path, {}, seed=1)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    run_for(Bowl(), 2, tmp_path, {"matching": {"lr": 1.0}}, seed=1)
    with pytest.raises(ValueError, match=r"matching\.lr: 1\.0 → 2\.0"):
        run_for(Bowl(), 3, tmp_path, {"matching": {"lr": 2.0}}, seed=1)
    with pytest.raises(ValueError, match="seed: 1 → 2"):
        run_for(Bowl(), 3, tmp_path, {"matching": {"lr": 1.0}}, seed=2)


@pytest.mark.parametrize("spoil", [math.nan, math.inf, 1e6])
def test_a_bad_loss_stops_the_run_with_the_last_good_state(tmp_path, spoil):
    good = Bowl()
    losses = run_for(good, 1, tmp_path / "good", {}, seed=1)  # the second update led to the bad loss
    with pytest.raises(FloatingPointError, match=r"iteration 3: the loss is .* Try a smaller lr"):
        run_for(Bowl(spoil, at=2), 9, tmp_path / "bad", {}, seed=1)
    saved = Bowl()
    assert run_for(saved, 1, tmp_path / "bad", {}, seed=1) == losses and equal(values(saved), values(good))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    class Root(Bowl):
        def loss(self, iteration, generator):
            return (self.learned["x"] * 0).sqrt().sum() + self.learned["y"]

    with pytest.raises(FloatingPointError, match="gradient of x is not finite"):
        run_for(Root(), 1, tmp_path, {}, seed=1)


def test_a_state_the_method_refuses_is_not_kept(tmp_path):
    class Picky(Bowl):
        def check(self):
            if self.learned["y"].item() < 0.5:
                raise FloatingPointError("y is too small")

    with pytest.raises(FloatingPointError, match="iteration 3: y is too small"):
        run_for(Picky(), 9, tmp_path / "picky", {}, seed=1)
    # what it saved is the state after two iterations, momentum included: an easier method goes on from there
    easy = Bowl()
    whole = run_for(easy, 9, tmp_path / "whole", {}, seed=1)
    went_on = Bowl()
    assert run_for(went_on, 9, tmp_path / "picky", {}, seed=1) == whole and equal(values(went_on), values(easy))


def test_a_loss_that_cannot_be_computed_stops_the_run_with_the_last_good_state(tmp_path):
    class Diverging(Bowl):
        def loss(self, iteration, generator):
            if iteration == 2:
                raise FloatingPointError("training stopped: the loss of epoch 1 is nan")
            return super().loss(iteration, generator)

    good, saved = Bowl(), Bowl()
    losses = run_for(good, 1, tmp_path / "good", {}, seed=1)
    with pytest.raises(FloatingPointError, match=r"iteration 3: training stopped: .* nan\. .* Try a smaller lr"):
        run_for(Diverging(), 9, tmp_path / "bad", {}, seed=1)
    assert run_for(saved, 1, tmp_path / "bad", {}, seed=1) == losses and equal(values(saved), values(good))


def test_losses_round_nothing_that_is_not_asked_for(tmp_path):
    """The loop's float32 on the CPU: autocast around the run does not reach the loss."""
    seen = []

    class Product(Bowl):
        def loss(self, iteration, generator):
            product = torch.outer(self.learned["x"], self.learned["x"]) @ self.learned["x"]
            seen.append(product.dtype)
            return product.sum() + self.learned["y"]

    with torch.autocast("cpu", torch.bfloat16):
        run_for(Product(), 1, tmp_path, {}, seed=1)
    assert seen == [torch.float32]


def test_dropout_in_a_loss_follows_from_the_seed_and_the_iteration(tmp_path):
    class Dropping(Bowl):
        def loss(self, iteration, generator):
            return torch.nn.functional.dropout(self.learned["x"], 0.5).square().sum() + self.learned["y"] ** 2

    whole, last = Dropping(), Dropping()
    before = torch.get_rng_state()
    losses = run_for(whole, 8, tmp_path / "whole", {}, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    run_for(Dropping(), 3, tmp_path / "pieces", {}, seed=1)
    torch.rand(7)
    assert run_for(last, 8, tmp_path / "pieces", {}, seed=1) == losses and equal(values(whole), values(last))
    assert len({loss / (2.0**i) for i, loss in enumerate(losses)}) == 8


def test_chunks_walk_through_permutations():
    batches = chunks(10, 4, 7, generator(0))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert torch.equal(torch.cat(batches[:3]).sort().values, torch.arange(10))
    assert torch.equal(torch.cat(batches[3:6]).sort().values, torch.arange(10))
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:6]))


def start(digits):
    difficulty = torch.linspace(0, 1, len(digits.train.labels))
    return window_set(Context(digits), difficulty, Start("window", ipc=6, alpha=0.5, window=Window()), 0.2)


def selmatch(digits, experts, **changes):
    return SelMatch(Task(start(digits), Context(digits), experts), replace(tiny_run().settings, **changes))


def test_selmatch_changes_the_easy_images_and_only_them(digits, experts, tmp_path):
    method = selmatch(digits, experts)
    losses = run_for(method, 3, tmp_path, {}, seed=0)
    before, after = start(digits), method.distilled()
    changed = (before.images != after.images).flatten(1).any(1)
    assert torch.equal(changed, before.distilled) and changed.sum() == 30
    assert after.lr != method.settings.lr_init and after.method == "selmatch"
    assert torch.equal(after.indices, before.indices)
    assert all(0 < loss < 10 for loss in losses)


def test_selmatch_lowers_the_loss(digits, experts, tmp_path):
    losses = run_for(selmatch(digits, experts, lr_images=100.0), 40, tmp_path, {}, seed=0)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_an_exploding_run_says_what_to_try(digits, experts, tmp_path):
    with pytest.raises(FloatingPointError, match=r"iteration \d.*η is .*lr_images"):
        run_for(selmatch(digits, experts, lr_images=1e9, lr_init=0.5), 30, tmp_path, {})
    restored = selmatch(digits, experts, lr_images=1e9, lr_init=0.5)
    losses = run_for(restored, 0, tmp_path, {})
    assert all(loss <= 100.0 for loss in losses) and restored.images.isfinite().all()


def test_a_learning_rate_below_zero_stops_the_run(digits, experts, tmp_path):
    with pytest.raises(FloatingPointError, match="η became -"):
        run_for(selmatch(digits, experts, lr_lr=1e3), 30, tmp_path, {})


def test_trajectories_that_are_too_short_are_refused(digits, experts):
    with pytest.raises(ValueError, match="max_start_epoch 4 and expert_epochs 1 need trajectories of 4 epochs.*have 3"):
        selmatch(digits, experts, max_start_epoch=4)
    nothing: DistilledSet = replace(start(digits), distilled=torch.zeros(60, dtype=torch.bool))
    with pytest.raises(ValueError, match="alpha times ipc"):
        SelMatch(Task(nothing, Context(digits), experts), tiny_run().settings)
