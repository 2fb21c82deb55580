"""`unrolled_sgd` with momentum and weight decay against autograd through all steps, and against torch.optim.SGD."""

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from reference import unrolled_sgd_full_graph
from test_graphs import assert_same_bits
from test_unroll import NORMS, Odd, Problem, assert_near, network
from torch.nn import functional as F

from selmatch_ext.models.flat import flatten
from selmatch_ext.unroll import UnrolledSGD, adjoint, unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = pytest.mark.parametrize("engine", ["fused", "autograd"])
NESTEROV = pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])


def optimizer(momentum=(0.9, 0.3, 0.7), weight_decay=(0.02, 0.1, 0.05), dtype=torch.float64, nesterov=False):
    """Options of `unrolled_sgd`: tensors that require a gradient."""
    momentum, weight_decay = (torch.tensor(t, dtype=dtype, requires_grad=True) for t in (momentum, weight_decay))
    return {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}


def assert_exact(problem, options, tolerance=1e-9, **more):
    """The gradients with respect to images, labels, rates, momentum, weight decay and start."""
    expected = problem.gradients(unrolled_sgd_full_graph, **options)
    for keep in ("nothing", "activations", "all"):
        assert_near(problem.gradients(unrolled_sgd, **options, keep=keep, **more), expected, tolerance)


@ENGINES
@NESTEROV
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_equal_those_of_the_full_graph(norm, nesterov, engine):
    problem = Problem(network(f"ConvNetD2W8{norm}"), augmented=True)
    assert_exact(problem, optimizer(nesterov=nesterov), engine=engine)


@ENGINES
@NESTEROV
@pytest.mark.parametrize("momentum, weight_decay", [(0.9, 0.05), (1.5, 0.0), (1e-3, 2.0)])
def test_one_value_for_all_steps(momentum, weight_decay, nesterov, engine):
    """Also a gradient at weight decay 0, and a momentum above 1, which torch.optim.SGD allows."""
    problem = Problem(network("ConvNetD2W8BN"), soft=False, lr=0.05)
    assert_exact(problem, optimizer(momentum, weight_decay, nesterov=nesterov), engine=engine)


@ENGINES
@pytest.mark.parametrize("name, value", [("momentum", 0.9), ("momentum", 0.0), ("weight_decay", 0.1)])
def test_one_of_the_two_alone(name, value, engine):
    """The other is the number 0. At momentum 0 the gradient of the momentum is not 0."""
    option = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True)}
    assert_exact(Problem(network("ConvNetD2W8")), option, engine=engine)


@NESTEROV
def test_only_what_is_asked_for(nesterov):
    """Each input alone gets the gradient that it gets among the others."""
    model = network("ConvNetD2W8")
    expected = Problem(model).gradients(unrolled_sgd, **optimizer(nesterov=nesterov))
    for name in expected:
        problem, options = Problem(model), optimizer(nesterov=nesterov)
        inputs = {n: getattr(problem, n) for n in ("images", "labels", "lr", "start")} | options
        for other in expected.keys() - {name}:
            inputs[other].requires_grad_(False)
        assert_near(problem.gradients(unrolled_sgd, **options), {name: expected[name]}, 1e-12)


@ENGINES
@NESTEROV
def test_the_result_is_that_of_torchs_optimizer(nesterov, engine):
    """Rates, momentum and weight decay of each step are put into its parameter group before the step."""
    problem, options = Problem(network("ConvNetD2W8BN"), soft=False), optimizer(nesterov=nesterov)
    arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches, problem.lr
    theta = unrolled_sgd(*arguments, **options, engine=engine)
    trained = copy.deepcopy(problem.model)
    torchs = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    for i, batch in enumerate(problem.batches):
        torchs.param_groups[0]["lr"] = problem.lr[i].item()
        torchs.param_groups[0] |= {name: options[name][i].item() for name in ("momentum", "weight_decay")}
        torchs.zero_grad()
        F.cross_entropy(trained(problem.images.detach()[batch]), problem.labels[batch]).backward()
        torchs.step()
    torch.testing.assert_close(theta, flatten(trained.parameters()), rtol=1e-12, atol=1e-12)


@ENGINES
def test_teslas_estimate_holds_theta_fixed_in_the_gradients_alone(engine):
    problem, options = Problem(network("ConvNetD2W8")), optimizer()
    expected = problem.gradients(unrolled_sgd_full_graph, **options, tesla=True)
    assert_near(problem.gradients(unrolled_sgd, **options, gradient="tesla", engine=engine), expected, 1e-9)


def test_dropout_is_repeated():
    problem, found = Problem(Odd()), []
    for function in (unrolled_sgd_full_graph, unrolled_sgd):
        torch.manual_seed(3)
        found.append(problem.gradients(function, **optimizer()))
    assert_near(found[1], found[0], 1e-9)


@pytest.mark.parametrize("precision, least", [("float32", 1 - 1e-5), ("bfloat16", 0.97)])
@ENGINES
def test_lower_precision(engine, precision, least):
    expected = Problem(network("ConvNetD2W32", size=16), size=16).gradients(unrolled_sgd, **optimizer())
    problem = Problem(network("ConvNetD2W32", size=16), torch.float32, size=16)
    for keep in ("nothing", "activations", "all"):
        options = optimizer(dtype=torch.float32) | {"keep": keep, "engine": engine, "precision": precision}
        for name, gradient in problem.gradients(unrolled_sgd, **options).items():
            assert gradient.dtype == torch.float32
            assert F.cosine_similarity(gradient.double().flatten(), expected[name].flatten(), dim=0) > least, name


