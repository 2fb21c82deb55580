"""DSA against the same operations in plain PyTorch, and combined augmentation against drawing it image by image.

Per name: DiffAugment on a batch, forward + backward through autograd, ours and plain PyTorch taking turns, with the
drawing of the parameters in both. Two plain copies (of the images and of the gradient) are the floor. `kernels` has the
operation alone, its parameters on the device before: the share of a copy's bandwidth, where the images and the gradient
are read once and written once. Combined: half of the images DSA, half a random crop and a flip, each image drawing its
own, as SelMatch evaluates; plain PyTorch draws it image by image, as a data loader does: on the CPU whatever the
device, and then moves the batch.
"""

import math

import torch

import selmatch_ext as sm
from bench.peaks import copy_rate
from bench.timing import Setting, alternate, rotations, threads

NAMES = ("color", "crop", "cutout", "flip", "scale", "rotate")
STRATEGY = "_".join(NAMES)


def _images(setting, batch, side, generator):
    return torch.randn(batch, 3, side, side, generator=generator, device=setting.device)


def _per_name(setting, batch, side):
    import reference

    generator = setting.generator()
    x, gradient = (_images(setting, batch, side, generator) for _ in range(2))
    x.requires_grad_()
    param = sm.ParamDiffAug()

    def both_ways(function, name):
        return lambda: torch.autograd.grad(function(x, name, -1, param), x, gradient)

    cases = {}
    for name in NAMES:
        # Not from CUDA graphs: parameters are drawn on the CPU and copied.
        seconds = alternate(
            setting,
            {
                "fused": both_ways(sm.DiffAugment, name),
                "plain": both_ways(reference.DiffAugment, name),
                "two copies": lambda: (x.detach().clone(), gradient.clone()),
            },
            in_a_row=10,
            graphs=False,
        )
        seconds["speedup"] = seconds["plain"] / seconds["fused"]
        seconds["over_copies"] = seconds["fused"] / seconds["two copies"]
        cases[name] = seconds
    return cases


def _kernels(setting, batch, side):
    generator, draws = setting.generator(), torch.Generator().manual_seed(0)
    nbytes = batch * 3 * side * side * 4
    cases = {}
    for name in NAMES:
        sets = []
        for _ in range(rotations(setting, 2 * nbytes)):
            x, gradient = (_images(setting, batch, side, generator) for _ in range(2))
            table = sm.sample_augmentation(batch, side, side, name, per_sample=True, generator=draws)
            sets.append((x.requires_grad_(), table.to(setting.device), gradient))
        calls = {
            "forward": [lambda x=x, p=p: sm.augment(x.detach(), p) for x, p, _ in sets],
            "both": [lambda x=x, p=p, g=g: torch.autograd.grad(sm.augment(x, p), x, g) for x, p, g in sets],
        }
        seconds = alternate(setting, calls, in_a_row=10)
        rate = {"forward": 2 * nbytes / seconds["forward"], "both": 4 * nbytes / seconds["both"]}
        cases[name] = {
            way: {"seconds": s, "share_of_copy": rate[way] / copy_rate(setting)} for way, s in seconds.items()
        }
    return cases


def _combined(setting, count, side):
    """None where torchvision, with which images are drawn one by one, is not installed."""
    import reference

    try:
        from torchvision import transforms
    except ImportError:
        setting.notes.append("augment: no combined augmentation, as torchvision is not installed")
        return None
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator)
    x = images.to(setting.device)
    mask = torch.arange(count) % 2 == 0
    distilled = mask.tolist()
    param = sm.ParamDiffAug()
    simple = transforms.Compose([transforms.RandomCrop(side, padding=4), transforms.RandomHorizontalFlip()])

    def fused():
        table = sm.mix_augmentations(
            mask,
            sm.sample_augmentation(count, side, side, STRATEGY, per_sample=True, generator=generator),
            sm.sample_augmentation(count, side, side, "simple", generator=generator),
        )
        return sm.augment(x, table.to(setting.device))

    def one(index):
        if distilled[index]:
            return reference.DiffAugment(images[index : index + 1], STRATEGY, -1, param)[0]
        return simple(images[index])

    def one_by_one():
        return torch.stack([one(index) for index in range(count)]).to(setting.device)

    seconds = alternate(setting, {"fused": fused, "one by one": one_by_one}, repeats=5, warmup=1, graphs=False)
    return {**seconds, "images": count, "speedup": seconds["one by one"] / seconds["fused"]}


def run(setting: Setting) -> dict:
    """Seconds by name and for combined augmentation, and how many times faster the fused operation is."""
    side = setting.size(32, 32, 8)
    batch = setting.size(1024, 8192, 8)
    with threads():
        cases = _per_name(setting, batch, side)
        kernels = {str(b): _kernels(setting, b, side) for b in setting.size((1024,), (125, 8192), (8,))}
        combined = _combined(setting, setting.size(2500, 2500, 16), side)
    mean = math.exp(sum(math.log(case["speedup"]) for case in cases.values()) / len(cases))
    return {
        "device": setting.device,
        "batch": batch,
        "names": cases,
        "kernels": kernels,
        "geometric_mean": mean,
        "combined": combined,
    }


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    rows = []
    for name, case in result["names"].items():
        figure = f"{1e3 * case['fused']:.2f} ms, {case['speedup']:.1f}x plain, {case['over_copies']:.2f} two copies"
        rows.append((f"DiffAugment {name}, {result['batch']} images", figure, "at least 2x plain"))
    rows.append(("DiffAugment, geometric mean", f"{result['geometric_mean']:.1f}x plain", "at least 6x"))
    for batch, cases in result["kernels"].items():
        for name, case in cases.items():
            parts = (f"{way} {1e6 * c['seconds']:.0f} us, {c['share_of_copy']:.0%}" for way, c in case.items())
            rows.append((f"augment {name}, {batch} images", f"{'; '.join(parts)} of a copy's bandwidth", ""))
    if result["combined"] is not None:
        figure = f"{result['combined']['speedup']:.0f}x one by one"
        rows.append((f"combined augmentation, {result['combined']['images']} images", figure, "at least 20x"))
    return rows
