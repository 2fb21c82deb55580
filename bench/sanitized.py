"""Every kernel once on small tensors: what compute-sanitizer's tools are run on.

python -m bench.sanitized [--device cuda]
"""

import argparse
import itertools

import torch

import selmatch_ext as sm
from bench import checks

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def blocks(device: str) -> None:
    """Two shapes: odd sides and part of a vector of channels, and two whole vectors."""
    for case in checks.block_cases([(3, 6, 5, 7), (2, 64, 4, 4)]):
        checks.check_block((case[0], case[1] if case[1] != "group" else "layer", case[2]), device)


def augmentations(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for name, size in itertools.product(STRATEGY.split("_"), (9, 16)):
        x = torch.randn(3, 3, size, size, generator=draw).to(device).requires_grad_()
        table = sm.sample_augmentation(3, size, size, name, per_sample=True, generator=draw).to(device)
        sm.augment(x, table).square().sum().backward()


def distances(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        shapes = [(3, 1), (), (1, 9000), (4,), (2, 3, 5)]
        lists = [[torch.randn(s, dtype=dtype, generator=draw).to(device) for s in shapes] for _ in range(3)]
        lists[0] = [t.requires_grad_() for t in lists[0]]
        sm.trajectory_distance(*lists).backward()
        for metric in ("layerwise", "mse", "cos"):
            sm.gradient_distance(lists[0], lists[1], metric).backward()


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.sanitized", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    blocks(device)
    augmentations(device)
    distances(device)
    if device != "cpu":
        torch.cuda.synchronize()
    print("every kernel has run")


if __name__ == "__main__":
    main()
