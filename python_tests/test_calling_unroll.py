"""`unrolled_sgd` and what is around it under every way of calling PyTorch: torch.func, torch.compile, inference mode,
other default devices and dtypes, wrapped networks."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import unrolled_sgd_full_graph
from test_unroll import CLASSES, Problem, network
from torch import nn

import selmatch_ext as sm
from selmatch_ext.models.flat import flatten
from selmatch_ext.modules.unwrap import unwrapped
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = pytest.mark.parametrize("engine", ["fused", "autograd"])


def problem_and_loss(engine, function=unrolled_sgd):
    problem = Problem(network("ConvNetD1W4BN"))
    options = {"engine": engine} if function is unrolled_sgd else {}

    def loss(images, labels, lr):
        theta = function(problem.model, problem.start, images, labels, problem.batches, lr, **options)
        return (theta - problem.target).square().sum()

    inputs = tuple(t.detach() for t in (problem.images, problem.labels, problem.lr))
    return problem, loss, inputs


@ENGINES
def test_torch_func(engine):
    problem, loss, inputs = problem_and_loss(engine)
    _, plain, _ = problem_and_loss(engine, unrolled_sgd_full_graph)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(plain(*leaves), leaves)
    assert_all_close(torch.func.grad(loss, (0, 1, 2))(*inputs), expected)
    value, backward = torch.func.vjp(loss, *inputs)
    assert_all_close(backward(torch.tensor(2.0, dtype=torch.float64)), [2 * t for t in expected])
    assert_all_close(torch.func.jacrev(loss, (0, 1, 2))(*inputs), expected)
    for refused in (torch.func.hessian, lambda f: torch.func.grad(lambda *x: torch.func.grad(f)(*x).sum())):
        with pytest.raises((RuntimeError, NotImplementedError), match="differentiable once|no forward-mode"):
            refused(loss)(*inputs)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative; use reverse mode"):
        torch.func.jvp(loss, inputs, inputs)


@ENGINES
def test_vmap(engine):
    problem, loss, (images, labels, lr) = problem_and_loss(engine)
    many = torch.stack([images, images + 0.1, images - 0.1])
    rates = torch.stack([lr, 2 * lr, lr / 2], dim=1)
    gradient = torch.func.grad(loss, (0, 2))
    found = torch.func.vmap(gradient, (0, None, 1))(many, labels, rates)
    for k in range(3):
        assert_all_close([t[k] for t in found], gradient(many[k], labels, rates[:, k]))
    hard = torch.stack([torch.arange(12) % CLASSES, torch.arange(12) % 2])
    values = torch.func.vmap(lambda y: loss(images, y, lr))(hard)
    assert_all_close(values, [loss(images, y, lr) for y in hard])


def test_compiled_callers_get_the_same():
    problem, loss, (images, labels, lr) = problem_and_loss("auto")
    images.requires_grad_()
    expected = torch.autograd.grad(loss(images, labels, lr), images)
    with torch._dynamo.config.patch(suppress_errors=False):
        compiled = torch.compile(lambda *inputs: 2 * loss(*inputs), backend="aot_eager")
        found = torch.autograd.grad(compiled(images, labels, lr), images)
    assert_all_close(found, [2 * expected[0]])


def test_inference_mode():
    problem, loss, inputs = problem_and_loss("auto")
    expected = loss(*inputs)
    with torch.inference_mode():
        made_inside = [t.clone() for t in inputs]
        assert_all_close([loss(*made_inside)], [expected])


def public_calls():
    """What `sm` and the modules below it give on the CPU, with every tensor that a caller gives named in full."""
    where = {"device": "cpu", "dtype": torch.float32}
    draw = torch.Generator(device="cpu").manual_seed(0)
    results = {}
    for name in ("ConvNetD1W4BN", "LeNet", "ResNet18BN", "VGG11"):
        model = sm.models.build(name, 3, CLASSES, 32, torch.Generator(device="cpu").manual_seed(0))
        results[name] = flatten(model.parameters()).detach()
    model = sm.models.build("ConvNetD1W4BN", 3, CLASSES, 8, torch.Generator(device="cpu").manual_seed(0))
    start = flatten(model.parameters()).detach()
    images = torch.randn(12, 3, 8, 8, generator=draw, **where).requires_grad_()
    labels = torch.arange(12, device="cpu") % CLASSES
    batches = [torch.arange(k, k + 6, device="cpu") for k in (0, 4)]
    results["engine"] = str(sm.explain_engine(model, images))
    for engine in ("fused", "autograd"):
        theta = unrolled_sgd(model, start, images, labels, batches, 0.1, engine=engine)
        results[engine] = theta.detach()
        results[f"{engine} gradient"] = torch.autograd.grad(theta.square().sum(), images)[0]
    return results


@pytest.mark.parametrize("default", ["meta", torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_defaults_change_nothing(default):
    expected = public_calls()
    before = torch.get_default_dtype()
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(default)
        found = public_calls()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for name, value in expected.items():
        assert value == found[name] if isinstance(value, str) else torch.equal(value, found[name]), name


@pytest.mark.parametrize(
    "rate", [0.1, np.float64(0.1), np.array(0.1), torch.tensor(0.1, dtype=torch.float64)], ids=repr
)
def test_a_rate_keeps_its_64_bits(rate):
    problem = Problem(network("ConvNetD1W4"))
    arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches
    expected = unrolled_sgd_full_graph(*arguments, torch.tensor(0.1, dtype=torch.float64))
    assert_all_close([unrolled_sgd(*arguments, rate)], [expected])


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "torch.compile": torch.compile,
    "two of them": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_networks(wrap):
    problem = Problem(network("ConvNetD1W4BN"))
    expected = problem.gradients(unrolled_sgd)
    problem.model = wrap(problem.model)
    assert sm.explain_engine(problem.model, problem.images).name == "fused"
    found = problem.gradients(unrolled_sgd, engine="fused")
    assert_all_close(found.values(), expected.values())


class ReparamModule(nn.Module):
    """As the public code wraps its networks."""

    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)
        flat = flatten(self.module.parameters()).detach()
        for m in self.module.modules():
            for name in list(m._parameters):
                del m._parameters[name]
        self.flat_param = nn.Parameter(flat)

    def forward(self, x, flat_param=None):
        raise AssertionError("is not called")


class Auxiliary(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = network("ConvNetD1W4"), kind

    def forward(self, x):
        logits = self.inner(x)
        return {"tuple": (logits, logits), "dict": {"logits": logits, "aux": logits}}[self.kind]


REFUSED = [
    (lambda m: ReparamModule(m), TypeError, "ReparamModule, .* pass the network inside"),
    (lambda m: torch.jit.script(m), TypeError, "torch.jit.ScriptModule; give the Python module"),
    (lambda m: nn.Sequential(m, nn.LazyLinear(3)), TypeError, "not initialized; call it once"),
    (lambda m: Auxiliary("tuple"), ValueError, "it gave tuple; let it return the logits alone"),
    (lambda m: Auxiliary("dict"), ValueError, "it gave dict of logits, aux; let it return the logits alone"),
    (lambda m: m.state_dict(), TypeError, "model must be a torch.nn.Module, got OrderedDict"),
]


@pytest.mark.parametrize("make, error, message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_is_no_network_is_refused_before_work(make, error, message):
    problem = Problem(network("ConvNetD1W4"))
    model = make(problem.model.double())
    with pytest.raises(error, match=message):
        unwrapped(model)
        model.double()
        start = flatten(model.parameters()).detach()
        unrolled_sgd(model, start, problem.images, problem.labels, problem.batches, 0.1)


class Odd(nn.Module):
    """Buffers of other kinds, a parameter of no elements, one that is frozen and one that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.inner = network("ConvNetD1W4")
        self.inner.classifier.weight.requires_grad_(False)
        self.nothing, self.unused = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))
        self.register_buffer("wave", torch.tensor([1j, 2.0]))
        self.register_buffer("order", torch.arange(3).flip(0))
        self.register_buffer("absent", None)

    def forward(self, x):
        return self.inner(x[:, self.order]) * self.wave.abs().sum().to(x.dtype)


