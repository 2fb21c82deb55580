"""`unrolled_sgd` against autograd through all steps, and against everything that could go wrong around it."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from reference import unrolled_sgd_full_graph
from torch import nn
from torch.nn import functional as F

from selmatch_ext import models
from selmatch_ext.models.flat import flatten, parameter_count, unflatten
from selmatch_ext.ops.sampling import sample_augmentation
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = ("IN", "BN", "GN", "LN", "NN")
CLASSES = 5


class Problem:
    """A small matching problem: three batches, with images that occur twice in one of them or in two of them."""

    def __init__(self, model, dtype=torch.float64, size=8, channels=3, soft=True, lr=(0.1, 0.05, 0.2), augmented=False):
        draw = torch.Generator().manual_seed(0)
        self.model = model.to(dtype)
        self.images = torch.randn(12, channels, size, size, generator=draw).to(dtype).requires_grad_()
        if soft:
            self.labels = torch.randn(12, CLASSES, generator=draw).to(dtype).softmax(1).requires_grad_()
        else:
            self.labels = torch.randint(CLASSES, (12,), generator=draw)
        self.start = flatten(self.model.parameters()).detach().requires_grad_()
        self.target = self.start.detach() + 0.1 * torch.randn(self.start.shape, generator=draw).to(dtype)
        self.lr = torch.tensor(lr, dtype=dtype, requires_grad=True)
        self.batches = [torch.tensor(b) for b in ([0, 1, 2, 3], [3, 4, 4, 5, 9], [9, 0, 1, 11])]
        self.augmentations = None
        if augmented:
            self.augmentations = [
                sample_augmentation(len(b), size, size, per_sample=True, generator=draw) for b in self.batches
            ]

    def gradients(self, function, **options):
        """Of the matching loss: dict of name -> gradient, with respect to tensors among the options, too."""
        arguments = self.model, self.start, self.images, self.labels, self.batches, self.lr
        theta = function(*arguments, augmentations=self.augmentations, **options)
        loss = (theta - self.target).square().sum() / (self.start - self.target).square().sum()
        inputs = {"images": self.images, "labels": self.labels, "lr": self.lr, "start": self.start}
        inputs |= {name: option for name, option in options.items() if isinstance(option, torch.Tensor)}
        inputs = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def assert_near(gradients, expected, tolerance):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0, name
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


def network(name, size=8, channels=3):
    return models.build(name, channels, CLASSES, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("engine", ["autograd", "fused"])
@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_equals_full_graph(norm, augmented, engine):
    problem = Problem(network(f"ConvNetD2W8{norm}"), augmented=augmented)
    expected = problem.gradients(unrolled_sgd_full_graph)
    for keep in ("nothing", "activations", "all"):
        assert_near(problem.gradients(unrolled_sgd, engine=engine, keep=keep), expected, 1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_float32(norm):
    problem = Problem(network(f"ConvNetD3W32{norm}", size=32), dtype=torch.float32, size=32, augmented=True)
    assert_near(problem.gradients(unrolled_sgd), problem.gradients(unrolled_sgd_full_graph), 2e-3)


@pytest.mark.parametrize("name", ["ConvNetD2W8BNMPAL", "ConvNetD2W8NPASwish", "ConvNetD2W8GNAS"])
def test_other_layers_scalar_rate_and_integer_labels(name):
    problem = Problem(network(name, channels=1), channels=1, soft=False, lr=0.1)
    assert_near(problem.gradients(unrolled_sgd), problem.gradients(unrolled_sgd_full_graph), 1e-9)


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_tesla(engine):
    problem = Problem(network("ConvNetD2W8"), augmented=True)
    expected = problem.gradients(unrolled_sgd_full_graph, tesla=True)
    assert_near(problem.gradients(unrolled_sgd, gradient="tesla", engine=engine), expected, 1e-10)
    assert (expected["images"] - problem.gradients(unrolled_sgd)["images"]).norm() > 1e-3 * expected["images"].norm()


def test_gradcheck():
    model = network("ConvNetD1W4ASwish", size=4, channels=1).double()
    problem = Problem(model, size=4, channels=1)
    inputs = [problem.start, problem.images, problem.labels, problem.lr]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]

    def function(start, images, labels, lr):
        return unrolled_sgd(model, start, images, labels.softmax(1), problem.batches, lr)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_result_is_that_of_an_optimizer():
    problem = Problem(network("ConvNetD2W8BN"), soft=False, lr=0.1)
    theta = unrolled_sgd(problem.model, problem.start, problem.images, problem.labels, problem.batches, problem.lr)
    trained = copy.deepcopy(problem.model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for batch in problem.batches:
        optimizer.zero_grad()
        F.cross_entropy(trained(problem.images.detach()[batch]), problem.labels[batch]).backward()
        optimizer.step()
    torch.testing.assert_close(theta, flatten(trained.parameters()), rtol=1e-12, atol=1e-12)


def test_same_bits_twice_and_only_what_is_asked_for():
    problem = Problem(network("ConvNetD2W8"), dtype=torch.float32)
    first, second = problem.gradients(unrolled_sgd), problem.gradients(unrolled_sgd)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in first:  # each input alone gets the same gradient as among the others
        alone = Problem(problem.model, dtype=torch.float32)
        for other in first.keys() - {name}:
            getattr(alone, other).requires_grad_(False)
        gradients = alone.gradients(unrolled_sgd)
        assert gradients.keys() == {name}
        torch.testing.assert_close(gradients[name], first[name], rtol=1e-4, atol=1e-6)
    arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches, problem.lr
    theta = unrolled_sgd(*arguments)
    with torch.no_grad():
        plain = unrolled_sgd(*arguments, keep="activations")
    assert torch.equal(plain, theta) and theta.requires_grad and not plain.requires_grad


def test_second_backward_and_rates_as_numbers():
    problem = Problem(network("ConvNetD2W8"))
    for keep in ("nothing", "activations", "all"):
        arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches
        theta = unrolled_sgd(*arguments, 0.1, keep=keep)
        loss = (theta - problem.target).square().sum()
        first = torch.autograd.grad(loss, problem.images, retain_graph=True)[0]
        second = torch.autograd.grad(loss, problem.images)[0]
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)
    loss = unrolled_sgd(*arguments, 0.1).square().sum()
    with pytest.raises(RuntimeError, match="unrolled_sgd is differentiable once"):
        torch.autograd.grad(loss, problem.images, create_graph=True)


def test_the_model_is_left_alone():
    calls = []
    model = network("ConvNetD2W8BN").eval()
    model.features[0].requires_grad_(False)
    model.features[0].train()
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    model.classifier.register_forward_hook(lambda *_: calls.append(1))
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    problem = Problem(model, dtype=torch.float32)
    problem.gradients(unrolled_sgd)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert tensors == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert not model.features[0].weight.requires_grad and model.classifier.weight.requires_grad
    assert len(model.classifier._forward_hooks) == 1 and all(m.track_running_stats for m in [model.features[1]])


class Odd(nn.Module):
    """Shared, unused and normalized weights, a buffer, and dropout: what foreign modules come with."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 12)
        self.again = nn.Linear(12, 12)
        self.again.weight = self.mix.weight
        self.unused = nn.Linear(3, 4)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(12, CLASSES))
        self.register_buffer("scale", torch.full((12,), 0.5))
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, 2).flatten(1) * self.scale
        return self.scaled(self.dropout(torch.tanh(self.again(torch.tanh(self.mix(x))))))


