"""Training by SGD as a differentiable function, exact and in memory that does not grow with a graph of every step."""

from selmatch_ext.unroll.sgd import Engine, UnrolledSGD, explain_engine, unrolled_sgd

__all__ = ["Engine", "UnrolledSGD", "explain_engine", "unrolled_sgd"]