def test_buffers_and_parameters_of_all_kinds():
    problem = Problem(Odd())
    problem.model.wave = problem.model.wave.to(torch.complex128)
    expected = problem.gradients(unrolled_sgd_full_graph)
    for keep in ("nothing", "activations", "all"):
        found = problem.gradients(unrolled_sgd, keep=keep)
        assert_all_close(found.values(), expected.values())


MADE = torch.arange(6)
NO_NUMBER = r"^lr must be a floating tensor or a number, got "
ODD = [
    ({"batches": None}, TypeError, "^batches must be a list of index tensors, one a step, got NoneType$"),
    ({"batches": 3}, TypeError, "^batches must be a list of index tensors, one a step, got int 3$"),
    ({"batches": torch.tensor(3)}, TypeError, "^batches must be a list of index tensors, one a step, got Tensor$"),
    ({"batches": [None, MADE]}, TypeError, r"^batches\[0\] must be an int64 or int32 tensor of indices, got NoneType$"),
    ({"batches": [MADE, MADE.short()]}, TypeError, r"^batches\[1\] must be an int64 or int32 .*, got torch.int16$"),
    (
        {"batches": [MADE.to("meta")] * 2},
        ValueError,
        r"^batches\[0\] must have values, got a tensor on the meta device$",
    ),
    ({"batches": [MADE.to_sparse()] * 2}, TypeError, r"^batches\[0\] must be a dense tensor, got .* torch.sparse_coo;"),
    (
        {"augmentations": 3},
        TypeError,
        "^augmentations must be a list of results of sample_augmentation, .*, got int 3$",
    ),
    ({"augmentations": [None, None]}, TypeError, r"^augmentations\[0\] must be a result of .*, got NoneType$"),
    ({"augmentations": sm.sample_augmentation(6, 8, 8)}, TypeError, "^augmentations must be .*, got Augmentation$"),
    (
        {"augmentations": [sm.sample_augmentation(rows, 8, 8, per_sample=True) for rows in (6, 5)]},
        ValueError,
        r"^augmentations\[1\] must have 1 row or 6, as batches\[1\], got 5$",
    ),
    ({"images": torch.ones(12, 3, 8, 8).to_sparse()}, TypeError, "^images must be a dense tensor, got .*sparse_coo;"),
    ({"images": torch.ones(12, 3, 8, 8, device="meta")}, ValueError, "^images are on meta, start is on cpu"),
    ({"start": torch.ones(3).to_sparse()}, TypeError, "^start must be a dense tensor, got .*sparse_coo;"),
    ({"labels": torch.ones(12).long().to_sparse()}, TypeError, "^labels must be a dense tensor, got .*sparse_coo;"),
    ({"labels": torch.ones(12, device="meta").long()}, ValueError, "^labels are on meta, start is on cpu"),
    ({"lr": float("nan")}, ValueError, "^lr must be finite in 64 bits, got float nan$"),
    ({"lr": np.array([0.1, np.inf])}, ValueError, "^lr must be finite in 64 bits, got ndarray$"),
    ({"lr": 10**400}, ValueError, "^lr must be finite in 64 bits, got int$"),
    ({"lr": True}, TypeError, NO_NUMBER + "bool True$"),
    ({"lr": np.bool_(True)}, TypeError, NO_NUMBER + "bool"),
    ({"lr": np.array([True, False])}, TypeError, "^lr must be an array of floating numbers, got bool$"),
    ({"lr": 0.1j}, TypeError, NO_NUMBER + "complex 0.1j$"),
    ({"lr": torch.tensor(True)}, TypeError, NO_NUMBER + "a tensor of torch.bool$"),
    ({"lr": torch.tensor(0.1, device="meta")}, ValueError, "^lr must have values, got .* meta device$"),
    ({"lr": torch.ones(2).to_sparse()}, TypeError, "^lr must be a dense tensor, got .*sparse_coo;"),
]


