"""The rules for pooling, activations, products and concatenation: each of the four passes against autograd, and
networks of torchvision, and small ones like them, against the full graph."""

import pytest
import torch
import torchvision
from reference import unrolled_sgd_full_graph
from test_fused import Small
from test_unroll import CLASSES, Problem, assert_near
from torch import nn
from torch.nn import functional as F
from torchvision.models.densenet import DenseNet

import selmatch_ext as sm
from selmatch_ext.fused.dual import Dual
from selmatch_ext.fused.map_rules import AdaptiveAverage, Concatenate, Elementwise, MaxPool, Multiply
from selmatch_ext.fused.rules import Average
from selmatch_ext.unroll import unrolled_sgd

pytestmark = pytest.mark.usefixtures("one_thread")

MAP, ODD, GATE = (3, 5, 9, 7), (2, 1, 11, 6), (3, 5, 1, 1)


def pooled(*settings):
    return MaxPool(*settings), lambda x: F.max_pool2d(x, *settings)


def averaged(*settings):
    return Average(*settings), lambda x: F.avg_pool2d(x, *settings)


def adapted(*size):
    return AdaptiveAverage(size), lambda x: F.adaptive_avg_pool2d(x, size)


def concatenated(*xs):
    return torch.cat(xs, 1)


RULES = {
    "max, overlapping": (*pooled((3, 3), (2, 2), (1, 1), (1, 1), False), [MAP]),
    "max, one channel, ceil": (*pooled((3, 2), (2, 3), (0, 0), (1, 1), True), [ODD]),
    "max, ceil at the padding": (*pooled((3, 3), (2, 2), (1, 1), (1, 1), True), [MAP]),
    "max, dilated": (*pooled((2, 3), (1, 2), (1, 1), (3, 2), False), [MAP]),
    "max, apart": (*pooled((2, 2), (3, 3), (0, 0), (1, 1), False), [ODD]),
    "max, no images": (*pooled((3, 3), (2, 2), (1, 1), (1, 1), False), [(0, 5, 9, 7)]),
    "average, padded": (*averaged((3, 3), (2, 2), (1, 1), False, True), [MAP]),
    "average, padding not counted, ceil": (*averaged((3, 2), (2, 2), (1, 1), True, False), [ODD]),
    "average, divisor": (*averaged((2, 2), (1, 1), (0, 0), False, True, 3), [MAP]),
    "adaptive, smaller": (*adapted(4, 3), [MAP]),
    "adaptive, larger": (*adapted(13, 8), [ODD]),
    "adaptive, as it is": (*adapted(2, None), [MAP]),
    "relu6": (Elementwise("hardtanh", (0.0, 6.0)), F.relu6, [MAP]),
    "hardtanh": (Elementwise("hardtanh", (-0.5, 1.5)), lambda x: F.hardtanh(x, -0.5, 1.5), [ODD]),
    "hardsigmoid": (Elementwise("hardsigmoid"), F.hardsigmoid, [MAP]),
    "hardswish": (Elementwise("hardswish"), F.hardswish, [MAP]),
    "gelu": (Elementwise("gelu", ("none",)), F.gelu, [MAP]),
    "gelu by tanh": (Elementwise("gelu", ("tanh",)), lambda x: F.gelu(x, approximate="tanh"), [ODD]),
    "tanh of vectors": (Elementwise("tanh"), torch.tanh, [(3, 5)]),
    "product": (Multiply(), torch.mul, [MAP, MAP]),
    "gate": (Multiply(), torch.mul, [GATE, MAP]),
    "gate of one channel": (Multiply(), torch.mul, [MAP, (3, 1, 9, 7)]),
    "outer product": (Multiply(), torch.mul, [(3, 5, 1, 7), (3, 1, 9, 1)]),
    "concatenation": (Concatenate(), concatenated, [MAP, (3, 1, 9, 7), MAP]),
    "vectors behind each other": (Concatenate(), concatenated, [(3, 5), (3, 2)]),
}
KINKS = (-3.0, -0.5, 0.0, 1.5, 3.0, 6.0)  # every value where a derivative of an activation jumps


def values(sizes, draw, layout):
    """Tensors of halves from -4 to 7, so that windows have ties and activations are met at their kinks."""
    for size in sizes:
        x = torch.randint(-8, 15, size, generator=draw).double() / 2
        yield x.contiguous(memory_format=layout) if x.dim() == 4 else x