@pytest.mark.parametrize("keep", ["nothing", "activations", "all"])
def test_odd_module(keep):
    problem = Problem(Odd())
    assert problem.start.numel() == sum(p.numel() for p in problem.model.parameters())
    torch.manual_seed(3)
    expected = problem.gradients(unrolled_sgd_full_graph)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert_near(problem.gradients(unrolled_sgd, keep=keep), expected, 1e-9)
    assert torch.equal(torch.get_rng_state(), after)  # drawn from as by the plain loop, not by the backward pass
    names = [name for name, _ in problem.model.named_parameters()]
    unused = names.index("unused.weight")
    gradient = list(unflatten(expected["start"] + 0 * problem.start, problem.model).values())[unused]
    assert gradient.norm() > 0  # the loss moves with it through the distance only


@pytest.mark.parametrize("keep", ["nothing", "activations", "all"])
def test_second_backward_sees_the_same_dropout(keep):
    problem = Problem(Odd())
    arguments = problem.model, problem.start, problem.images, problem.labels, problem.batches, problem.lr
    theta = unrolled_sgd(*arguments, keep=keep)
    loss, state = (theta - problem.target).square().sum(), torch.get_rng_state()
    first, second, third = (torch.autograd.grad(loss, problem.images, retain_graph=True)[0] for _ in range(3))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)
    torch.testing.assert_close(first, third, rtol=1e-12, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_networks_without_dropout_draw_nothing():
    state = torch.get_rng_state()
    Problem(network("ConvNetD2W8BN")).gradients(unrolled_sgd)
    assert torch.equal(torch.get_rng_state(), state)


def test_torchvision_residual_blocks():
    BasicBlock = pytest.importorskip("torchvision.models.resnet").BasicBlock

    def downsample(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2), nn.BatchNorm2d(outputs))

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    blocks = BasicBlock(8, 8), BasicBlock(8, 16, stride=2, downsample=downsample(8, 16))
    model = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))
    problem = Problem(model, soft=False)
    assert_near(problem.gradients(unrolled_sgd), problem.gradients(unrolled_sgd_full_graph), 1e-9)


