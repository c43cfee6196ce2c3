"""Parts of one model whose graphs compute the same run one function, so that it is compiled once."""

import weakref

from torch.fx import GraphModule

from vera_fx._torch import skip_frame
from vera_fx._torch_graphs import copy_of
from vera_fx.passes import is_outlined, outline_whole

_Called = tuple[GraphModule, GraphModule] | None
"""A graph that does nothing but call a function, and that; None for one that is compiled as it is."""


class SharedBodies:
    """The functions that the compiled graphs of a model's parts are calls of.

    A compiler keeps what it made by the code that it compiled, and every graph has code of its own. So
    equal graphs become calls of one function, which takes all that they read as arguments.
    """

    def __init__(self) -> None:
        self._bodies: weakref.WeakValueDictionary[str, GraphModule] = weakref.WeakValueDictionary()
        self._calls: weakref.WeakKeyDictionary[GraphModule, _Called] = weakref.WeakKeyDictionary()

    def call_of(self, graph: GraphModule) -> GraphModule:
        """A graph that does nothing but call the function of all that compute the same as ``graph``.

        The graph itself, if it calls functions of its own, or modules: other modules are other code.
        """
        if graph not in self._calls:
            self._calls[graph] = None if is_outlined(graph.graph) else self._made(graph)
        called = self._calls[graph]
        return graph if called is None else called[0]

    def compiled_for(self, graph: GraphModule) -> GraphModule | None:
        """What a compiler was given for ``graph``: a function, or the graph itself; None if nothing yet."""
        if graph not in self._calls:
            return None
        called = self._calls[graph]
        return graph if called is None else called[1]

    def _made(self, graph: GraphModule) -> "_Called":
        calling = copy_of(graph)
        body = outline_whole(calling, self._bodies)
        if body is None:
            return None
        calling.recompile()
        skip_frame(type(calling).forward)
        return calling, body
