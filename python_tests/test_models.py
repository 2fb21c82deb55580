"""Networks by name: shapes, parameter order, initial weights, and clear refusals."""

import sys

import pytest
import torch
from torch import nn

from selmatch_ext import models
from selmatch_ext.models import flat
from selmatch_ext.models.convnet import ConvNetSettings, parse_name
from selmatch_ext.models.initial import xavier

# Every ConvNet of ordinary width, and of the larger families each feature once: the rest differs in counts alone.
NETWORKS = [n for n in models.names() if n.startswith("ConvNet") and n not in ("ConvNetW512", "ConvNetW1024")]
NETWORKS += ["MLP", "LeNet", "AlexNet", "VGG11BN", "VGG11", "ResNet18BN_AP", "ResNet18IN_Tiny"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels, size", [(3, (32, 32)), (1, (28, 28))])
@pytest.mark.parametrize("name", NETWORKS)
def test_named_networks_run(name, channels, size):
    if name in ("ConvNetD5", "ConvNetD6", "ConvNetD7", "ConvNetD8"):
        size = (2 ** int(name[-1]),) * 2
        name += "W4"
    model = models.build(name, channels, 7, size)
    x = torch.randn(2, channels, *size)
    assert model.training
    assert model(x).shape == (2, 7)
    features = models.embed(model, x)
    assert features.shape[0] == 2 and features.dim() == 2
    last = list(model.parameters())[-2]
    torch.testing.assert_close(model(x), features @ last.T + list(model.parameters())[-1])


@pytest.mark.parametrize(
    "suffix, settings",
    [
        ("", {}),
        ("W64BN", {"width": 64, "norm": "BN"}),
        ("D3W64", {"depth": 3, "width": 64}),
        ("D4BN", {"depth": 4, "norm": "BN"}),
        ("ASwishMPD2", {"activation": "ASwish", "pooling": "MP", "depth": 2}),
        ("ASNPGNW32", {"activation": "AS", "pooling": "NP", "norm": "GN", "width": 32}),
        ("ARAPIN", {"activation": "AR", "pooling": "AP", "norm": "IN"}),
    ],
)
def test_convnet_suffixes(suffix, settings):
    assert parse_name("ConvNet" + suffix) == ConvNetSettings(**settings)


def test_convnet_layers_and_their_order():
    model = models.build("ConvNetD2W8GNALMP", 3, 10, 8)
    kinds = [type(m) for m in model.features]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.LeakyReLU, nn.MaxPool2d] * 2
    assert model.features[1].num_groups == 4 and model.features[2].negative_slope == 0.01
    block = [(8, 3, 3, 3), (8,), (8,), (8,), (8, 8, 3, 3), (8,), (8,), (8,)]
    assert [tuple(p.shape) for p in model.parameters()] == [*block, (10, 32), (10,)]
    names = [name for name, _ in model.named_parameters()]
    assert names[:4] == ["features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias"]
    assert names[-2:] == ["classifier.weight", "classifier.bias"]
    assert flat.parameter_count(models.build("ConvNet", 3, 10, 32)) == 320010  # that of the public replay buffers
    layer = models.build("ConvNetLN", 1, 10, 28)
    assert layer.features[0].padding == (3, 3) and layer.features[1].normalized_shape == (128, 32, 32)


def test_instance_norm_forgets_brightness_of_a_map_and_other_images():
    model = models.build("ConvNetIN", 3, 10, 32)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-4, atol=1e-5)


def test_resnet_variants():
    plain, pooled, tiny = (models.build(f"ResNet18BN{suffix}", 3, 10, 32) for suffix in ("", "_AP", "_Tiny"))
    x = torch.randn(1, 3, 32, 32)
    shapes = [m.eval().layer4(m.layer3(m.layer2(m.layer1(m.conv1(x))))).shape[2:] for m in (plain, pooled, tiny)]
    assert shapes == [(4, 4), (4, 4), (2, 2)]
    assert pooled.classifier.in_features == 512 * 4 * 4 and plain.classifier.in_features == 512
    assert isinstance(plain.bn1, nn.BatchNorm2d) and isinstance(models.build("ResNet18", 3, 10, 32).bn1, nn.GroupNorm)
    assert not any(m.stride == (2, 2) for m in pooled.modules() if isinstance(m, nn.Conv2d))


