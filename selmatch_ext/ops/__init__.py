"""Fused operations, each a thin wrapper around its operator: fake tensors, autograd, documentation."""

import selmatch_ext._C  # noqa: F401  (loads the operators)
