"""Dataset distillation that is fast, small in memory and exact: fused operations and methods for PyTorch."""

import torch  # noqa: F401  (the extension needs torch's libraries loaded)

from ._C import build_info

__all__ = ["build_info"]