def test_initial_weights_come_from_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (models.build("ConvNetW32BN", 3, 10, 32, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat.flatten(first.parameters()), flat.flatten(again.parameters()))
    assert not torch.equal(flat.flatten(first.parameters()), flat.flatten(other.parameters()))
    generator = seeded(1)
    drawn = [flat.flatten(models.build("MLP", 1, 2, 4, generator=generator).parameters()) for _ in range(2)]
    assert not torch.equal(*drawn)
    with pytest.raises(ValueError):
        models.build("nothing", 3, 10, 32, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:squeezenet1_1", "timm:resnet10t"])
@pytest.mark.parametrize("channels", [3, 1])
def test_networks_of_other_packages(name, channels):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    model = models.build(name, channels, 7, 32, generator=seeded()).eval()
    x = torch.randn(2, channels, 32, 32)
    assert model(x).shape == (2, 7)
    if "squeezenet" in name:  # its classifier is a convolution
        with pytest.raises(ValueError, match="no linear layer"):
            models.embed(model, x)
    else:
        torch.testing.assert_close(model.get_submodule("fc")(models.embed(model, x)), model(x))
        assert not model.get_submodule("fc")._forward_pre_hooks


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        models.build("timm:resnet10t", 3, 10, 32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ConvNte", 3, 10, 32), "no network has this name; near ones: ConvNet"),
        (("ConvNetBNIN", 3, 10, 32), "no network has this name"),
        (("ConvNetX", 3, 10, 32), "no network has this name"),
        (("timm:resent10t", 3, 10, 32), "timm has no model"),
        (("torchvision:resent18", 3, 10, 32), "near ones: resnet18"),
        (("torchvision:alexnet", 3, 10, 8), "do not go through"),
        (("torchvision:vit_b_16", 3, 10, (32, 64)), "square images"),
        (("ConvNet", 3, 0, 32), "classes must be"),
        (("ConvNet", 3, 2.0, 32), "classes must be"),
        (("ConvNet", 0, 10, 32), "channels must be"),
        (("ConvNet", 3, 10, 0), "image_size must be"),
        (("ConvNet", 3, 10, (32, -1)), "image_size must be"),
        (("ConvNet", 3, 10, (3, 32, 32)), "image_size must be"),
        (("ConvNetD0", 3, 10, 32), "depth of network 'ConvNetD0' must be from 1 to 1000"),
        (("ConvNetW0", 3, 10, 32), "width of network 'ConvNetW0' must be from 1 to 65536"),
        (("ConvNetW6GN", 3, 10, 32), "multiple of 4"),
        (("ConvNetD4BN", 3, 10, 8), "too small"),
        (("LeNet", 3, 10, 8), "too small"),
        (("ResNet18", 3, 10, 8), "instance norm of a map of one pixel"),
    ],
)
def test_bad_networks(arguments, message):
    if arguments[0].startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        models.build(*arguments)


def test_xavier_draws_a_shared_parameter_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    start = xavier(model, seeded())
    assert start.shape == (flat.parameter_count(model),)
    parts = flat.unflatten(start, model)
    draw = seeded()
    for name in ("0.weight", "2.weight"):
        assert torch.equal(parts[name], nn.init.xavier_normal_(torch.empty_like(parts[name]), generator=draw))
    assert not any(parts[f"{i}.bias"].any() for i in range(3))


def test_flat_parameters():
    model = models.build("ConvNetD1W4BN", 3, 5, 8, generator=seeded())
    vector = flat.flatten(model.parameters())
    assert vector.shape == (flat.parameter_count(model),)
    assert vector.requires_grad
    parts = flat.unflatten(vector.detach(), model)
    assert list(parts) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(parts[name], p) for name, p in model.named_parameters())
    assert parts["features.0.weight"].data_ptr() == vector.data_ptr()
    other = models.build("ConvNetD1W4BN", 3, 5, 8, generator=seeded(1)).double()
    flat.load_parameters(other, vector)
    assert torch.equal(flat.flatten(other.parameters()), vector.double()) and other.classifier.weight.requires_grad
    for wrong in (vector[:-1], vector[None]):
        with pytest.raises(ValueError, match="vector must have shape"):
            flat.unflatten(wrong, model)
    with pytest.raises(ValueError, match="empty"):
        flat.flatten([])
