"""SelMatch (arXiv 2406.18561): start from a window of real images of the right difficulty, distil its easier part by
trajectory matching, keep its harder part as it is."""

from selmatch_ext.methods.mtt import MTT
from selmatch_ext.settings import Matching


class SelMatch(MTT):
    """Partial update of a selected set (section 3.2 of the paper): MTT on the whole window, of which only the images
    that its `distilled` mask marks are learned."""

    name = "selmatch"
    settings_type = Matching
