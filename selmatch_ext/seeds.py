"""Independent random streams from one seed: a stream is named by what it is for, so nothing depends on call order."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
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
    """Within, the global generators from which networks draw (torch's of the CPU and of `device`, Python's and numpy's)
    give a stream that follows from the state of `source` (CPU); afterwards they are as they were. `source` does not
    advance."""
    before = RandomState(device)
    try:
        seed_globally(int(torch.randint(2**62, (), generator=source.clone_state(), device="cpu")), device)
        yield
    finally:
        before.restore()


def seed_globally(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of the CPU and of `device`, Python's and numpy's. For use inside a block that puts them
    back."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class RandomState:
    """The state of the global generators of torch (the CPU's and, on a GPU, the device's), Python and numpy."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.python, self.numpy = random.getstate(), np.random.get_state()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState) or self.python != other.python or not torch.equal(self.cpu, other.cpu):
            return False
        if self.cuda is not None and (other.cuda is None or not torch.equal(self.cuda, other.cuda)):
            return False
        return all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
