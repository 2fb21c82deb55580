from typing import TypedDict

class _BuildInfo(TypedDict):
    version: str
    torch: str
    cuda: str | None  # None: built without CUDA
    archs: list[str]
    cpu_capability: str  # baseline, avx2 or avx512

def build_info() -> _BuildInfo: ...
def begin_steps() -> None: ...
def end_steps() -> None: ...
