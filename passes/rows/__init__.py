"""Following the rows of a batch through a graph."""
