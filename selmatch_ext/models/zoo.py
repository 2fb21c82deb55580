"""Networks by name: the ConvNet family, the networks of the distillation papers, torchvision's and timm's."""

import contextlib
import difflib

import torch

from .convnet import ConvNet, parse_name

_CONVNETS = (
    ["ConvNet"]
    + [f"ConvNetD{depth}" for depth in range(1, 9)]
    + [f"ConvNetW{width}" for width in (32, 64, 128, 256, 512, 1024)]
    + [f"ConvNet{norm}" for norm in ("BN", "IN", "GN", "LN", "NN")]
    + [f"ConvNet{activation}" for activation in ("AS", "AR", "AL", "ASwish")]
    + [f"ConvNet{pooling}" for pooling in ("NP", "MP", "AP")]
    + ["ConvNetD4BN"]
)


def names():
    """The usual network names, for help texts. `build` takes more: any combination of ConvNet suffixes, and prefixes."""
    return list(_CONVNETS)


@contextlib.contextmanager
def _drawing_from(generator):
    """Initial weights drawn inside come from `generator`; the global generator is as before afterwards."""
    if generator is None:
        yield
        return
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
    state = torch.get_rng_state()
    try:
        # Not torch.manual_seed, which would reseed every GPU's generator as well.
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)


def _image_size(image_size):
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(not isinstance(s, int) or s < 1 for s in size):
        raise ValueError(f"image_size must be a positive integer or a pair (H, W) of them, got {image_size!r}")
    return size


def build(name, channels, classes, image_size, generator=None):
    """A freshly initialised network, on the CPU, in train mode."""
    size = _image_size(image_size)
    for argument, value in (("channels", channels), ("classes", classes)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be an integer of at least 1, got {value!r}")
    settings = parse_name(name)
    with _drawing_from(generator):
        if settings is not None:
            return ConvNet(channels, classes, size, settings)
    near = difflib.get_close_matches(name, names(), n=5, cutoff=0.5)
    raise ValueError(f"unknown network {name!r}; near names: {', '.join(near) or 'none'}")
