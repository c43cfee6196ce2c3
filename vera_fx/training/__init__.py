"""Many adapters trained in one batch: losses by row, one optimiser for all, the loop around them."""
