"""Fused operations, each a thin wrapper around its operator: fake tensors, autograd, documentation."""
