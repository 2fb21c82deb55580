"""The fused engine's steps replayed from graphs: the same bits as without, through a recorder that stands for CUDA's
and destroys what a real one may overwrite; and CUDA's own where there is a GPU."""

from unittest import mock

import pytest
import torch
from test_fused import Functional
from test_unroll import CLASSES, Problem, assert_near, network
from torch import nn

from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.unroll import UnrolledSGD, sgd, unrolled_sgd
from selmatch_ext.unroll.adjoint import UnrollPlan
from selmatch_ext.unroll.graphs import GraphedStepper, _map, _tensors
from selmatch_ext.unroll.tesla import Wanted

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [[0, 1, 2, 3], [3, 4, 4, 5], [9, 0], [5, 6, 7, 8], [8, 9, 10, 11], [11, 1]]


def spoil(value):
    for t in _tensors(value):
        t.fill_(float("nan") if t.is_floating_point() else 0)


class FakeRecorder:
    """Runs a "graph" on the tensors that it was recorded with and writes to the tensors that it gave then. What no one
    may rely on becomes nan: results before the first replay and after any other one, inputs after a replay."""

    def __init__(self):
        self.warm, self.recorded, self.replays = 0, [], 0

    def warm_up(self, function, inputs):
        self.warm += 1
        return function(*inputs)

    def record(self, function, inputs):
        results = function(*inputs)
        spoil(results)
        self.recorded.append(results)

        def replay():
            self.replays += 1
            for others in self.recorded:
                spoil(others)
            for to, found in zip(_tensors(results), _tensors(function(*inputs)), strict=True):
                assert to.stride() == found.stride()
                to.copy_(found)
            spoil(inputs)

        return replay, results


def problem_of(model, count=6, **options):
    """A problem of 6 steps: four of one batch size, two of another between them."""
    problem = Problem(model, torch.float32, lr=torch.linspace(0.05, 0.2, count).tolist(), **options)
    problem.batches = [torch.tensor(b) for b in BATCHES[:count]]
    return problem


@pytest.fixture
def recorder(monkeypatch):
    """Makes unrolled_sgd run through it."""
    fake, choose = FakeRecorder(), sgd._choose

    def graphed(*arguments):
        stepper, choice = choose(*arguments)
        assert choice.name == "fused"
        return GraphedStepper(stepper, fake), choice

    def switch_on():
        monkeypatch.setattr(sgd, "_choose", graphed)
        return fake

    return switch_on


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert expected[name].norm() > 0, name
        assert torch.equal(gradient, expected[name]), name


