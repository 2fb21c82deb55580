"""FRePo's network (arXiv 2206.00719): a ConvNet whose width doubles from block to block."""

from __future__ import annotations

import math
import re

from torch import Tensor, nn

from selmatch_ext.models.convnet import MOST, shrink

_NAME = re.compile(r"FRePoNet(?:D(?P<depth>\d+))?(?:W(?P<width>\d+))?(?P<norm>BN)?")
STD_OF_TRUNCATED = 0.87962566103423978
"""The standard deviation of a normal number that is drawn anew until it is from −2 to 2."""


class FRePoNet(nn.Module):
    """[norm, convolution 3x3, ReLU, average pooling 2x2] × depth, then a linear layer; the first block has no norm.
    x: (B, C, H, W) -> logits (B, classes).

    Weights are normal with variance 1 / inputs, cut at twice the standard deviation (LeCun's in flax), biases 0.
    BatchNorm's running statistics are 0.9 of the last batch's and 0.1 of the former ones, as in the public code."""

    def __init__(
        self, channels: int, classes: int, image_size: tuple[int, int], depth: int, width: int, norm: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, size = channels, image_size
        for block in range(depth):
            if norm and block > 0:
                layers.append(nn.BatchNorm2d(inputs, momentum=0.9))
            outputs = width * 2**block
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
            inputs, size = outputs, shrink(size, 2, 2)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs * size[0] * size[1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _lecun(module)

    def embed(self, x: Tensor) -> Tensor:
        """Features before the classifier. x: (B, C, H, W) -> (B, features)."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


def _lecun(layer: nn.Conv2d | nn.Linear) -> None:
    std = 1 / math.sqrt(layer.weight[0].numel()) / STD_OF_TRUNCATED
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def parse_name(name: str) -> tuple[int, int, bool] | None:
    """(depth, width of the first block, whether it has BatchNorm) of a name such as "FRePoNet" (3, 128, no),
    "FRePoNetBN" or "FRePoNetD4W32BN"; None where it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    depth, width = int(match["depth"] or 3), int(match["width"] or 128)
    if depth < 1 or width < 1 or width * 2 ** (depth - 1) > MOST["width"]:
        raise ValueError(
            f"network {name!r} has depth {depth} and width {width}; allowed is 1 and above, and at most "
            f"{MOST['width']} channels in the last block"
        )
    return depth, width, bool(match["norm"])
