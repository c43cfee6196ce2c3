"""Counts what the collectives of a process carry."""

import math
from collections import Counter
from typing import Any

from torch.profiler import ProfilerActivity, profile

_GLOO = "gloo:"


class Traffic:
    """Inside the ``with`` block, gloo's collectives of this process are counted.

    Attributes:
        numbers: how many elements each kind of collective had as input.
    """

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()

    def __enter__(self) -> "Traffic":
        self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        for event in self._profile.events() or ():
            if event.name.startswith(_GLOO):
                sizes = map(math.prod, event.input_shapes)
                self.numbers[event.name.removeprefix(_GLOO)] += sum(sizes)
