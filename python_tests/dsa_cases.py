"""What tests of DSA share: the names of its operations, devices, seeded noise."""

import pytest
import torch

OLD_GRIDS = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior has changed")
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
NAMES = ["color", "crop", "cutout", "flip", "scale", "rotate"]
ALL = "_".join(NAMES)


@pytest.fixture(name="device", params=DEVICES)
def each_device(request):
    return request.param


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)
