"""A network read into operations that the fused engine computes, used by unrolled steps and by ordinary training."""