def derivative(function, points, directions):
    """The derivative of function(*points) along directions, by autograd twice."""
    result = function(*points)
    weights = torch.zeros_like(result, requires_grad=True)
    back = torch.autograd.grad(result, points, weights, create_graph=True, materialize_grads=True)
    if result.numel() == 0:
        return torch.zeros_like(result)
    pairs = [(b, d) for b, d in zip(back, directions, strict=True) if b.requires_grad]  # of the others it is 0
    return torch.autograd.grad([b for b, _ in pairs], weights, [d for _, d in pairs])[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
@pytest.mark.parametrize("rule, function, sizes", RULES.values(), ids=RULES)
def test_four_passes_equal_autograd(rule, function, sizes, layout):
    draw = torch.Generator().manual_seed(0)
    xs = [x.requires_grad_() for x in values(sizes, draw, layout)]
    tangents = [torch.randn(x.shape, generator=draw).double() for x in xs]
    y = function(*xs)
    g, gt = (torch.randn(y.shape, generator=draw).double() for _ in range(2))
    g.requires_grad_()

    def gradient(number):
        return lambda *points: torch.autograd.grad(
            function(*points[:-1]), points[number], points[-1], create_graph=True
        )[0]

    expected = torch.autograd.grad(y, xs, g, retain_graph=True)
    moved = [derivative(gradient(i), (*xs, g), (*tangents, gt)) for i in range(len(xs))]
    y_tangent = derivative(function, xs, tangents)
    with torch.no_grad():
        result, saved = rule.forward({}, tuple(xs))
        backs, _ = rule.backward({}, saved, g, True)
        # The tangents come in two parts, as convolutions give them.
        duals = tuple(Dual(x, 0.25 * t, 0.75 * t) for x, t in zip(xs, tangents, strict=True))
        dual, dual_saved = rule.dual_forward({}, {}, duals, None)
        dual_backs, _ = rule.dual_backward({}, {}, dual_saved, Dual(g, 0.25 * gt, 0.75 * gt), True, True)
    near(result, y), near(dual.value, y), near(dual.whole_tangent(), y_tangent)
    for back, dual_back, e, m in zip(backs, dual_backs, expected, moved, strict=True):
        near(back, e), near(dual_back.value, e), near(dual_back.whole_tangent(), m)


def near(found, expected):
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)


def test_the_values_of_that_test_meet_every_kink():
    x = next(values([MAP], torch.Generator().manual_seed(0), torch.contiguous_format))
    assert set(KINKS) <= set(x.flatten().tolist())


@pytest.mark.parametrize("rule, function, sizes", RULES.values(), ids=RULES)
def test_bfloat16(rule, function, sizes):
    """The results in bfloat16, and as near as its rounding allows."""
    draw = torch.Generator().manual_seed(0)
    xs = [x.bfloat16() for x in values(sizes, draw, torch.channels_last)]
    ones = [torch.ones_like(x) for x in xs]
    exact, _ = rule.dual_forward(
        {}, {}, tuple(Dual(x.double(), o.double()) for x, o in zip(xs, ones, strict=True)), None
    )
    dual, saved = rule.dual_forward({}, {}, tuple(Dual(x, o) for x, o in zip(xs, ones, strict=True)), None)
    torch.testing.assert_close(dual.whole_tangent().double(), exact.whole_tangent(), rtol=0.02, atol=0.02)
    g = torch.ones_like(dual.value)
    backs, _ = rule.dual_backward({}, {}, saved, Dual(g, g), True, True)
    assert {t.dtype for b in backs for t in (b.value, b.whole_tangent())} == {torch.bfloat16}


# --- networks ---------------------------------------------------------------------------------------------------------


def convolution(inputs, outputs, *settings, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, *settings, bias=False, **options), nn.BatchNorm2d(outputs))


