"""The ConvNet family of the distillation literature: [conv 3x3, norm, activation, 2x2 pool] x depth, then a linear one.

The layers sit in the same order as in the public code (`features` a Sequential, then `classifier`), so that its expert
trajectories, lists of tensors in `model.parameters()` order, can be loaded.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "AR": nn.ReLU,
    "AL": lambda: nn.LeakyReLU(0.01),
    "AS": nn.Sigmoid,
    "ASwish": nn.SiLU,
}
MOST = {"depth": 1000, "width": 2**16}
POOLINGS: dict[str, Callable[..., nn.Module] | None] = {"AP": nn.AvgPool2d, "MP": nn.MaxPool2d, "NP": None}


def make_norm(kind: str, channels: int, height: int, width: int) -> nn.Module:
    """The normalization layer of a (B, channels, height, width) map. kind: IN, GN, LN or BN.

    Instance norm is GroupNorm with a group per channel, as in the public code.
    """
    if kind == "IN":
        if height * width == 1:
            raise ValueError(
                "images are too small for this network: instance norm of a map of one pixel forgets the image"
            )
        return nn.GroupNorm(channels, channels)
    if kind == "GN":
        if channels % 4:
            raise ValueError(f"group norm has 4 groups, so the width must be a multiple of 4, got {channels}")
        return nn.GroupNorm(4, channels)
    if kind == "LN":
        return nn.LayerNorm([channels, height, width])
    return nn.BatchNorm2d(channels)


@dataclass(frozen=True)
class ConvNetSettings:
    """What the suffix of a ConvNet name says."""

    depth: int = 3
    width: int = 128
    norm: str = "IN"
    activation: str = "AR"
    pooling: str = "AP"


_TOKEN = re.compile(
    r"(?P<depth>D\d+)|(?P<width>W\d+)|(?P<activation>ASwish|AS|AR|AL)|(?P<pooling>NP|MP|AP)|(?P<norm>[BIGLN]N)"
)


def parse_name(name: str) -> ConvNetSettings | None:
    """Settings of a ConvNet name such as "ConvNet", "ConvNetD4BN" or "ConvNetW64GNASMP"; None where it is no such name.

    The parts (D<depth>, W<width>, norm BN/IN/GN/LN/NN, activation AR/AL/AS/ASwish, pooling AP/MP/NP) may stand in any
    order, each at most once.
    """
    if not name.startswith("ConvNet"):
        return None
    position = len("ConvNet")
    found: dict[str, Any] = {}
    while position < len(name):
        match = _TOKEN.match(name, position)
        if match is None or match.lastgroup is None or match.lastgroup in found:
            return None
        found[match.lastgroup] = match.group()
        position = match.end()
    for key in ("depth", "width"):
        if key in found:
            found[key] = int(found[key][1:])
            if not 1 <= found[key] <= MOST[key]:
                raise ValueError(f"the {key} of network {name!r} must be from 1 to {MOST[key]}")
    return ConvNetSettings(**found)


def shrink(size: tuple[int, int], kernel: int, stride: int = 1, padding: int = 0) -> tuple[int, int]:
    """(height, width) of a map of that size after a convolution or pooling layer.

    Raises ValueError where nothing is left.
    """
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
    if height < 1 or width < 1:
        raise ValueError(
            f"images are too small for this network: a layer with a {kernel}x{kernel} window gets a map of "
            f"{size[0]}x{size[1]}; take a network of less depth or without pooling, or larger images"
        )
    return height, width


class ConvNet(nn.Module):
    """ConvNet of `settings` for images of (channels, height, width). x: (B, channels, H, W) -> logits (B, classes).

    With one input channel the first convolution pads by 3, so that 28x28 digits become 32x32 (as in the public code).
    """

    def __init__(self, channels: int, classes: int, image_size: tuple[int, int], settings: ConvNetSettings) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, size = channels, image_size
        for block in range(settings.depth):
            padding = 3 if channels == 1 and block == 0 else 1
            layers.append(nn.Conv2d(inputs, settings.width, kernel_size=3, padding=padding))
            inputs, size = settings.width, shrink(size, 3, 1, padding)
            if settings.norm != "NN":
                layers.append(make_norm(settings.norm, inputs, *size))
            layers.append(ACTIVATIONS[settings.activation]())
            pooling = POOLINGS[settings.pooling]
            if pooling is not None:
                layers.append(pooling(kernel_size=2, stride=2))
                size = shrink(size, 2, 2)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * size[0] * size[1], classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features before the classifier. x: (B, channels, H, W) -> (B, features)."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))
