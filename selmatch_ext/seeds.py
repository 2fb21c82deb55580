"""Independent random streams from one seed: a stream is named by what it is for, so nothing depends on call order."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive(seed: int, *stream: str | int) -> int:
    """63-bit seed of the named stream, e.g. derive(seed, "expert", 3). The same on every platform."""
    text = "/".join(map(str, (seed, *stream)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator of the named stream. A long run that draws from generator(seed, "distill", iteration) in each
    iteration needs no generator state in its checkpoints."""
    return torch.Generator().manual_seed(derive(seed, *stream))


@contextlib.contextmanager
def global_stream(source: torch.Generator, device: torch.device) -> Iterator[None]:
    """Within, torch's global generators, those of the CPU and of `device`, from which dropout draws, give a stream that
    follows from the state of `source` (CPU); afterwards they are as they were. `source` does not advance."""
    seed = int(torch.randint(2**62, (), generator=source.clone_state()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
