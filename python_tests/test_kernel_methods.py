"""KIP, Label Solve and FRePo: kernels against wide random networks and finite differences, steps against their
formulas."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from conftest import CPU, run_for
from method_steps import assert_same_step, begin, pick, real, task
from torch.nn import functional as F

from selmatch_ext import cli, models
from selmatch_ext.context import Context
from selmatch_ext.data.soft_labels import centered, probabilities
from selmatch_ext.methods import KIP, FRePo, LabelSolve, Task
from selmatch_ext.methods.frepo import FRePoSettings
from selmatch_ext.methods.kernels import coefficients, relu_kernel
from selmatch_ext.methods.kip import KIPSettings, LabelSolveSettings
from selmatch_ext.seeds import generator

NET = "FRePoNetD2W4BN"


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed, "kernels"), dtype=torch.float64)


# --- kernels ----------------------------------------------------------------------------------------------------------


def plain_kernel(x, y, depth, kernel):
    """Cho and Saul's form, by the arc cosine; x is y where both are the same set."""
    x, y = x.flatten(1), y.flatten(1)
    kx, ky = ((2 * (t * t).mean(1) + 0.01) for t in (x, y))
    k = 2 * x @ y.T / x.shape[1] + 0.01
    same = torch.eye(len(x), dtype=torch.bool) if x.shape == y.shape and torch.equal(x, y) else torch.zeros(k.shape) > 0
    tangent = k
    for _ in range(depth):
        norms = torch.outer(kx.sqrt(), ky.sqrt())
        angle = torch.where(same, 0.5, k / norms).acos().where(~same, 0.0)
        kx, ky = kx + 0.01, ky + 0.01
        k = norms / math.pi * (angle.sin() + (math.pi - angle) * angle.cos()) + 0.01
        k = k.where(~same, kx.unsqueeze(1))
        tangent = k + tangent * (1 - angle / math.pi)
    return tangent if kernel == "ntk" else k


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_kernels_are_those_of_the_arc_cosine(depth, kernel):
    x, y = normal(0, 5, 1, 3, 2), normal(1, 4, 1, 3, 2)
    for a, b in ((x, y), (x, x)):
        torch.testing.assert_close(
            relu_kernel(a, b, depth, kernel), plain_kernel(a, b, depth, kernel), rtol=1e-12, atol=0
        )


def test_the_kernel_of_black_images_by_hand():
    """Only biases: 0.01, halved and doubled by each ReLU and dense layer, plus 0.01; the NTK adds 0.01 + … as often."""
    x = torch.zeros(1, 1, 2, 2)
    assert relu_kernel(x, x, 2, "nngp").item() == pytest.approx(0.03)
    assert relu_kernel(x, x, 2, "ntk").item() == pytest.approx(0.01 + 0.02 + 0.03)


def random_network(x, width, depth, seed):
    """(covariance of the outputs given the last hidden layer, inner products of the gradients), both (n, n), of one
    network with weights √2/√fan_in and biases 0.1 times standard normal numbers."""
    sizes = [x.shape[1], *[width] * depth, 1]
    weights = [
        normal(f"{seed} {i}", b, a).requires_grad_() for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    ]
    biases = [normal(f"{seed} bias {i}", b).requires_grad_() for i, b in enumerate(sizes[1:])]
    h = x
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = h if i == 0 else h.relu()
        last, h = h, math.sqrt(2 / w.shape[1]) * h @ w.T + 0.1 * b
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f, weights + biases, retain_graph=True)]) for f in h
    ]
    gradients = torch.stack(gradients)
    return (2 * last @ last.T / width + 0.01).detach(), gradients @ gradients.T


@pytest.mark.parametrize(("depth", "width", "networks"), [(1, 400000, 1), (2, 1500, 6)])
def test_kernels_are_the_means_of_wide_random_networks(depth, width, networks):
    """Each hidden layer estimates E φ(u)φ(v) from its units; of a product of ReLUs of variance q, the mean at u = v is
    q/2 and the variance at most E φ⁴ = 3q²/2 − q²/4, so the relative error has the deviation √5/√units. The errors of
    layers add up to depth times that at most, and the sums of the NTK mix such terms. 4 deviations are allowed."""
    x = normal(3, 4, 5)
    covariance, tangent = (
        sum(t) / networks for t in zip(*(random_network(x, width, depth, s) for s in range(networks)), strict=True)
    )
    margin = 4 * depth * math.sqrt(5 / (width * networks))
    for kernel, got in (("nngp", covariance), ("ntk", tangent)):
        expected = relu_kernel(x, x, depth, kernel)
        scale = expected.diagonal().sqrt()
        assert ((got - expected).abs() / torch.outer(scale, scale)).max() < margin


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
def test_gradients_of_kernels_are_finite_differences(kernel):
    x, y = normal(4, 3, 4).requires_grad_(), normal(5, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: relu_kernel(a, b, 3, kernel), (x, y))
    assert torch.autograd.gradcheck(lambda a: relu_kernel(a, a, 2, kernel), (x,))


