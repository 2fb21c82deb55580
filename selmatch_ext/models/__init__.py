"""Networks by name, and their parameters as one flat vector."""

from selmatch_ext.models import flat, from_file
from selmatch_ext.models.zoo import build, embed, names

__all__ = ["build", "embed", "flat", "from_file", "names"]