NETWORKS = {
    **{name: lambda name=name: network(name) for name in ("ConvNetD2W8", "ConvNetD2W8BN", "ConvNetD2W8LNASwishMP")},
    "Winograd": lambda: network("ConvNetD2W32NN"),
    "sums": Functional,
    "MLP": lambda: network("MLP"),
}
OPTIONS = [
    {},
    {"keep": "activations"},
    {"keep": "all"},
    {"gradient": "tesla"},
    {"precision": "bfloat16", "keep": "activations"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_same_bits(make, options, recorder):
    torch.manual_seed(0)
    problem = problem_of(make())
    problem.augmentations = [sample_augmentation(len(b), 8, 8, per_sample=True) for b in problem.batches]
    expected = problem.gradients(unrolled_sgd, engine="fused", **options)
    fake = recorder()
    assert_same_bits(problem.gradients(unrolled_sgd, engine="fused", **options), expected)
    # Of either function the larger batch is warmed up once and replayed 3 times, the smaller one once.
    assert (fake.warm, len(fake.recorded), fake.replays) == (4, 4, 8)


@pytest.mark.parametrize("keep", ["nothing", "activations", "all"])
def test_a_last_smaller_batch_and_integer_labels(keep, recorder):
    """The last batch occurs once and never becomes a graph."""
    problem = problem_of(network("ConvNetD2W8"), soft=False, count=4)
    problem.batches = [torch.tensor(b) for b in ([0, 1, 2, 3], [3, 4, 4, 5], [5, 6, 7, 8], [9, 10, 11])]
    expected = problem.gradients(unrolled_sgd, keep=keep)
    fake = recorder()
    assert_same_bits(problem.gradients(unrolled_sgd, keep=keep), expected)
    assert (fake.warm, len(fake.recorded), fake.replays) == (4, 2, 4)


@pytest.mark.parametrize("fixed", ["images", "labels", "start", "lr"])
def test_what_needs_no_gradient(fixed, recorder):
    """Without that of start the first step of the backward pass wants less than the others: a graph of its own."""
    problem = problem_of(network("ConvNetD2W8BN"))
    getattr(problem, fixed).requires_grad_(False)
    expected = problem.gradients(unrolled_sgd)
    fake = recorder()
    assert_same_bits(problem.gradients(unrolled_sgd), expected)
    assert fake.replays > 0


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
def test_momentum(nesterov, recorder):
    problem = problem_of(network("ConvNetD2W8BN"))
    momentum, decay = (torch.full((6,), value, requires_grad=True) for value in (0.9, 0.01))
    options = {"momentum": momentum, "weight_decay": decay, "nesterov": nesterov}
    expected = problem.gradients(unrolled_sgd, **options)
    fake = recorder()
    assert_same_bits(problem.gradients(unrolled_sgd, **options), expected)
    assert fake.replays == 8


def test_without_gradients(recorder):
    problem = problem_of(network("ConvNetD2W8"))
    arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches, problem.lr
    with torch.no_grad():
        expected = unrolled_sgd(*arguments)
        recorder()
        assert torch.equal(unrolled_sgd(*arguments), expected)


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_results_are_the_callers(parameters, images, labels):
    """Every result of steps that take turns in what is wanted and kept, once all are done; the layout of what was."""
    problem = problem_of(network("ConvNetD2W8"))
    turns = (Wanted(parameters, images, labels), "all"), (Wanted(not parameters, not images, not labels), "nothing")
    plan = UnrollPlan([], None, None, "activations", "exact", "float32")
    plain, choice = sgd._choose(problem.model, problem.start, problem.images, plan, "fused")
    inputs = [t.detach() for t in (problem.start, problem.images, problem.labels)]
    x, y = inputs[1].split(3), inputs[2].split(3)
    found = []
    for stepper in (plain, GraphedStepper(plain, FakeRecorder())):
        steps = []
        for i in range(8):
            (wanted, keep), theta, batch = turns[i % 2], (1 + i) * inputs[0], (x[i // 2], y[i // 2])
            gradient, kept = stepper.gradient(theta, *batch, wanted, keep)
            steps.append((gradient, kept or (), stepper.derivative(theta, *batch, kept, theta.flip(0), wanted)))
        found.append(steps)
    for (gradient, kept, derivative), expected in zip(found[1], found[0], strict=True):
        assert torch.equal(gradient, expected[0])
        for a, b in zip(kept, expected[1], strict=True):
            assert (a is None) == (b is None)
            assert all(torch.equal(s, t) and s.stride() == t.stride() for s, t in zip(a or (), b or (), strict=True))
        for name, value in vars(derivative).items():
            other = getattr(expected[2], name)
            assert (value is None) == (other is None) and (value is None or torch.equal(value, other)), name


def test_wrong_labels_are_named(recorder):
    problem = problem_of(network("ConvNetD2W8"))
    problem.labels = problem.labels.detach()[:, :4]
    recorder()
    with pytest.raises(ValueError, match="labels have 4 columns, the model has 5 outputs"):
        problem.gradients(unrolled_sgd)


def test_map_reaches_every_tensor():
    a, b = torch.zeros(2), torch.ones(3)
    assert _map(len, (a, [None, b], 4)) == (2, (None, 3), 4)


def with_dropout():
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, CLASSES))


@pytest.mark.parametrize(
    "options, model, message",
    [
        ({}, lambda: network("ConvNetD1W4"), "cuda_graphs=True needs CUDA tensors, start is on cpu"),
        ({"engine": "autograd"}, lambda: network("ConvNetD1W4"), "cuda_graphs=True needs the fused engine.* asked"),
        ({}, with_dropout, r"cuda_graphs=True needs the fused engine.* no rule for Dropout \(1\)"),
    ],
    ids=["cpu", "autograd", "dropout"],
)
def test_where_there_are_no_graphs(options, model, message):
    with pytest.raises(ValueError, match=message):
        problem_of(model()).gradients(unrolled_sgd, cuda_graphs=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*OPTIONS, {"precision": "tf32"}], ids=str)
@pytest.mark.parametrize("name", ["ConvNetD3W32", "ConvNetD3W32BN", "VGG11"])
def test_on_a_gpu(name, options, monkeypatch):
    """Twice: the second call's graphs lie where the first one's were."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # or two runs differ without graphs, too
    problem = problem_of(network(name, 32), size=32)
    problem.model.cuda()
    problem.lr = problem.lr / 10  # so that steps do not magnify rounding
    for attribute in ("images", "labels", "start", "lr"):
        setattr(problem, attribute, getattr(problem, attribute).detach().cuda().requires_grad_())
    problem.target = problem.target.cuda()
    problem.batches = [b.cuda() for b in problem.batches]
    expected = problem.gradients(unrolled_sgd, **options)
    for _ in range(2):
        found = problem.gradients(unrolled_sgd, cuda_graphs=True, **options)
        assert_near(found, expected, 1e-2 if "precision" in options else 1e-6)


def test_a_second_call_captures_nothing(recorder):
    """`UnrolledSGD` keeps what it read, its copy of the network and the graphs."""
    problem = problem_of(network("ConvNetD2W8"))
    expected = problem.gradients(unrolled_sgd)
    fake = recorder()
    unrolled = UnrolledSGD(problem.model)
    assert_same_bits(problem.gradients(lambda model, *rest, **options: unrolled(*rest, **options)), expected)
    before = fake.warm, len(fake.recorded), fake.replays
    with mock.patch.object(sgd, "_choose", side_effect=AssertionError("read again")):
        assert_same_bits(problem.gradients(lambda model, *rest, **options: unrolled(*rest, **options)), expected)
    assert (fake.warm, len(fake.recorded)) == before[:2] and fake.replays > before[2]


def test_a_set_of_one_image_in_larger_batches():
    """BatchNorm of a map of one pixel takes statistics from the batch, not from the set."""
    model = network("ConvNetD3W8BN")
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    images = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    arguments = start, images, torch.tensor([1]), [torch.tensor([0, 0, 0])], 0.1
    found = [unrolled_sgd(model, *arguments, engine=engine) for engine in ("fused", "autograd")]
    torch.testing.assert_close(*found)
