"""One call becomes a graph: its signature, its export, and what its Python read on the way."""
