"""What a runtime keeps: captured graphs by signature, the graph of every exact call, and refusals."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torch.fx import GraphModule

from vera_fx.capturing.budget import Opening
from vera_fx.capturing.export_call import Capture
from vera_fx.errors import TargetError

CALLS = 4096
GRAPHS = 256
Signature = tuple[Any, ...]


@dataclass(slots=True)
class Ready:
    """A graph that fits one exact call, with what it takes to rebuild the call's result.

    Attributes:
        graph: the adapted graph.
        capture: what it was made from.
        refused: what a graph for mixtures does without, and why.
    """

    graph: GraphModule
    capture: Capture
    refused: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(slots=True)
class Kept:
    """Bounded: beyond the limits goes what was not used for longest.

    Attributes:
        captures: the captures of each signature, newest last.
        made: how many captures there have been.
        calls: limit on exact calls.
        graphs: limit on captures, each with all graphs made from it.
    """

    captures: dict[Signature, list[Capture]] = field(default_factory=dict[Signature, list[Capture]])
    made: int = 0
    calls: int = CALLS
    graphs: int = GRAPHS
    _known: dict[Hashable, Ready | None] = field(default_factory=dict[Hashable, Ready | None])
    _refusals: dict[Hashable, str] = field(default_factory=dict[Hashable, str])
    _openings: dict[Hashable, Opening] = field(default_factory=dict[Hashable, Opening])
    _clock: int = 0

    def all(self) -> Iterator[Capture]:
        """Every capture."""
        for found in list(self.captures.values()):
            yield from found

    def known(self) -> int:
        """How many exact calls have a graph, or run in Python."""
        return len(self._known)

    def get(self, call: Hashable, unknown: Any) -> Any:
        """What an exact call runs: a graph, None for Python, or ``unknown``."""
        found = self._known.get(call, unknown)
        if isinstance(found, Ready):
            self._clock += 1
            found.capture.used = self._clock
        return found

    def opening(self, structure: Hashable) -> Opening:
        """Which sizes to leave open in calls of a structure."""
        return self._openings.get(structure, Opening.ALL)

    def put(self, call: Hashable, ready: Ready | None) -> None:
        """Note what an exact call runs."""
        if len(self._known) >= self.calls:
            self._known.clear()
        self._known[call] = ready

    def add(self, signature: Signature, capture: Capture) -> None:
        """Keep a capture."""
        self.captures.setdefault(signature, []).append(capture)
        self.made += 1
        self._clock += 1
        capture.used = self._clock
        if capture.opening is not Opening.ALL:
            if len(self._openings) >= self.calls:
                self._openings.clear()
            self._openings[signature[0]] = capture.opening
        kept = [(c.used, key, c) for key, found in self.captures.items() for c in found]
        if len(kept) > self.graphs:
            self._drop(*min(kept, key=itemgetter(0))[1:])

    def _drop(self, signature: Signature, capture: Capture) -> None:
        self.captures[signature].remove(capture)
        if not self.captures[signature]:
            del self.captures[signature]
        known = list(self._known.items())
        for call in [call for call, ready in known if ready and ready.capture is capture]:
            self._known.pop(call, None)

    def refuse(self, call: Hashable, error: TargetError) -> None:
        """Remember that a call cannot be adapted, so that it is not captured again to find out."""
        if len(self._refusals) >= self.calls:
            self._refusals.clear()
        self._refusals[call] = str(error)

    def check(self, call: Hashable) -> None:
        """Refuse a call that was refused before.

        Raises:
            TargetError: as then.
        """
        if call in self._refusals:
            raise TargetError(self._refusals[call])
