"""Which parts of a model that runs in Python share what was captured, and what is compiled."""

from collections.abc import Iterator
from typing import NamedTuple

from torch.fx import GraphModule

from vera_fx.capturing.export_call import Capture
from vera_fx.graphs.runtime import Runtime

_SHOWN = 3


class SharedCapture(NamedTuple):
    """One capture, and the parts whose graphs are made from it.

    Attributes:
        parts: their paths, in the order in which they were first called; one alone shares with none.
        functions: how many functions ``torch.compile`` was given for all of them; 0 if none was compiled.
        apart: names of the attributes that kept these parts from sharing a capture that there was: the
            code asks for them, and they differ.
    """

    parts: tuple[str, ...]
    functions: int = 0
    apart: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.parts[:_SHOWN])
        more = len(self.parts) - _SHOWN
        names = f"{shown} and {more} more" if more > 0 else shown
        count = f"1 part has a capture: {names}"
        if len(self.parts) > 1:
            count = f"{len(self.parts)} parts share a capture: {names}"
        compiled = f"; functions compiled: {self.functions}" if self.functions else ""
        apart = f"; by itself for {', '.join(self.apart)}" if self.apart else ""
        return count + compiled + apart


def shared_captures(runtime: Runtime) -> tuple[SharedCapture, ...]:
    """One row for each capture that was made of a part; none for a model that is one graph."""
    groups: dict[int, list[tuple[str, Capture]]] = {}
    for path, entry in runtime.entries.items():
        for capture in entry.kept.all():
            number = runtime.parts.equal.groups.get(capture)
            if number is not None:
                groups.setdefault(number, []).append((path, capture))
    return tuple(_row(runtime, found) for found in groups.values())


def _row(runtime: Runtime, found: list[tuple[str, Capture]]) -> SharedCapture:
    captures = [capture for _, capture in found]
    bodies = runtime.parts.bodies
    given = [bodies.compiled_for(graph) for capture in captures for graph in _graphs(capture)]
    apart = (runtime.parts.equal.apart.get(capture, frozenset[str]()) for capture in captures)
    return SharedCapture(
        parts=tuple(dict.fromkeys(path for path, _ in found)),
        functions=len({id(graph) for graph in given if graph is not None}),
        apart=tuple(sorted(frozenset[str]().union(*apart))),
    )


def _graphs(capture: Capture) -> Iterator[GraphModule]:
    """Every graph that a call may run."""
    yield capture.graph
    for by_plans in capture.variants.values():
        for variant in by_plans.values():
            found = (variant.graph, variant.served, variant.trained)
            yield from dict.fromkeys(graph for graph in found if graph is not None)
