"""Networks by name, and their parameters as one flat vector."""

from . import flat
from .zoo import build, embed, names

__all__ = ["build", "embed", "flat", "names"]
