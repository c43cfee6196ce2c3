"""Finding sites and inserted branches in a graph, and where layers begin and end."""

from vera_fx.passes.sites.target import Target

__all__ = ["Target"]