def test_a_start_at_real_images_has_finite_gradients():
    """Where a synthetic image is one of the real ones, the angle is 0."""
    x = normal(6, 3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(relu_kernel(x, x.detach().clone(), 2, "ntk").square().sum(), x)
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_coefficients_minimize_the_weighted_ridge_problem():
    f, y, w = normal(7, 6, 9), normal(8, 6, 3), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5, 3.0], dtype=torch.float64)
    k = f @ f.T
    penalty = 0.1 * (w * k.diagonal()).mean()
    # k = R Rᵀ, and the problem in Rᵀc is an ordinary one
    r = torch.linalg.cholesky(k)
    stacked = torch.cat([w.sqrt().unsqueeze(1) * r, penalty.sqrt() * torch.eye(6, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([w.sqrt().unsqueeze(1) * y, torch.zeros(6, 3).double()])).solution
    got = coefficients(k, y, 0.1, w)
    torch.testing.assert_close(r.T @ got, wanted, rtol=1e-9, atol=1e-12)
    assert (got[3] == 0).all()
    assert torch.equal(coefficients(k, y, 0.1), coefficients(k, y, 0.1, torch.ones(6)))


def test_a_kernel_of_zeros_gives_what_the_loop_stops_at(digits, tmp_path):
    method = KIP(task(digits, dtype=torch.float32), KIPSettings(batch_real=10, ridge=0.0))
    with torch.no_grad():
        method.images[0] = method.images[1]  # two equal images, and no penalty
    method.kernel = lambda x, y: torch.zeros(len(x), len(y), dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="larger ridge"):
        run_for(method, 1, tmp_path)


# --- KIP and Label Solve ----------------------------------------------------------------------------------------------


def ridge_predictions(kts, kss, y, ridge):
    penalty = ridge * kss.trace() / len(kss) * torch.eye(len(kss), dtype=kss.dtype)
    return kts @ torch.linalg.inv(kss + penalty) @ y


@pytest.mark.parametrize("labels", ["learned", "hard"])
@pytest.mark.parametrize(("kernel", "depth"), [("ntk", 1), ("nngp", 3)])
def test_a_step_of_kip(digits, kernel, depth, labels):
    t = task(digits)
    method = KIP(t, KIPSettings(kernel=kernel, depth=depth, batch_real=49, ridge=1e-3, labels=labels))
    got, g = method.loss(2, generator(0, "step")), generator(0, "step")
    x = real(t, torch.cat([pick(t, c, 4, g) for c in range(10)]))
    wanted = F.one_hot(torch.arange(10).repeat_interleave(4), 10).double() - 0.1
    y = method.scores if labels == "learned" else F.one_hot(t.start.labels, 10).double() - 0.1
    assert set(method.learned) == {"images"} | ({"scores"} if labels == "learned" else set())
    kts, kss = (plain_kernel(a, method.images, depth, kernel) for a in (x, method.images))
    expected = (wanted - ridge_predictions(kts, kss, y, 1e-3)).square().sum() / 2 / 40
    assert_same_step(method, expected, got)


def test_kip_learns_its_share_and_keeps_probabilities_beside_scores(digits, tmp_path):
    start = begin("random", 2, digits)
    start = replace(start, distilled=torch.arange(20) % 2 == 0)
    method = KIP(Task(start, Context(digits)), KIPSettings(batch_real=200))
    losses = run_for(method, 20, tmp_path)
    made = method.distilled()
    assert losses[-1] < losses[0]
    for a, b in ((made.images, start.images), (made.scores, centered(start.labels, 10))):
        assert torch.equal((a != b).flatten(1).any(1), start.distilled)
    torch.testing.assert_close(made.labels, probabilities(made.scores), rtol=0, atol=0)
    found = method.further_results({"kip": made, "start": start})["kernel"]["kernel regression"]
    for name, subset in {"kip": made, "start": start}.items():
        x, test = subset.images.double(), digits.normalize(digits.test.images, CPU, torch.float64)
        y = (made.scores if name == "kip" else centered(start.labels, 10)).double()
        guess = ridge_predictions(plain_kernel(test, x, 1, "ntk"), plain_kernel(x, x, 1, "ntk"), y, 1e-6).argmax(1)
        assert found[name] == pytest.approx(100 * (guess == digits.test.labels).double().mean().item(), abs=0.3)
    assert found["kip"] > found["start"]


def test_kip_needs_an_image_of_each_class(digits):
    with pytest.raises(ValueError, match="batch_real is 9; allowed is 10, the number of classes, and above"):
        KIP(task(digits), KIPSettings(batch_real=9))


@pytest.mark.parametrize("share", ["all", "half"])
def test_label_solve_is_the_least_squares_solution(digits, tmp_path, share):
    data = digits.subset(30, generator(0, "few"))
    start = begin("random", 2, data)
    learned = torch.ones(20, dtype=torch.bool) if share == "all" else torch.arange(20) % 2 == 0
    start = replace(start, distilled=learned)
    t = Task(start, Context(data), dtype=torch.float64)
    method = LabelSolve(t, LabelSolveSettings(kernel="nngp", depth=2, ridge=1e-3))
    (loss,) = run_for(method, 1, tmp_path)
    x, everything = t.start.images.double(), real(t, torch.arange(len(data.train)))
    a = ridge_predictions(
        plain_kernel(everything, x, 2, "nngp"), plain_kernel(x, x, 2, "nngp"), torch.eye(20).double(), 1e-3
    )
    y, old = F.one_hot(data.train.labels, 10).double() - 0.1, F.one_hot(start.labels, 10).double() - 0.1
    rest = y - a[:, ~learned] @ old[~learned]
    expected = torch.linalg.lstsq(a[:, learned], rest).solution
    torch.testing.assert_close(method.scores.detach(), expected, rtol=1e-6, atol=1e-9)
    mine = a[:, learned]
    normal_equations = mine.T @ (mine @ method.scores.detach() - rest)
    assert normal_equations.abs().max() < 1e-7 * (mine.T @ rest).abs().max()
    error = (a @ method.all_scores().detach() - y).square().sum(1).mean().item() / 2
    assert loss == pytest.approx(error, rel=1e-9)
    made = method.distilled()
    assert torch.equal(made.images, start.images)
    assert torch.equal((made.scores != old.float()).any(1), learned)


@pytest.mark.parametrize("ridge", [1e-2, 1e-6])
def test_label_solve_takes_the_shortest_of_many_solutions(digits, tmp_path, ridge):
    """Twice the same images: both copies get the same scores."""
    start = begin("random", 1, digits)
    both = [torch.cat([t, t]) for t in (start.images, start.labels, start.distilled, start.indices)]
    twice = replace(start, images=both[0], labels=both[1], distilled=both[2], indices=both[3])
    method = LabelSolve(Task(twice, Context(digits), dtype=torch.float64), LabelSolveSettings(ridge=ridge))
    run_for(method, 1, tmp_path)
    torch.testing.assert_close(method.scores[:10], method.scores[10:], rtol=1e-6, atol=1e-8)


# --- FRePo ------------------------------------------------------------------------------------------------------------


def frepo(t, **changes):
    given = {"model": NET, "batch_real": 40, "batch_train": 15, "networks": 3, "max_age": 4, "lr_network": 0.01}
    return FRePo(t, FRePoSettings(**{**given, **changes}))


def train_plainly(net, adam, images, scores, steps, g, weights=None):
    net.train()
    for _ in range(steps):
        i = torch.randperm(len(images), generator=g)[:15]
        errors = (net(images[i]) - scores[i]).square().sum(1) / 2
        adam.zero_grad()
        (errors if weights is None else errors * weights[i]).mean().backward()
        adam.step()


def frepo_loss(net, x, wanted, images, y, flip, weights=None):
    net.eval()
    margin = y.sort(1).values
    bonus = torch.minimum(margin[:, -1] - margin[:, -2], torch.tensor(0.1, dtype=y.dtype)).mean()
    w = torch.ones(len(y)).double() if weights is None else weights
    if flip:
        images, y, w = torch.cat([images, images.flip(-1)]), torch.cat([y, y]), torch.cat([w, w])
    f, ft = net.embed(images), net.embed(x).detach()
    kss = f @ f.T
    penalty = 1e-6 * (w * kss.diagonal()).mean()
    # w^½ (w^½ K w^½ + λ)⁻¹ w^½ y, by the inverse of K + λ/w
    solved = torch.linalg.solve(kss + penalty * torch.diag(1 / w), y)
    return (ft @ f.T @ solved - wanted).square().sum(1).mean() / 2 - bonus


@pytest.mark.parametrize("weights", [None, "halves"])
@pytest.mark.parametrize("flip", [True, False])
def test_steps_of_frepo(digits, flip, weights):
    """Four iterations: networks of the pool of ages 0, 1, 2, one trained between two of them, one replaced."""
    t = task(digits)
    if weights:
        t = replace(t, start=replace(t.start, weights=torch.linspace(0.5, 1.5, 20)))
    method = frepo(t, flip=flip, max_age=3)
    w = None if weights is None else t.start.weights.double()
    nets = [t.network(NET, "network", k) for k in range(3)]
    adams, ages, drawn, last = [torch.optim.Adam(n.parameters(), 0.01) for n in nets], [0, 1, 2], 3, None
    images, scores = method.images.detach(), method.scores.detach()
    replaced = 0
    for iteration in range(6):
        got, g = method.loss(iteration, generator(1, iteration)), generator(1, iteration)
        if last is None:
            for net, adam, age in zip(nets, adams, ages, strict=True):
                train_plainly(net, adam, images, scores, age, g, w)
        else:
            train_plainly(nets[last], adams[last], images, scores, 1, g, w)
            ages[last] += 1
            if ages[last] > 3:
                nets[last] = t.network(NET, "network", drawn)
                adams[last], ages[last] = torch.optim.Adam(nets[last].parameters(), 0.01), 0
                drawn, replaced = drawn + 1, replaced + 1
        last = int(torch.randint(3, (), generator=g))
        indices = torch.randperm(len(digits.train), generator=g)[:40]
        wanted = F.one_hot(digits.train.labels[indices], 10).double() - 0.1
        expected = frepo_loss(nets[last], real(t, indices), wanted, method.images, method.scores, flip, w)
        assert_same_step(method, expected, got)
        assert method.state["steps"].tolist() == ages
    assert replaced > 0


def test_scores_start_scaled_by_the_number_of_classes(digits):
    method = frepo(task(digits, dtype=torch.float32))
    torch.testing.assert_close(method.scores.detach(), centered(method.labels, 10))
    assert [round(method.decay(i), 3) for i in (0, 250000, 500000)] == [1.0, 0.55, 0.1]


def test_lamb_comes_from_timm(digits, tmp_path, monkeypatch, capsys):
    method = frepo(task(digits))
    groups = method.optimizer().param_groups
    assert [type(method.optimizer()).__name__, *(group["lr"] for group in groups)] == ["Lamb", 3e-4, 3e-4]
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    command = ["distill", "frepo", "--data.dataset", "digits", "--model", NET, "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert "timm is not installed: install selmatch_ext[timm], or give adam" in capsys.readouterr().err


def test_the_network_of_frepo():
    net = models.build("FRePoNetBN", 3, 10, 32)
    kinds = [type(layer).__name__ for layer in net.features]
    block = ["Conv2d", "ReLU", "AvgPool2d"]
    assert kinds == [*block, "BatchNorm2d", *block, "BatchNorm2d", *block]
    convs = [layer for layer in net.features if isinstance(layer, torch.nn.Conv2d)]
    assert [c.out_channels for c in convs] == [128, 256, 512] and net.classifier.in_features == 512 * 16
    assert all((c.bias == 0).all() for c in convs)
    for c in convs[1:]:
        std = 1 / math.sqrt(9 * c.in_channels)
        # the variance of 295 000 draws or more is known to 0.5 %; none is beyond the cut
        assert c.weight.std().item() == pytest.approx(std, rel=0.01)
        assert c.weight.abs().max() <= 2 * std / 0.8796 and c.weight.abs().max() > 2 * std
    names = [type(layer).__name__ for layer in models.build("FRePoNetD4W8", 1, 10, 16).features]
    assert names == block * 4
    with pytest.raises(ValueError, match="at most 65536 channels in the last block"):
        models.build("FRePoNetD11W128", 3, 10, 32)
    with pytest.raises(ValueError, match="images are too small"):
        models.build("FRePoNet", 3, 10, 4)
