"""Networks by name: the ConvNet family, the other networks of the distillation papers, torchvision's and timm's."""

import contextlib
import copy
import difflib
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selmatch_ext.models import growing
from selmatch_ext.models.classic import MLP, VGG, AlexNet, LeNet, ResNet
from selmatch_ext.models.convnet import ConvNet, parse_name

_RESNET = re.compile(r"ResNet(?P<layers>18|34)(?P<norm>BN|IN)?(?P<pool>_AP)?(?P<tiny>_Tiny)?")
_BLOCKS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3)}
_NAMES = (
    ["ConvNet"]
    + [f"ConvNetD{depth}" for depth in range(1, 9)]
    + [f"ConvNetW{width}" for width in (32, 64, 128, 256, 512, 1024)]
    + [f"ConvNet{part}" for part in "BN IN GN LN NN AS AR AL ASwish NP MP AP D4BN".split()]
    + "MLP LeNet AlexNet VGG11 VGG11IN VGG11BN VGG16 VGG16IN VGG16BN FRePoNet FRePoNetBN".split()
    + [
        f"ResNet{layers}{norm}{suffix}"
        for layers in _BLOCKS
        for norm in ("", "IN", "BN")
        for suffix in ("", "_AP", "_Tiny")
    ]
)


def names() -> list[str]:
    """The usual network names. `build` takes more: any combination of ConvNet suffixes, "torchvision:NAME",
    "timm:NAME" and "package.module:function"."""
    return list(_NAMES)


def build(
    name: str,
    channels: int,
    classes: int,
    image_size: int | tuple[int, int],
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A freshly initialized network in train mode, on the CPU and in float32: (B, channels, H, W) images -> (B,
    classes) logits.

    Args:
        name: one of `names()`; "ConvNet" with any combination of D<depth>, W<width>, a norm (BN, IN, GN, LN, NN), an
            activation (AR relu, AL leaky relu, AS sigmoid, ASwish) and a pooling (AP, MP, NP); "torchvision:NAME" or
            "timm:NAME" for a classifier of those packages, without pretrained weights; "package.module:function" for
            your own, a function (channels, classes, (H, W)) -> nn.Module. VGG and ResNet have instance norm unless the
            name says BN (as in the public code of the papers). "FRePoNet" takes D, W (of the first block; each of the
            others doubles it) and BN, in this order.
        channels: of the images. With other than 3, a torchvision network gets a new first convolution.
        classes: number of logits.
        image_size: side, or (H, W), in pixels.
        generator: where the initial weights are drawn from, without touching torch's global generator; None draws
            them from that one.

    Raises:
        ValueError: unknown name (near ones are listed), a count below 1, images too small for the network.
        ImportError: "timm:..." where timm is not installed.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(f"image_size must be a positive integer or a pair (H, W) of them, got {image_size!r}")
    for argument, value in (("channels", channels), ("classes", classes)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be an integer of at least 1, got {value!r}")
    with _drawing_from(generator), _usual_defaults():
        try:
            return _construct(name, channels, classes, size)
        except (ValueError, AssertionError) as error:  # the second of torchvision and timm
            raise ValueError(f"network {name!r} for {size[0]}x{size[1]} images: {error}") from None


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Initial weights drawn inside come from `generator`; the global generator is as before afterwards."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device, dtype=torch.int64))
    state = torch.get_rng_state()
    try:
        # Not torch.manual_seed, which would reseed every GPU's generator as well.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)


@contextlib.contextmanager
def _usual_defaults() -> Iterator[None]:
    """Within, parameters are made on the CPU in float32, whatever the defaults of torch are."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def build_without_memory(name: str, channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """The network of `build` on the meta device. image_size: (H, W). Raises what its constructor does."""
    with torch.device("meta"):
        return _construct(name, channels, classes, (image_size[0], image_size[1]))


def _construct(name: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    simple = {"MLP": MLP, "LeNet": LeNet, "AlexNet": AlexNet}
    if name in simple:
        return simple[name](channels, classes, size)
    settings = parse_name(name)
    if settings is not None:
        return ConvNet(channels, classes, size, settings)
    frepo = growing.parse_name(name)
    if frepo is not None:
        return growing.FRePoNet(channels, classes, size, *frepo)
    vgg = re.fullmatch(r"VGG(11|16)(BN|IN)?", name)
    if vgg:
        return VGG(channels, classes, size, vgg[1], vgg[2] or "IN")
    resnet = _RESNET.fullmatch(name)
    if resnet:
        blocks = _BLOCKS[resnet["layers"]]
        return ResNet(
            channels, classes, size, blocks, resnet["norm"] or "IN", bool(resnet["pool"]), bool(resnet["tiny"])
        )
    package, _, rest = name.partition(":")
    if package in _PACKAGES:
        model = _PACKAGES[package](rest, channels, classes, size)
        _try_on(model, channels, classes, size)
        return model
    if rest:
        return _of_user(package, rest, channels, classes, size)
    raise ValueError(f"no network has this name; near ones: {_near(name, _NAMES)}")


def is_user_code(name: str) -> bool:
    """Whether `name` stands for a function in a module of the user's own, which `build` would import and call."""
    package, _, rest = name.partition(":")
    return bool(rest) and package not in _PACKAGES


def _near(name: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.5)) or "none"


def _torchvision(name: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier {name!r}; near ones: {_near(name, known)}")
    options: dict[str, Any] = {"num_classes": classes}
    if name.startswith("vit_"):
        if size[0] != size[1]:
            raise ValueError("torchvision's vision transformers take square images")
        options["image_size"] = size[0]
    if name in ("googlenet", "inception_v3"):  # else they return more than logits in train mode
        options.update(aux_logits=False, init_weights=True)
    model = torchvision.models.get_model(name, weights=None, **options)
    if channels != 3:
        _replace_first_convolution(model, channels)
    return model


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    path, old = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    same: dict[str, Any] = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    new = nn.Conv2d(channels, old.out_channels, **same, bias=old.bias is not None)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _timm(name: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"network 'timm:{name}' needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; near ones: {_near(name, timm.list_models())}")
    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = size
    return timm.create_model(name, pretrained=False, **options)


def _of_user(module: str, function: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"there is no function {function!r} in a module {module!r} on Python's path: {error}"
        ) from error
    model = make(channels, classes, size)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{module}:{function} returned a {type(model).__name__}; it must return an nn.Module")
    _try_on(model, channels, classes, size)
    return model


_PACKAGES = {"torchvision": _torchvision, "timm": _timm}


def _try_on(model: nn.Module, channels: int, classes: int, size: tuple[int, int]) -> None:
    """Raises ValueError where images of that size do not go through to an output per class: shapes only, nothing is
    computed."""
    shapes = copy.deepcopy(model).to("meta").eval()
    try:
        found = shapes(torch.empty(1, channels, *size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"images of this size do not go through it: {error}") from error
    if not isinstance(found, torch.Tensor) or found.shape != (1, classes):
        given = list(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"for one image it returns {given}; it must be a tensor [1, {classes}], an output per class")


def embed(model: nn.Module, x: Tensor) -> Tensor:
    """Penultimate features of any classifier: what enters its last linear layer. x: (B, C, H, W) -> (B, features).

    Networks of this package have a method for it. In others the linear layer that runs last is found by running them.
    Raises ValueError where no linear layer runs.
    """
    if hasattr(model, "embed"):
        own: Any = model.embed
        return own(x)
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(f"embed: no linear layer ran in {type(model).__name__}, so its features are unknown")
    return seen[-1].flatten(1)
