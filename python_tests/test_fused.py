"""The fused engine: exact for every layer of the ConvNet family and for classes that are not ours; what it cannot read
falls back and says why."""

import itertools

import pytest
import torch
from conftest import CountFirstLayers
from reference import unrolled_sgd_full_graph
from test_unroll import CLASSES, Problem, assert_near, network
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import selmatch_ext as sm
from selmatch_ext import models
from selmatch_ext.fused import rules
from selmatch_ext.fused.dual import Dual
from selmatch_ext.fused.reader import read
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = list(itertools.product(("IN", "BN", "GN", "LN", "NN"), ("AR", "AL", "AS", "ASwish"), ("AP", "MP", "NP")))


@pytest.mark.parametrize("norm, activation, pooling", LAYERS, ids="".join)
def test_every_layer_equals_full_graph(norm, activation, pooling):
    problem = Problem(network(f"ConvNetD2W8{norm}{activation}{pooling}"), augmented=True)
    expected = problem.gradients(unrolled_sgd_full_graph)
    assert_near(problem.gradients(unrolled_sgd, engine="fused"), expected, 1e-10)


@pytest.mark.parametrize(
    "name, size", [("MLP", 8), ("LeNet", 28), ("VGG11", 32), ("ResNet18BN", 16), ("ResNet18_AP", 16)], ids=str
)
def test_other_networks_equal_full_graph(name, size):
    problem = Problem(network(name, size), size=size, lr=(0.01, 0.01, 0.01))
    expected = problem.gradients(unrolled_sgd_full_graph)
    assert_near(problem.gradients(unrolled_sgd, engine="fused"), expected, 1e-10)


@pytest.mark.parametrize("size, channels", [(9, 3), (13, 1), (8, 5)], ids=str)
def test_odd_sides_and_channels(size, channels):
    problem = Problem(network("ConvNetD2W6", size, channels), size=size, channels=channels, soft=False)
    expected = problem.gradients(unrolled_sgd_full_graph)
    assert_near(problem.gradients(unrolled_sgd, engine="fused", keep="activations"), expected, 1e-10)


class CountConvolutions(TorchDispatchMode):
    """How many images pass the convolutions of more than three channels, forward or in either gradient."""

    images = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.convolution.default and arguments[1].shape[1] > 3:
            self.images += len(arguments[0])
        if function is torch.ops.aten.convolution_backward.default and arguments[2].shape[1] > 3:
            self.images += len(arguments[0]) * sum(arguments[-1])
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("keep, passes", [("nothing", 11), ("activations", 10), ("all", 9)])
def test_what_a_step_costs(keep, passes):
    """The activations of the last step are kept always."""
    problem = Problem(network("ConvNetD2W8"))
    problem.gradients(unrolled_sgd, keep=keep)  # reads the network
    with CountConvolutions() as counted:
        problem.gradients(unrolled_sgd, keep=keep)
    *others, last = map(len, problem.batches)
    assert counted.images == passes * sum(others) + min(passes, 10) * last


@pytest.mark.parametrize("keep", ["nothing", "activations", "all"])
@pytest.mark.parametrize("norm", ["IN", "BN", "NN"])
def test_our_convolutions_equal_full_graph(norm, keep, our_convolutions):
    """Without a norm biases are not canceled."""
    problem = Problem(network(f"ConvNetD2W32{norm}"), augmented=True)
    found = problem.gradients(unrolled_sgd, engine="fused", keep=keep)  # reads the network
    with CountConvolutions() as counted:
        problem.gradients(unrolled_sgd, engine="fused", keep=keep)
    assert counted.images == 0
    assert_near(found, problem.gradients(unrolled_sgd_full_graph), 1e-10)


@pytest.fixture
def our_convolutions(monkeypatch):
    """In float64, which runs on torch's convolutions otherwise."""
    monkeypatch.setattr(rules, "conv3x3_suits", lambda weight: weight.shape[2:] == (3, 3))


def first_layers(passes, *names):
    return {f"conv_block_{name}": passes for name in names}


@pytest.mark.parametrize("keep", ["nothing", "all"])
@pytest.mark.parametrize("norm", ["IN", "BN", "NN"])
def test_first_layer_equals_full_graph(norm, keep, our_convolutions):
    """Of images of 256 pixels or more; without a norm the convolution's bias gets a gradient, and both run apart."""
    problem = Problem(network(f"ConvNetD2W32{norm}", 16), size=16, augmented=True)
    with CountFirstLayers() as counted:
        found = problem.gradients(unrolled_sgd, engine="fused", keep=keep)
    names = ("forward", "backward", "dual_forward", "dual_backward")
    assert counted.calls == ({} if norm == "NN" else first_layers(len(problem.batches), *names))
    assert_near(found, problem.gradients(unrolled_sgd_full_graph), 1e-10)


