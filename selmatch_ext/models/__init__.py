"""Networks by name, and their parameters as one flat vector."""

from . import flat
from .zoo import build, names

__all__ = ["build", "flat", "names"]
