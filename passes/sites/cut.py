"""Targets whose product is cut over processes, as tensor parallelism does it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a target's input and output this process has, seen from outside of its module.

    Attributes:
        group: name of the group of processes.
        of: ``"out"`` if it has the whole input and some columns of the output; ``"in"`` if it has some
            columns of the input and the whole output; nothing if it has all of both.
        start: the first of these columns.
        size: how many they are.
    """

    group: str
    of: str = ""
    start: int = 0
    size: int = 0