@pytest.mark.parametrize("change, error, message", ODD, ids=[f"{next(iter(c))}, {m}" for c, _, m in ODD])
def test_an_odd_argument_is_named(change, error, message):
    model = network("ConvNetD1W4").float()
    given = {"model": model, "start": flatten(model.parameters()).detach(), "images": torch.ones(12, 3, 8, 8)}
    given |= {"labels": torch.arange(12) % CLASSES, "batches": [MADE, MADE], "lr": 0.1} | change
    with pytest.raises(error, match=message) as found:
        unrolled_sgd(**given)
    assert "\n" not in str(found.value)


def test_indices_of_32_bits_are_taken():
    problem = Problem(network("ConvNetD1W4"))
    arguments = problem.model, problem.start, problem.images, problem.labels
    results = [
        unrolled_sgd(*arguments, [b.to(kind) for b in problem.batches], 0.1) for kind in (torch.int32, torch.int64)
    ]
    assert torch.equal(*results)


DISTRIBUTED = """
import sys
import torch
from torch import distributed, nn
import selmatch_ext as sm

distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
plain = sm.models.build("ConvNetD1W4BN", 3, 4, 8)
wrapped = nn.parallel.DistributedDataParallel(plain)
start = sm.models.flat.flatten(plain.parameters()).detach()
images, results = torch.randn(6, 3, 8, 8).requires_grad_(), []
for model in (plain, wrapped):
    theta = sm.unrolled_sgd(model, start, images, torch.arange(6) % 4, [torch.arange(6)] * 2, 0.1, engine="fused")
    results.append((theta, torch.autograd.grad(theta.square().sum(), images)[0]))
    print(sm.explain_engine(model, images).name)
assert all(map(torch.equal, *results))
distributed.destroy_process_group()
"""


def test_a_network_in_distributed_data_parallel(tmp_path):
    """In a process of its own, because torch has one process group."""
    program = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, str(tmp_path / "store")]
    run = subprocess.run(program, capture_output=True, text=True, cwd=Path(sm.__file__).parents[1])
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["fused"] * 2


def assert_all_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
