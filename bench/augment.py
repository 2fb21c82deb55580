"""DSA against the same operations in plain PyTorch, and combined augmentation against drawing it image by image.

    python -m bench.augment [--device cuda] [--json]

Per name: DiffAugment on a batch, forward + backward through autograd, ours and plain PyTorch taking turns. Two plain
copies (of the images and of the gradient) are the floor. Combined: half of the images DSA, half a random crop and a
flip, each image drawing its own, as SelMatch evaluates; plain PyTorch draws it image by image, as a data loader does:
on the CPU whatever the device, and then moves the batch.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torchvision import transforms

import selmatch_ext as sm
from bench.timing import alternate, keep_memory, machine, threads

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python_tests"))
import reference  # noqa: E402

NAMES = ("color", "crop", "cutout", "flip", "scale", "rotate")
STRATEGY = "_".join(NAMES)
BATCH = {"cpu": 1024, "cuda": 8192}
COMBINED = 2500
SIZE = 32
THREADS = 2


def _per_name(device):
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(BATCH[device], 3, SIZE, SIZE, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    param = sm.ParamDiffAug()

    def both_ways(function, name):
        return lambda: torch.autograd.grad(function(x, name, -1, param), x, gradient)

    cases = {}
    for name in NAMES:
        seconds = alternate(
            {
                "fused": both_ways(sm.DiffAugment, name),
                "plain": both_ways(reference.DiffAugment, name),
                "two copies": lambda: (x.detach().clone(), gradient.clone()),
            },
            calls=10,
        )
        seconds["speedup"] = seconds["plain"] / seconds["fused"]
        seconds["over_copies"] = seconds["fused"] / seconds["two copies"]
        cases[name] = seconds
    return cases


def _combined(device):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(COMBINED, 3, SIZE, SIZE, generator=generator)
    x = images.to(device)
    mask = torch.arange(COMBINED) % 2 == 0
    distilled = mask.tolist()
    param = sm.ParamDiffAug()
    simple = transforms.Compose([transforms.RandomCrop(SIZE, padding=4), transforms.RandomHorizontalFlip()])

    def fused():
        table = sm.mix_augmentations(
            mask,
            sm.sample_augmentation(COMBINED, SIZE, SIZE, STRATEGY, per_sample=True, generator=generator),
            sm.sample_augmentation(COMBINED, SIZE, SIZE, "simple", generator=generator),
        )
        return sm.augment(x, table.to(device))

    def one(index):
        if distilled[index]:
            return reference.DiffAugment(images[index : index + 1], STRATEGY, -1, param)[0]
        return simple(images[index])

    def one_by_one():
        return torch.stack([one(index) for index in range(COMBINED)]).to(device)

    seconds = alternate({"fused": fused, "one by one": one_by_one}, repeats=5, warmup=1)
    return {**seconds, "speedup": seconds["one by one"] / seconds["fused"]}


def run(device: str = "cpu") -> dict:
    """Seconds by name and for combined augmentation, and how many times faster the fused operation is."""
    keep_memory()
    with threads(THREADS):
        cases = _per_name(device)
        combined = _combined(device)
    mean = math.exp(sum(math.log(case["speedup"]) for case in cases.values()) / len(cases))
    return {
        "machine": machine(),
        "device": device,
        "threads": THREADS,
        "batch": BATCH[device],
        "names": cases,
        "geometric_mean": mean,
        "combined_images": COMBINED,
        "combined": combined,
    }


def show(result: dict) -> str:
    """The figures as a table."""
    state = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value)
    lines = [
        f"DiffAugment, forward + backward, {result['batch']} images on {result['device']} ({state})",
        f"{'':<12}{'fused':>11}{'plain':>11}{'faster':>9}{'two copies':>13}{'over them':>11}",
    ]
    for name, case in result["names"].items():
        lines.append(
            f"{name:<12}{1e3 * case['fused']:>8.2f} ms{1e3 * case['plain']:>8.2f} ms{case['speedup']:>8.1f}x"
            f"{1e3 * case['two copies']:>10.2f} ms{case['over_copies']:>10.2f}x"
        )
    lines.append(f"{'geometric mean':<34}{result['geometric_mean']:>8.1f}x")
    case = result["combined"]
    lines.append(
        f"combined augmentation of {result['combined_images']} images: {1e3 * case['fused']:.2f} ms, "
        f"one by one {1e3 * case['one by one']:.0f} ms, {case['speedup']:.0f}x faster"
    )
    return "\n".join(lines)


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    rows = [
        (
            f"DiffAugment {name}",
            f"{case['speedup']:.1f}x plain, {case['over_copies']:.2f} two copies",
            "at least 2x plain",
        )
        for name, case in result["names"].items()
    ]
    rows.append(("DiffAugment, geometric mean", f"{result['geometric_mean']:.1f}x plain", "at least 6x"))
    combined = f"{result['combined']['speedup']:.0f}x one by one"
    return [*rows, (f"combined augmentation, {result['combined_images']} images", combined, "at least 20x")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    result = run(options.device)
    print(json.dumps(result, indent=1) if options.json else show(result))
