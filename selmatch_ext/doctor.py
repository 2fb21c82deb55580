"""What `selmatch doctor` tells: what was built, what this machine has, and what makes it slow."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selmatch_ext._C import build_info
from selmatch_ext.data.memory import available_memory
from selmatch_ext.precision import SLOW, bfloat16_slowdown

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Names of instructions in CPUINFO that the kernels, ours or torch's, use where they are."""
PREFIXES = ("OMP_", "GOMP_", "KMP_", "MKL_", "SELMATCH_", "CUDA_VISIBLE_DEVICES")
"""Of the environment's variables, those that change how fast something runs."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use. capability: such as "9.0"; memory: bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """What there is.

    instructions: those of VECTORS that the processor has, None where the system does not say. level: the vector
    instructions that the CPU kernels use. cores: of the machine; available: those that this process may use, by its
    affinity and its control group. threads: of torch. load: mean number of running processes in the last minute.
    bfloat16: time of a small convolution in bfloat16 on the CPU divided by that in float32. memory: free, in bytes.
    """

    processor: str
    instructions: tuple[str, ...] | None
    level: str
    cores: int
    available: int
    threads: int
    load: float
    bfloat16: float
    memory: int | None
    gpus: tuple[Gpu, ...]
    torch: str
    torch_cuda: str | None
    built: dict[str, Any]
    environment: dict[str, str]


def examine() -> Machine:
    """This machine, as this process sees it. Measures for some milliseconds."""
    processor, instructions = _processor()
    properties = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    built = dict(build_info())
    return Machine(
        processor=processor,
        instructions=instructions,
        level=str(built["cpu_capability"]),
        cores=os.cpu_count() or 1,
        available=_available_cores(),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        bfloat16=bfloat16_slowdown(),
        memory=available_memory(),
        gpus=tuple(Gpu(p.name, f"{p.major}.{p.minor}", p.total_memory) for p in properties),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        built=built,
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)},
    )


def _processor() -> tuple[str, tuple[str, ...] | None]:
    """Its name, and which of VECTORS it has."""
    try:
        lines = [line.partition(":") for line in CPUINFO.read_text().splitlines()]
    except OSError:
        return platform.processor() or platform.machine(), None
    said = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    flags = said.get("flags", "").split()
    return said.get("model name", platform.machine()), tuple(v for v in VECTORS if v in flags) if flags else None


def _available_cores() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def _quota() -> float | None:
    """The cores whose time the control group allows; None where it sets no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in names).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def slow(machine: Machine) -> list[str]:
    """What makes this machine slow, a sentence or two for each, with what to do about it where something can be
    done."""
    return [*_slow_processor(machine), *_slow_threads(machine), *_slow_gpu(machine)]


def _slow_processor(m: Machine) -> list[str]:
    found = []
    if m.instructions is not None and "avx512f" not in m.instructions:
        found.append(f"The processor has no AVX-512; the kernels for the CPU use {m.level}.")
    elif m.level != "avx512":
        wish = m.environment.get("SELMATCH_CPU")
        why = "" if wish is None else f", because SELMATCH_CPU is {wish}"
        found.append(f"The kernels for the CPU use {m.level} and not AVX-512{why}.")
    if m.bfloat16 > SLOW:
        found.append(
            f"On the CPU bfloat16 takes {m.bfloat16:.0f} times as long as float32, as it does on processors without "
            "instructions for it; use the precision float32."
        )
    return found


def _slow_threads(m: Machine) -> list[str]:
    found = []
    if m.available < m.cores:
        found.append(
            f"This process may use {m.available} of {m.cores} cores, by its affinity or the limit of its control group."
        )
    if m.threads > m.available:
        found.append(
            f"torch computes with {m.threads} threads on {m.available} cores, so that threads wait for each other; set "
            f"OMP_NUM_THREADS={m.available}."
        )
    elif m.threads < m.available:
        limits = [f"{n} is {m.environment[n]}" for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if n in m.environment]
        why = f": {', '.join(limits)}" if limits else ""
        found.append(f"torch uses {m.threads} of the {m.available} cores that are available{why}.")
    if m.environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        found.append(
            "OMP_WAIT_POLICY is active: threads that wait keep their core busy, which makes every step slow beside "
            "other processes; set it to passive."
        )
    if m.load > 1.5 * m.available:
        found.append(f"Other processes use the cores: {m.load:.1f} were running on {m.available} cores on average.")
    return found


def _slow_gpu(m: Machine) -> list[str]:
    if not m.gpus:
        why = "this torch was built without CUDA" if m.torch_cuda is None else "torch finds none"
        return [f"There is no GPU that can be used ({why}); everything is computed on the CPU."]
    if m.built["cuda"] is None:
        return [
            "There is a GPU, but the extension was built without CUDA, so that it computes on the CPU alone; build it "
            "again where nvcc is found."
        ]
    archs = [arch.removesuffix("+PTX") for arch in m.built["archs"]]
    return [
        f"The kernels were not compiled for {gpu.name} ({gpu.capability}), but for {', '.join(m.built['archs'])}: the "
        "driver compiles them when each is first used, where it can."
        for gpu in m.gpus
        if not any(_runs(arch, gpu.capability) for arch in archs)
    ]


def _runs(arch: str, capability: str) -> bool:
    """Whether machine code for `arch` runs on a GPU: it does on later ones of the same major version."""
    (major, minor), (own_major, own_minor) = ((int(n) for n in text.split(".")) for text in (arch, capability))
    return major == own_major and minor <= own_minor
