"""What tests of DSA share: the names of its operations, seeded noise."""

import pytest
import torch

OLD_GRIDS = pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid behavior has changed")
NAMES = ["color", "crop", "cutout", "flip", "scale", "rotate"]
ALL = "_".join(NAMES)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)
