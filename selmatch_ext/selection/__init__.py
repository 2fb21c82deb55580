"""Which real images to keep: difficulty scores and the window over them."""
