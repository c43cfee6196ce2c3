"""Results of a captured call in containers that every Python knows."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from vera_fx._torch import TreeSpec


def plain_result(outputs: Sequence[Any], spec: TreeSpec) -> Any:
    """Rebuild a result from flat outputs with dicts, lists and tuples only.

    A mapping (Hugging Face's ``ModelOutput`` is one) becomes a dict, a list stays a list, and any
    other container becomes the tuple of its parts: a reader needs neither the model's library nor
    this one.

    Args:
        outputs: flat outputs of a captured graph.
        spec: their tree, as `Capture.out_spec` has it: the result, and objects changed in place.
    """
    return _build(spec.children()[0], iter(outputs))


def _build(spec: TreeSpec, leaves: Iterator[Any]) -> Any:
    if spec.is_leaf():
        return next(leaves)
    parts = [_build(child, leaves) for child in spec.children()]
    if issubclass(spec.type, dict):
        keys = spec.context[1] if spec.type is defaultdict else spec.context
        return dict(zip(keys, parts, strict=True))
    return parts if spec.type is list else tuple(parts)
