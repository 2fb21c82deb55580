"""Training by SGD as a differentiable function, exact and in memory that does not grow with a graph of every step."""

from selmatch_ext.unroll.sgd import unrolled_sgd

__all__ = ["unrolled_sgd"]
