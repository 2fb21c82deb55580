"""gradient_distance against plain PyTorch: forward + backward over the gradients of ConvNet's parameters.

The gradient is with respect to the synthetic images' gradients, as in gradient matching. Plain PyTorch takes each layer
at once, as DC's public code does. Bytes that have to move: both lists are read on the way forward; both are read and
the gradient is written on the way back.
"""

import torch

from bench.peaks import copy_rate
from bench.timing import Setting, alternate, rotations, threads
from selmatch_ext import gradient_distance, models

METRICS = ("layerwise", "mse", "cos")
PASSES = 5  # over memory of one list's size
EPSILON = 1e-6


def eager(syn, real, metric):
    """The metrics in torch's operations."""
    if metric == "layerwise":
        pairs = [(a.flatten(1), b.flatten(1)) for a, b in zip(syn, real, strict=True) if a.dim() > 1]
        return sum((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)).sum() for a, b in pairs)
    a, b = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (syn, real))
    return (a - b).square().sum() if metric == "mse" else 1 - (a * b).sum() / (a.norm() * b.norm() + EPSILON)


def _both_ways(function, lists, metric):
    return torch.autograd.grad(function(*lists, metric), lists[0], allow_unused=True)


def _case(setting, shapes, metric):
    generator = setting.generator()
    counted = [s for s in shapes if metric != "layerwise" or len(s) > 1]
    nbytes = 4 * sum(s.numel() for s in counted)

    def made():
        syn, real = ([torch.randn(s, generator=generator, device=setting.device) for s in shapes] for _ in range(2))
        return [x.requires_grad_() for x in syn], real

    sets = [made() for _ in range(rotations(setting, 2 * nbytes))]
    for got, want in zip(
        _both_ways(gradient_distance, sets[0], metric), _both_ways(eager, sets[0], metric), strict=True
    ):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    functions = {"fused": gradient_distance, "eager": eager}
    calls = {n: [lambda f=f, lists=lists: _both_ways(f, lists, metric) for lists in sets] for n, f in functions.items()}
    seconds = alternate(setting, calls, in_a_row=5)
    share = PASSES * nbytes / seconds["fused"] / copy_rate(setting)
    return {**seconds, "speedup": seconds["eager"] / seconds["fused"], "share_of_copy": share}


def run(setting: Setting) -> dict:
    """Seconds by network and metric, how many times faster, and the share of a copy's bandwidth."""
    cases = {}
    with threads():
        for name in setting.size(("ConvNet", "ResNet18"), ("ConvNet", "ResNet18"), ("ConvNetD2W8",)):
            model = models.build(name, 3, 10, 32, generator=torch.Generator().manual_seed(0))
            for metric in METRICS:
                cases[f"{name}, {metric}"] = _case(setting, [p.shape for p in model.parameters()], metric)
    return {"device": setting.device, "cases": cases}


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    return [
        (
            f"forward + backward, {name}",
            f"{case['speedup']:.1f}x eager, {case['share_of_copy']:.0%} of a copy's bandwidth",
            "",
        )
        for name, case in result["cases"].items()
    ]
