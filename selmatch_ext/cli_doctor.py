"""The verb of the command line that tells about this machine."""

from __future__ import annotations

import json as text
from dataclasses import asdict
from typing import Annotated

import tyro

from selmatch_ext.data.memory import size_text
from selmatch_ext.doctor import Machine, examine, slow
from selmatch_ext.output import say


def doctor(*, json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False) -> None:
    """What was built, what this machine has, and what makes it slow.

    Args:
        json: Print all of it as JSON.
    """
    machine = examine()
    if json:
        say(text.dumps({**asdict(machine), "slow": slow(machine)}, indent=2))
        return
    for name, value in described(machine).items():
        say(f"{name}: {value}")
    say()
    for line in slow(machine) or ["Nothing was found that makes this machine slow."]:
        say(f"- {line}")


def described(m: Machine) -> dict[str, str]:
    """The lines of the report, without what is slow."""
    cuda = "without CUDA" if m.built["cuda"] is None else f"CUDA {m.built['cuda']} for {', '.join(m.built['archs'])}"
    unknown = "unknown vector instructions"
    instructions = unknown if m.instructions is None else ", ".join(m.instructions) or "none of AVX2, AVX-512, AMX"
    gpus = [f"cuda:{k} {g.name} ({g.capability}, {size_text(g.memory)})" for k, g in enumerate(m.gpus)]
    return {
        "selmatch_ext": f"{m.built['version']}, built for torch {m.built['torch']}, {cuda}",
        "torch": f"{m.torch}, {'without CUDA' if m.torch_cuda is None else f'CUDA {m.torch_cuda}'}",
        "processor": f"{m.processor} ({instructions})",
        "kernels for the CPU": m.level,
        "devices": ", ".join(["cpu", *gpus]),
        "cores": f"{m.available} available of {m.cores}; {m.load:.1f} processes running on average",
        "threads of torch": str(m.threads),
        "bfloat16 on the CPU": f"{m.bfloat16:.2g} times the time of float32",
        "free memory": "unknown" if m.memory is None else size_text(m.memory),
        "environment": ", ".join(f"{n}={v}" for n, v in m.environment.items()) or "nothing set that matters",
    }