def test_first_layer_without_gradients_of_the_images(our_convolutions):
    problem = Problem(network("ConvNetD2W32BN", 16), size=16)
    problem.images.requires_grad_(False)
    with CountFirstLayers() as counted:
        found = problem.gradients(unrolled_sgd, engine="fused")
    names = ("forward", "backward", "dual_forward", "dual_backward")
    assert counted.calls == first_layers(len(problem.batches), *names)
    assert_near(found, problem.gradients(unrolled_sgd_full_graph), 1e-10)


class TwoFirstLayers(nn.Module):
    """One convolution's weight used by two layers, and the images by three."""

    def __init__(self):
        super().__init__()
        self.convolution, self.other = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 32, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(32), nn.InstanceNorm2d(32, affine=True)])
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x):
        maps = [F.relu(norm(self.convolution(x))) for norm in self.norms]
        return self.out(F.adaptive_avg_pool2d(maps[0] + maps[1] + self.other(x), 1).flatten(1))


def test_several_first_layers_equal_full_graph(our_convolutions):
    torch.manual_seed(0)
    problem = Problem(TwoFirstLayers(), size=16)
    with CountFirstLayers() as counted:
        found = problem.gradients(unrolled_sgd, engine="fused")
    assert set(counted.calls.values()) == {2 * len(problem.batches)}
    assert_near(found, problem.gradients(unrolled_sgd_full_graph), 1e-10)


def test_a_first_convolution_of_many_channels_is_kept(our_convolutions):
    problem = Problem(network("ConvNetD2W32", 16, 32), size=16, channels=32)
    found = problem.gradients(unrolled_sgd, engine="fused", keep="activations")
    with CountFirstLayers() as counted:
        problem.gradients(unrolled_sgd, engine="fused", keep="activations")
    assert counted.calls == {}
    assert_near(found, problem.gradients(unrolled_sgd_full_graph), 1e-10)


@pytest.mark.parametrize("norm", ["IN", "BN", "GN", "LN", "NN"])
def test_float32_is_as_near_to_float64_as_the_full_graph(norm):
    """Twice the full graph's distance at most, Winograd's convolutions included (width 32). Of the gradients that are
    long enough for their distance not to be luck."""
    exact, rounded = (
        Problem(network(f"ConvNetD3W32{norm}", 32), dtype, size=32) for dtype in (torch.float64, torch.float32)
    )
    expected = exact.gradients(unrolled_sgd_full_graph)
    plain, fused = rounded.gradients(unrolled_sgd_full_graph), rounded.gradients(unrolled_sgd, engine="fused")
    for name in ("images", "start"):
        distance = (plain[name] - expected[name]).norm()
        assert (fused[name] - expected[name]).norm() <= 2 * distance, name


def test_bfloat16_points_the_same_way():
    exact = Problem(network("ConvNetD2W32", 16), size=16, lr=(0.01,) * 3)
    rounded = Problem(network("ConvNetD2W32", 16), torch.float32, size=16, lr=(0.01,) * 3)
    expected = exact.gradients(unrolled_sgd_full_graph)["images"].flatten()
    for keep in ("nothing", "activations", "all"):
        found = rounded.gradients(unrolled_sgd, engine="fused", precision="bfloat16", keep=keep)["images"].flatten()
        assert F.cosine_similarity(found.double(), expected, dim=0) > 0.99
        assert (found - expected).norm() > 1e-4 * expected.norm()