def test_the_numbers_0_are_plain_sgd():
    problem = Problem(network("ConvNetD2W8"), torch.float32)
    expected = problem.gradients(unrolled_sgd)
    with mock.patch.object(adjoint, "MomentumUpdate", side_effect=AssertionError("not plain")):
        assert_same_bits(problem.gradients(unrolled_sgd, momentum=0, weight_decay=np.float64(0)), expected)


def test_two_vectors_a_step_are_kept():
    """theta_i and v_{i+1}; the latter only where lr or momentum needs a gradient, none at all without gradients. Beside
    them only the last step is kept."""
    problem, tapes = Problem(network("ConvNetD1W4")), []
    tape = adjoint._Tape
    arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches
    with mock.patch.object(adjoint, "_Tape", lambda needs: tapes.append(tape(needs)) or tapes[-1]):
        unrolled_sgd(*arguments, problem.lr, momentum=0.9)
        unrolled_sgd(*arguments, 0.1, momentum=0.9)
        with torch.no_grad():
            unrolled_sgd(*arguments, problem.lr, momentum=0.9)
    kept = [(len(t.thetas), len(t.velocities), [k is not None for k in t.kept]) for t in tapes]
    last = [False, False, True]
    assert kept == [(3, 3, last), (3, 0, last), (0, 0, [])]


def test_the_object_for_many_calls():
    problem = Problem(network("ConvNetD2W8"))
    unrolled = UnrolledSGD(problem.model)
    arguments = problem.start, problem.images, problem.labels, problem.batches, problem.lr
    for nesterov in (False, True):
        options = optimizer(nesterov=nesterov)
        assert torch.equal(unrolled(*arguments, **options), unrolled_sgd(problem.model, *arguments, **options))
    with pytest.raises(TypeError, match="dampening"):
        unrolled(*arguments, dampening=0.1)


@ENGINES
def test_a_second_backward_pass_and_torch_func(engine):
    problem, options = Problem(network("ConvNetD1W4BN")), optimizer(nesterov=True)
    momentum, decay = (options[name].detach() for name in ("momentum", "weight_decay"))

    def loss(momentum, decay, function=unrolled_sgd, **more):
        arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches, problem.lr
        theta = function(*arguments, momentum=momentum, weight_decay=decay, nesterov=True, **more)
        return (theta - problem.target).square().sum()

    leaves = [options["momentum"], options["weight_decay"]]
    expected = torch.autograd.grad(loss(*leaves, unrolled_sgd_full_graph), leaves)
    value = loss(*leaves, engine=engine)
    for _ in range(2):
        assert_all_close(torch.autograd.grad(value, leaves, retain_graph=True), expected)
    with pytest.raises(RuntimeError, match="unrolled_sgd is differentiable once"):
        torch.autograd.grad(value, leaves, create_graph=True)
    gradient = torch.func.grad(lambda *rates: loss(*rates, engine=engine), (0, 1))
    assert_all_close(gradient(momentum, decay), expected)
    many = torch.stack([momentum, momentum / 2], 1)
    found = torch.func.vmap(gradient, (1, None))(many, decay)
    for k in range(2):
        assert_all_close([t[k] for t in found], gradient(many[:, k], decay))
    value, backward = torch.func.vjp(lambda m: loss(m, decay, engine=engine), momentum)
    assert_all_close(torch.func.vmap(backward)(torch.tensor([1.0, 2.0]).double())[0], [expected[0], 2 * expected[0]])


def assert_all_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


NOT_NEGATIVE = "must be finite and at least 0, got values from"
BAD = [
    ({"momentum": -0.1}, ValueError, f"^momentum {NOT_NEGATIVE} -0.1 to -0.1$"),
    ({"momentum": torch.tensor([0.1, -0.2, 0.3])}, ValueError, f"^momentum {NOT_NEGATIVE} -0.2 to 0.3$"),
    ({"momentum": torch.tensor(math.nan)}, ValueError, f"^momentum {NOT_NEGATIVE} nan to nan$"),
    ({"momentum": math.inf}, ValueError, "^momentum must be finite in 64 bits, got float inf$"),
    ({"momentum": torch.ones(2)}, ValueError, r"^momentum must be 0-d or have shape \(3,\), one for each batch"),
    ({"momentum": "0.9"}, TypeError, "^momentum must be a floating tensor or a number, got str$"),
    ({"momentum": False}, TypeError, "^momentum must be a floating tensor or a number, got bool False$"),
    ({"weight_decay": -1e-4}, ValueError, f"^weight_decay {NOT_NEGATIVE} -0.0001 to -0.0001$"),
    ({"weight_decay": np.array([0.0, 1.0, -2.0])}, ValueError, f"^weight_decay {NOT_NEGATIVE} -2 to 1$"),
    ({"weight_decay": torch.tensor(math.inf)}, ValueError, f"^weight_decay {NOT_NEGATIVE} inf to inf$"),
    ({"weight_decay": torch.ones(3, 1)}, ValueError, r"^weight_decay must be 0-d or have shape \(3,\)"),
    ({"weight_decay": torch.tensor(1)}, TypeError, "^weight_decay must be a floating tensor or a number, got a tensor"),
    ({"nesterov": True}, ValueError, "^nesterov=True needs a momentum above 0 in every step$"),
    ({"nesterov": True, "momentum": torch.tensor([0.9, 0.0, 0.9])}, ValueError, "^nesterov=True needs a momentum"),
    ({"nesterov": 1, "momentum": 0.9}, TypeError, "^nesterov must be True or False, got int 1$"),
]


@pytest.mark.parametrize("options, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_wrong_options(options, error, message):
    problem = Problem(network("ConvNetD1W4"))
    arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches, problem.lr
    with pytest.raises(error, match=message):
        unrolled_sgd(*arguments, **options)
