"""Tells the user when a model is captured over and over, which costs about a second each time."""

import warnings
from collections.abc import Hashable, Sequence

_EVERY = 12


def advise(
    model_name: str, count: int, newest: Sequence[Hashable], before: Sequence[Hashable] | None
) -> None:
    """Warn at every twelfth capture of one model.

    Args:
        model_name: for the message.
        count: how many captures there are.
        newest: the signature of the newest capture, flat.
        before: the one before it.
    """
    if count % _EVERY or before is None:
        return
    changes = [
        f"{old!r} -> {new!r}" for old, new in zip(before, newest, strict=False) if old != new
    ]
    shown = ", ".join(changes[:4]) or "the state of the model"
    warnings.warn(
        f"{count} graphs of {model_name} have been captured, each for another signature of its calls. "
        f"The last two differ in: {shown}. A number that changes from call to call costs a capture each "
        "time; pass it as a tensor.",
        stacklevel=2,
    )