class PublicConvNet(nn.Module):
    """The structure of the ConvNet that distillation repositories share, written anew: in-place ReLU, view, a swish of
    its own."""

    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    def __init__(self, norm, activation, width=8, depth=2, size=8):
        super().__init__()
        layers, inputs = [], 3
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, kernel_size=3, padding=1)]
            layers += [nn.GroupNorm(width, width, affine=True) if norm == "instance" else nn.BatchNorm2d(width)]
            layers += [nn.ReLU(inplace=True) if activation == "relu" else self.Swish()]
            layers += [nn.AvgPool2d(kernel_size=2, stride=2)]
            inputs, size = width, size // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * size * size, CLASSES)

    def forward(self, x):
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class Functional(nn.Module):
    """The same out of functions, with a sum of two branches."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 5, stride=2, padding=2, bias=False)
        self.short = nn.Conv2d(8, 8, 1, stride=2)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.silu(self.norm(self.second(x))) + self.short(x)
        return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize(
    "make",
    [lambda: PublicConvNet("instance", "relu"), lambda: PublicConvNet("batch", "swish"), Functional],
    ids=["instance", "batch", "functional"],
)
def test_classes_that_are_not_ours(make):
    torch.manual_seed(0)
    problem = Problem(make())
    choice = sm.explain_engine(problem.model, problem.images)
    assert choice.name == "fused", choice
    expected = problem.gradients(unrolled_sgd_full_graph)
    assert_near(problem.gradients(unrolled_sgd, engine="fused"), expected, 1e-10)


class Small(nn.Module):
    """A network around one function of it and the images, whose result is a map."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.apart = nn.Conv2d(3, 3, 4, stride=4)
        self.relu = nn.ReLU(inplace=True)
        self.flat, self.out = nn.Linear(3 * 8 * 8, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.out(self.function(self, x).mean((2, 3)))


def statement(model, x):
    h = model.first(x)
    F.relu(h, inplace=True)
    return model.second(h)


def module_as_statement(model, x):
    h = model.first(x)
    model.relu(h)
    return model.second(h)


def method_as_statement(model, x):
    h = model.first(x)
    h.add_(x)
    return model.second(h)


def unknown_method_as_statement(model, x):
    h = model.first(x)
    h.mul_(2)
    return model.second(h)


def read_again(model, x):
    h = model.first(x)
    return model.second(F.relu(h, inplace=True)) + h


def read_again_positional(model, x):
    h = model.first(x)
    return model.second(F.leaky_relu(h, 0.1, True)) + h


def through_a_view(model, x):
    h = model.first(x)
    F.relu(h.flatten(1), inplace=True)
    return model.second(h)


def through_another_name(model, x):
    other = h = model.first(x)
    h += x
    return model.second(h) + other


@pytest.mark.parametrize(
    "function",
    [
        *(statement, module_as_statement, method_as_statement, unknown_method_as_statement),
        *(read_again, read_again_positional, through_a_view, through_another_name),
    ],
)
def test_operations_in_place_that_are_seen_elsewhere_fall_back(function):
    torch.manual_seed(0)
    problem = Problem(Small(function))
    assert sm.explain_engine(problem.model, problem.images).name == "autograd"
    assert_near(problem.gradients(unrolled_sgd), problem.gradients(unrolled_sgd_full_graph), 1e-10)


def used_once(model, x):
    h = model.first(x)
    h += x
    return F.relu(model.second(model.relu(h)), True)


def read_before(model, x):
    h = model.first(x)
    total = h + x
    return model.second(F.relu(h, inplace=True)) + total


def images_twice(model, x):
    return model.first(x) + x + model.second(F.relu(x))


def averaged_images(model, x):
    return model.apart(x) + F.avg_pool2d(x, 4)


class FlatImages(Small):
    def forward(self, x):
        x, flat = self.first(x), x.flatten(1)
        return self.out(x.mean((2, 3)) + self.flat(flat) + self.flat(F.relu(flat)))


@pytest.mark.parametrize("function", [used_once, read_before, images_twice, averaged_images, None])
def test_sums_with_the_images_and_harmless_operations_in_place(function):
    torch.manual_seed(0)
    problem = Problem(Small(function) if function else FlatImages(None))
    expected = problem.gradients(unrolled_sgd_full_graph)
    for keep in ("nothing", "activations", "all"):
        assert_near(problem.gradients(unrolled_sgd, engine="fused", keep=keep), expected, 1e-10)


NORMS_WITHOUT_PARAMETERS = {
    "batch": lambda: nn.BatchNorm2d(8, affine=False),
    "batch without statistics": lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm2d(8),
    "instance with statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 8, affine=False),
    "layer": lambda: nn.LayerNorm([8, 8, 8], elementwise_affine=False),
    "layer without bias": lambda: nn.LayerNorm([8, 8, 8], bias=False),
}


@pytest.mark.parametrize("make", NORMS_WITHOUT_PARAMETERS.values(), ids=NORMS_WITHOUT_PARAMETERS)
def test_norms_without_parameters(make):
    torch.manual_seed(0)
    model = PublicConvNet("instance", "swish", depth=1)
    model.features[1] = make()
    problem = Problem(model)
    expected = problem.gradients(unrolled_sgd_full_graph)
    assert_near(problem.gradients(unrolled_sgd, engine="fused"), expected, 1e-10)


def test_batch_norm_of_one_value_per_channel_is_torchs_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, CLASSES))
    problem = Problem(model)
    problem.batches = [torch.tensor([0])] * 3
    for engine in ("autograd", "fused"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            problem.gradients(unrolled_sgd, engine=engine)


class Unknown(PublicConvNet):
    def forward(self, x):
        return super().forward(torch.sin(x))


class Branching(PublicConvNet):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def hooked():
    model = PublicConvNet("instance", "relu")
    model.classifier.register_forward_hook(lambda *_: None)
    return model


def with_layer(layer):
    model = PublicConvNet("instance", "relu")
    model.features.insert(3, layer)
    return model


def indexed():
    model = Small(lambda m, x: m.pool(m.first(x))[0])
    model.pool = nn.MaxPool2d(3, return_indices=True)
    return model


FALLBACKS = [
    (lambda: Unknown("instance", "relu"), "sin"),
    (lambda: Branching("instance", "relu"), "torch.fx cannot read Branching"),
    (hooked, "classifier has hooks"),
    (lambda: with_layer(nn.Dropout(0.3)), r"Dropout \(features.3\)"),
    (lambda: Small(lambda m, x: F.dropout(m.first(x), 0.3)), "dropout"),
    (lambda: Small(lambda m, x: F.max_pool2d(m.first(x), 3, return_indices=True)[0]), "max_pool2d_with_indices"),
    (indexed, r"MaxPool2d \(pool\) with return_indices"),
    (lambda: Small(lambda m, x: torch.cat([m.first(x), m.second(x)], 2)), "cat with arguments"),
    (lambda: Small(lambda m, x: m.first(x) * 2), "mul of 2"),
    (lambda: with_layer(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), "padding_mode 'reflect'"),
    (lambda: with_layer(nn.Softmax2d()), r"Softmax2d \(features.3\)"),
    (lambda: Small(lambda m, x: torch.mul(m.first(x), other=m.second(x))), "mul with"),
    (lambda: Small(lambda m, x: F.avg_pool2d(m.first(x), x.size(3))), "avg_pool2d.* with arguments"),
]


@pytest.mark.parametrize("make, reason", FALLBACKS, ids=[reason for _, reason in FALLBACKS])
def test_what_has_no_rule_falls_back_and_says_why(make, reason):
    problem = Problem(make())
    choice = sm.explain_engine(problem.model, problem.images)
    assert choice.name == "autograd"
    with pytest.raises(NotImplementedError, match=reason):
        problem.gradients(unrolled_sgd, engine="fused")
    torch.manual_seed(0)
    automatic = problem.gradients(unrolled_sgd)
    torch.manual_seed(0)
    assert_near(automatic, problem.gradients(unrolled_sgd, engine="autograd"), 0)


def test_explain_engine_checks_what_it_is_given():
    model, images = network("ConvNetD1W4"), torch.zeros(1, 3, 8, 8)
    for error, message, arguments in [
        (TypeError, "model must be a torch.nn.Module, got str", ("ConvNet", images)),
        (TypeError, "images must be a tensor, got list", (model, [0.0])),
        (TypeError, "images must be float32 or float64, got torch.uint8", (model, images.byte())),
        (ValueError, "images must have shape", (model, images[0])),
    ]:
        with pytest.raises(error, match=message):
            sm.explain_engine(*arguments)


@pytest.mark.parametrize("name", [name for name in models.names() if name.startswith("ConvNet")])
def test_every_name_of_the_convnet_family_is_read(name):
    assert read(models.build(name, 3, 10, 256))  # without comparing: at this size that takes minutes


def test_the_number_of_threads_hardly_matters():
    """Torch's own convolutions are free to add in another order."""
    problem = Problem(network("ConvNetD2W32BN", 16), torch.float32, size=16)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(problem.gradients(unrolled_sgd, engine="fused"))
    first, second = results
    assert_near(first, second, 1e-6)


def test_an_unused_parameter_and_a_shared_one():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(3, 3)
            self.layer = nn.Conv2d(3, 3, 3, padding=1)
            self.out = nn.Linear(3 * 64, CLASSES)

        def forward(self, x):
            return self.out(torch.relu(self.layer(torch.relu(self.layer(x)))).flatten(1))

    torch.manual_seed(0)
    problem = Problem(Model())
    expected = problem.gradients(unrolled_sgd_full_graph)
    assert_near(problem.gradients(unrolled_sgd, engine="fused"), expected, 1e-10)


def test_value_and_tangent_in_one_batch_in_either_order():
    value, tangent, more = torch.randn(3, 2, 4).unbind()
    for dual in (
        Dual(value, tangent - more, more),
        Dual.forward(torch.cat((value, tangent))),
        Dual.backward(torch.cat((tangent, value))),
        Dual.backward(torch.cat((tangent - more, value)), more),
    ):
        for first in (True, False, True):
            expected = torch.cat((value, tangent) if first else (tangent, value))
            torch.testing.assert_close(dual.both(value_first=first), expected)
    nothing = Dual(value, None).both(value_first=False)
    assert torch.equal(nothing, torch.cat((torch.zeros_like(value), value)))
