"""The networks of the distillation papers beside the ConvNet family: MLP, LeNet, AlexNet, VGG and ResNet."""

from torch import Tensor, nn
from torch.nn import functional as F

from selmatch_ext.models.convnet import make_norm, shrink


class MLP(nn.Module):
    """Two hidden layers of 128. x: (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(channels * image_size[0] * image_size[1], 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features before the last layer: (B, 128)."""
        return F.relu(self.fc_2(F.relu(self.fc_1(x.flatten(1)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_3(self.embed(x))


class LeNet(nn.Module):
    """LeNet 6-16-120-84. x: (B, C, H, W) -> logits (B, classes). One-channel images are padded by 2."""

    def __init__(self, channels: int, classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        padding = 2 if channels == 1 else 0
        size = shrink(shrink(image_size, 5, 1, padding), 2, 2)
        size = shrink(shrink(size, 5), 2, 2)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc_1 = nn.Linear(16 * size[0] * size[1], 120)
        self.fc_2 = nn.Linear(120, 84)
        self.fc_3 = nn.Linear(84, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features before the last layer: (B, 84)."""
        return F.relu(self.fc_2(F.relu(self.fc_1(self.features(x).flatten(1)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_3(self.embed(x))


class AlexNet(nn.Module):
    """AlexNet for 32x32 (128-192-256-192-192). x: (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        padding = 4 if channels == 1 else 2  # 28x28 digits become 32x32
        size = shrink(image_size, 5, 1, padding)
        for _ in range(3):
            size = shrink(size, 2, 2)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 128, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 192, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(192, 192, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc = nn.Linear(192 * size[0] * size[1], classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features before the last layer: (B, features)."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x))


_VGG: dict[str, tuple[int | str, ...]] = {
    "11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
}


class VGG(nn.Module):
    """VGG11 or VGG16 with one linear layer. x: (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int, image_size: tuple[int, int], layers: str, norm: str) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        inputs, size = channels, image_size
        for width in _VGG[layers]:
            if isinstance(width, str):
                modules.append(nn.MaxPool2d(2))
                size = shrink(size, 2, 2)
                continue
            padding = 3 if channels == 1 and not modules else 1
            size = shrink(size, 3, 1, padding)
            modules += [nn.Conv2d(inputs, width, 3, padding=padding), make_norm(norm, width, *size), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(inputs * size[0] * size[1], classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features before the classifier: (B, features)."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


class _Block(nn.Module):
    """The basic residual block; with `pool` average pooling takes the place of the stride."""

    def __init__(self, inputs: int, width: int, size: tuple[int, int], stride: int, norm: str, pool: bool) -> None:
        super().__init__()
        self.pool = pool and stride == 2
        step = 1 if pool else stride
        after = shrink(size, 2, 2) if self.pool else shrink(size, 3, stride, 1)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=step, padding=1, bias=False)
        self.bn1 = make_norm(norm, width, *(size if pool else after))
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = make_norm(norm, width, *after)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            pooling = [nn.AvgPool2d(2)] if self.pool else []
            conv = nn.Conv2d(inputs, width, 1, stride=step, bias=False)
            self.shortcut = nn.Sequential(conv, *pooling, make_norm(norm, width, *after))
        self.size = after

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        if self.pool:
            out = F.avg_pool2d(out, 2)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet18 or ResNet34 with a 3x3 stem. x: (B, C, H, W) -> logits (B, classes).

    pool: average pooling in place of strides, and the classifier sees the whole last map (as in the public code)
    instead of its mean. tiny: a stem of stride 2, for 64x64 images.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        image_size: tuple[int, int],
        blocks: tuple[int, ...],
        norm: str,
        pool: bool,
        tiny: bool,
    ) -> None:
        super().__init__()
        stride = 2 if tiny else 1
        size = shrink(image_size, 3, stride, 1)
        self.conv1 = nn.Conv2d(channels, 64, 3, stride=stride, padding=1, bias=False)
        self.bn1 = make_norm(norm, 64, *size)
        inputs, layers = 64, []
        for stage, count in enumerate(blocks):
            width, stack = 64 * 2**stage, []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stack.append(_Block(inputs, width, size, stride, norm, pool))
                inputs, size = width, stack[-1].size
            layers.append(nn.Sequential(*stack))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.pool = pool
        self.classifier = nn.Linear(inputs * size[0] * size[1] if pool else inputs, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features before the classifier: (B, 512), with `pool` (B, 512 * height * width)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(1) if self.pool else x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))