def test_a_float32_model_runs_in_the_dtype_of_start():
    problem = Problem(Odd().eval())
    problem.model.dropout.p = 0.0
    expected = problem.gradients(unrolled_sgd)
    problem.model.float()
    assert_near(problem.gradients(unrolled_sgd), expected, 1e-12)
    assert problem.model.scale.dtype == torch.float32


def test_bfloat16_only_when_asked_for():
    problem = Problem(network("ConvNetD2W32", size=16), dtype=torch.float32, size=16)
    exact = problem.gradients(unrolled_sgd)
    with torch.autocast("cpu", torch.bfloat16):
        around = problem.gradients(unrolled_sgd)
    assert all(torch.equal(exact[name], around[name]) for name in exact)
    rounded = problem.gradients(unrolled_sgd, precision="bfloat16")
    for name in exact:
        assert rounded[name].dtype == torch.float32
        assert 0.97 < F.cosine_similarity(rounded[name].flatten(), exact[name].flatten(), dim=0) < 1 - 1e-9, name


MEMORY = """
import sys
import torch
from selmatch_ext import models
from selmatch_ext.models.flat import flatten
from selmatch_ext.unroll import unrolled_sgd

def megabytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

torch.set_num_threads(1)
model = models.build("ConvNetW32", 3, 10, 32)
start = flatten(model.parameters()).detach()
images, labels = torch.randn(32, 3, 32, 32, requires_grad=True), torch.arange(32) % 10
before = megabytes("VmRSS")
momentum = float(sys.argv[1])
for steps in (4, 16):
    batches = [torch.arange(32)] * steps
    theta = unrolled_sgd(model, start, images, labels, batches, torch.tensor(0.01).requires_grad_(), momentum=momentum)
    theta.square().sum().backward()
    print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("momentum, vectors", [(0.0, 1), (0.9, 2)])
def test_memory_does_not_grow_with_the_steps(momentum, vectors):
    # Freed memory goes back at once: what glibc would keep for reuse varies by tens of MB and is not the question.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, str(momentum)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    few, many = map(float, out.stdout.split())
    kept = 12 * vectors * parameter_count(network("ConvNetW32", size=32)) * 4 / 2**20
    assert few > 20  # one step's graph is there at all
    assert many <= 1.25 * few + kept


def problem_arguments():
    problem = Problem(network("ConvNetD1W4"))
    names = "model start images labels batches lr".split()
    return {name: getattr(problem, name) for name in names}


INDEX = torch.tensor([0, 1])
BAD = [
    (TypeError, "model must be", lambda a: a.update(model=3)),
    (TypeError, "start must be a tensor", lambda a: a.update(start=[0.0])),
    (TypeError, "start must be float32 or float64", lambda a: a.update(start=a["start"].half())),
    (ValueError, "start must have shape", lambda a: a.update(start=a["start"][:-1])),
    (ValueError, "start must have shape", lambda a: a.update(start=a["start"][None])),
    (TypeError, "images must be a tensor", lambda a: a.update(images=None)),
    (TypeError, "images must have the dtype of start", lambda a: a.update(images=a["images"].float())),
    (TypeError, "images must be float32 or float64", lambda a: a.update(images=torch.zeros(12, 3, 8, 8).byte())),
    (ValueError, "images must have shape", lambda a: a.update(images=a["images"][0])),
    (ValueError, "images are on meta", lambda a: a.update(images=a["images"].to("meta"))),
    (
        ValueError,
        "parameter .* of the model is on meta",
        lambda a: a.update(model=copy.deepcopy(a["model"]).to("meta")),
    ),
    (TypeError, "labels must be a tensor", lambda a: a.update(labels=[0] * 12)),
    (ValueError, "labels are on meta", lambda a: a.update(labels=a["labels"].to("meta"))),
    (ValueError, "labels must have one entry per image", lambda a: a.update(labels=a["labels"][:5])),
    (ValueError, "labels must have one entry per image", lambda a: a.update(labels=torch.tensor(1))),
    (TypeError, "float labels must have the dtype", lambda a: a.update(labels=a["labels"].float())),
    (ValueError, "float labels are probabilities", lambda a: a.update(labels=a["labels"][:, 0])),
    (ValueError, "labels have 4 columns, the model has 5", lambda a: a.update(labels=a["labels"][:, :4])),
    (TypeError, "labels must be integers", lambda a: a.update(labels=torch.zeros(12, dtype=torch.bool))),
    (ValueError, "integer labels must have shape", lambda a: a.update(labels=torch.zeros(12, 5, dtype=torch.int64))),
    (ValueError, "must not be negative", lambda a: a.update(labels=torch.arange(12) % 5 - 1)),
    (ValueError, "labels must be below 5", lambda a: a.update(labels=torch.arange(12) % 6)),
    (ValueError, "batches is empty", lambda a: a.update(batches=[])),
    (TypeError, r"batches\[1\] must be an int64", lambda a: a.update(batches=[INDEX, [0, 1]])),
    (TypeError, r"batches\[0\] must be an int64", lambda a: a.update(batches=[torch.ones(12, dtype=torch.bool)])),
    (ValueError, r"batches\[1\] must have shape", lambda a: a.update(batches=[INDEX, INDEX[:0]])),
    (ValueError, r"batches\[0\] must have shape", lambda a: a.update(batches=[INDEX[None]])),
    (ValueError, "indices of the 12 images", lambda a: a.update(batches=[INDEX, INDEX + 11])),
    (ValueError, "indices of the 12 images", lambda a: a.update(batches=[INDEX - 1])),
    (TypeError, "lr must be a floating tensor", lambda a: a.update(lr=torch.tensor(1))),
    (TypeError, "lr must be a floating tensor", lambda a: a.update(lr="0.1")),
    (ValueError, "lr must be 0-d or have shape", lambda a: a.update(lr=torch.ones(2))),
    (ValueError, "augmentations: 1 given for 3", lambda a: a.update(augmentations=[None])),
    (ValueError, "engine must be one of", lambda a: a.update(engine="fast")),
    (ValueError, "keep must be one of", lambda a: a.update(keep="everything")),
    (ValueError, "gradient must be one of", lambda a: a.update(gradient="none")),
    (ValueError, "precision must be one of", lambda a: a.update(precision="float16")),
    (ValueError, "needs CUDA tensors", lambda a: a.update(precision="tf32")),
    (ValueError, "logits", lambda a: a.update(model=nn.Conv2d(3, 2, 1), start=torch.zeros(8).double())),
]


@pytest.mark.parametrize("error, message, spoil", BAD, ids=[f"{i}-{b[1][:30]}" for i, b in enumerate(BAD)])
def test_bad_arguments(error, message, spoil):
    arguments = problem_arguments()
    unrolled_sgd(**arguments)
    spoil(arguments)
    with pytest.raises(error, match=message):
        unrolled_sgd(**arguments)


def test_a_model_that_cannot_be_copied():
    model = network("ConvNetD1W4")
    model.lock = open(__file__)
    arguments = problem_arguments()
    with model.lock, pytest.raises(TypeError, match="cannot be copied"):
        unrolled_sgd(**arguments | {"model": model})
