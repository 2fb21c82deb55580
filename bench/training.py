"""One step of ordinary training, plain against `fast` (fused/training.py): forward, backward and the update.

ConvNet of width 128 with instance and with batch norm, and ResNet18BN; in IEEE float32 also the plain network under
torch.compile. All run in the same precision: bfloat16 is torch's autocast for the plain network, and convolutions and
activations in bfloat16 for the fast one. On a GPU both the time of the launches, as training runs, and that of a
replayed CUDA graph, which is the GPU's work alone.
"""

import torch
from torch.nn import functional as F

from bench.peaks import NAMES, precisions
from bench.timing import Setting, alternate, threads
from selmatch_ext import models
from selmatch_ext.fused.training import fast
from selmatch_ext.precision import precision_scope

NETWORKS = ("ConvNet", "ConvNetBN", "ResNet18BN")


def _step(setting, name, precision, kind, batch, side):
    """A call that does a step with a network of its own; None where `fast` leaves the network to torch."""
    generator = torch.Generator().manual_seed(0)
    device = torch.device(setting.device)
    model = models.build(name, 3, 10, side, generator=generator).to(device)
    x = torch.randn(batch, 3, side, side, generator=generator).to(device)
    labels = (torch.arange(batch) % 10).to(device)
    network = fast(model, x, precision) if kind == "fast" else model
    if kind == "fast" and network is model:
        return None
    if kind == "compiled":
        network = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step():
        with precision_scope(precision, device):
            loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        with precision_scope("tf32" if precision == "tf32" else "float32", device):
            loss.backward()
        optimizer.step()

    return step


def run(setting: Setting) -> dict:
    """Seconds of a step by network and precision, plain, fast and compiled, and how many times faster than plain fast
    is."""
    batch, side = setting.size((50, 32), (125, 32), (4, 8))
    cases = {}
    with threads():
        for name in setting.size(NETWORKS, NETWORKS, ("ConvNetD2W8",)):
            for precision in precisions(setting):
                kinds = ["plain", "fast"] + ["compiled"] * (precision == "float32" and not setting.quick)
                made = {kind: _step(setting, name, precision, kind, batch, side) for kind in kinds}
                steps = {k: step for k, step in made.items() if step is not None}
                seconds = alternate(setting, steps, repeats=7, warmup=2, in_a_row=2, graphs=False)
                case = {**seconds, "speedup": seconds["plain"] / seconds["fast"] if "fast" in seconds else None}
                if setting.gpu:
                    in_graph = alternate(setting, steps, repeats=7, in_a_row=2)
                    case |= {f"{k}_in_graph": s for k, s in in_graph.items()}
                cases[f"{name}, {NAMES[precision]}"] = case
    return {"device": setting.device, "batch": batch, "cases": cases}


def summary(result: dict) -> list[tuple[str, str, str]]:
    """Rows of `python -m bench`: what was measured, the figure, the goal."""
    rows = []
    for name, case in result["cases"].items():
        figure = f"plain {1e3 * case['plain']:.2f} ms"
        if "fast" in case:
            figure += f", fast {1e3 * case['fast']:.2f} ms, {case['speedup']:.2f}x"
        if "compiled" in case:
            figure += f", torch.compile {1e3 * case['compiled']:.2f} ms"
        if "fast_in_graph" in case:
            figure += f"; in graphs {1e3 * case['plain_in_graph']:.2f} and {1e3 * case['fast_in_graph']:.2f} ms"
        rows.append((f"training step, batch {result['batch']}, {name}", figure, "fast is not slower"))
    return rows