class Fire(nn.Module):
    """SqueezeNet's: two convolutions of one map, behind each other, after a pooling whose windows end at the border."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.one, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        x = self.pool(x)
        x = self.out(torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1))
        return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


class Excited(nn.Module):
    """An inverted bottleneck with squeeze and excitation, as in EfficientNet, RegNet Y and MobileNet V3."""

    def __init__(self, activation, gate, in_place=False):
        super().__init__()
        self.wide, self.deep = convolution(3, 6, 1), convolution(6, 6, 3, padding=1, groups=6)
        self.down, self.up, self.narrow = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1), convolution(6, 3, 1)
        self.activation, self.gate, self.in_place = activation, gate, in_place
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        h = self.activation(self.deep(self.activation(self.wide(x))))
        scale = self.gate(self.up(self.activation(self.down(F.adaptive_avg_pool2d(h, 1)))))
        if self.in_place:
            h *= scale
        else:
            h = scale * h
        h = F.dropout(x + self.narrow(h), 0.0)
        return self.head(h.mean([2, 3]))


def vgg():
    layers = [*convolution(3, 6, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2, 2)]
    layers += [*convolution(6, 6, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((3, 3)), nn.Flatten(), nn.Linear(54, CLASSES))


def stem(m, x):
    return m.second(F.gelu(torch.max_pool2d(m.first(x), 3, 2, 1), approximate="tanh"))


def images_through_every_rule(m, x):
    h = torch.cat([F.max_pool2d(x, 3, 1, 1), F.hardtanh(x), x * x], dim=1)
    a, b, c = F.adaptive_avg_pool2d(x, (5, 4)), F.adaptive_avg_pool2d(m.first(x), (5, 4)), m.second(x)
    pooled = F.adaptive_avg_pool2d(h, 1)
    return torch.cat([a * b, F.adaptive_avg_pool2d(c.tanh(), (5, 4))], 1).mean((2, 3), True) * pooled.mean((2, 3), True)


def many_readers(m, x):
    """DenseNet's: every result is read again, behind the earlier ones."""
    h = m.first(x)
    both = torch.cat((h, m.second(F.relu(h))), dim=1)
    return F.hardswish(F.max_pool2d(both, 3, 1, 1)).tanh() * both


class Wide(Small):
    """The head takes the channels that the function gives."""

    def __init__(self, function, channels):
        super().__init__(function)
        self.out = nn.Linear(channels, CLASSES)


NETWORKS = {
    "VGG": vgg,
    "ResNet": lambda: Small(stem),
    "DenseNet": lambda: Wide(many_readers, 6),
    "SqueezeNet": Fire,
    "MobileNet V2": lambda: Excited(nn.ReLU6(inplace=True), nn.Identity()),
    "MobileNet V3": lambda: Excited(nn.Hardswish(inplace=True), nn.Hardsigmoid(inplace=True), in_place=True),
    "EfficientNet": lambda: Excited(nn.SiLU(inplace=True), nn.Sigmoid()),
    "RegNet Y": lambda: Excited(nn.ReLU(inplace=True), nn.Sigmoid()),
    "GELU": lambda: Excited(nn.GELU(), nn.Tanh()),
    "Hardtanh": lambda: Excited(nn.Hardtanh(-0.3, 0.4, inplace=True), F.hardsigmoid),
    "torchvision's DenseNet": lambda: DenseNet(4, (2, 2), 8, num_classes=CLASSES),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_networks_equal_the_full_graph(make):
    torch.manual_seed(0)
    check(Problem(make(), lr=(0.01,) * 3), ("nothing", "activations", "all"))


def check(problem, keeps):
    choice = sm.explain_engine(problem.model, problem.images)
    assert choice.name == "fused", choice
    expected = problem.gradients(unrolled_sgd_full_graph)
    for keep in keeps:
        assert_near(problem.gradients(unrolled_sgd, engine="fused", keep=keep), expected, 1e-9)


LARGE = {  # name: side of the images, settings without which they draw or are larger
    "resnet18": (32, {}),
    "squeezenet1_1": (32, {"dropout": 0.0}),
    "mobilenet_v2": (64, {"dropout": 0.0, "width_mult": 0.25}),
    "efficientnet_b0": (64, {"dropout": 0.0, "stochastic_depth_prob": 0.0}),
    "regnet_y_400mf": (32, {}),
}


@pytest.mark.parametrize("name", LARGE)
def test_networks_of_torchvision_equal_the_full_graph(name):
    size, options = LARGE[name]
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    problem = Problem(model, size=size, lr=(0.01,))
    problem.batches = problem.batches[:1]
    check(problem, ("nothing",))


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b0"])
def test_what_draws_stays_on_autograds_engine(name):
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    choice = sm.explain_engine(model, torch.randn(2, 3, 32, 32))
    assert choice.name == "autograd"
    assert "dropout" in choice.reason.lower() or "stochastic_depth" in choice.reason
