"""A program's graph as torch writes it to JSON: every string in it is one that runs no code.

Each string is judged by the field it stands in, whatever surrounds it. A field that is not known here
may hold numbers only.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from vera_fx.disk.operators import check_operator
from vera_fx.disk.safetensors_file import unique
from vera_fx.disk.sizes_and_names import check_guard, check_name, check_path, check_size, check_tree
from vera_fx.errors import shown

_WORDS = re.compile(r"[\w.+:<>=\- ]{0,200}")
_METADATA = frozenset(
    ("stack_trace", "nn_module_stack", "torch_fn", "from_node", "custom", "source_fn_stack")
)


def check_model(text: bytes, namespaces: Collection[str]) -> None:
    """Refuse a graph that would run anything but operators on tensors.

    Args:
        text: the JSON.
        namespaces: of operators that the program may call beside torch's own.

    Raises:
        ValueError: with the field and what stands in it.
    """
    values = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(values, dict) or "graph_module" not in values:
        raise ValueError("models/model.json is no program")
    operator = partial(check_operator, namespaces=namespaces)
    _check("", values, {**_FIELDS, "target": operator, "as_operator": operator})


def _check(field: str, value: Any, fields: dict[str, Callable[[Any], None]]) -> None:
    """Every string below ``value``, which stands in ``field``."""
    if isinstance(value, str):
        if field not in fields:
            raise ValueError(
                f"the field {shown(field)} holds {shown(value)}, and is not known here"
            )
        fields[field](value)
    elif isinstance(value, list):
        _check_list(field, value, fields)
    elif isinstance(value, dict) and field == "metadata":
        _check_metadata(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key in _REFUSED and entry not in (None, {}):
                raise ValueError(
                    f"it holds objects of its own ({key}), which only a pickle brings back"
                )
            if field in _NAMED:
                check_name(key)
            _check(key if field not in _NAMED else f"{field}.", entry, fields)


def _check_list(field: str, values: list[Any], fields: dict[str, Callable[[Any], None]]) -> None:
    for entry in values:
        _check(field, entry, fields)
    if field == "forward_arg_names":
        _check_different(values)


def _check_different(names: list[Any]) -> None:
    """Refuse arguments of one name, as Python sees names: torch writes a function that has them."""
    seen = {"self", *(unicodedata.normalize("NFKC", str(name)) for name in names)}
    if len(seen) <= len(names):
        raise ValueError(f"the arguments {shown(names)} are not called differently")


def _check_metadata(values: dict[str, Any]) -> None:
    for key, text in values.items():
        if key not in _METADATA or not isinstance(text, str):
            raise ValueError(f"the metadata {shown(key)} is not known here")
    # Names of functions that are looked up in torch, and not called.
    if not re.fullmatch(r"[\w.,;\-]*", values.get("source_fn_stack", "")):
        raise ValueError(f"the metadata source_fn_stack is {shown(values['source_fn_stack'])}")


def _check_word(text: str) -> None:
    if not _WORDS.fullmatch(text) or "__" in text:
        raise ValueError(f"{shown(text)} is no plain word")


def _check_argument(text: str) -> None:
    if text:  # some have none
        check_name(text)


def _anything(text: str) -> None:
    """Written into graphs by ``repr``."""


_FIELDS: dict[str, Callable[[Any], None]] = {
    **dict.fromkeys(("name", "as_name"), _check_argument),
    **dict.fromkeys(
        ("buffer_name", "parameter_name", "tensor_constant_name", "user_input_name", "fqn"),
        check_path,
    ),
    **dict.fromkeys(("as_string", "as_strings"), _anything),
    **dict.fromkeys(("type", "verifiers", "torch_version", "field_names"), _check_word),
    "forward_arg_names": partial(check_name, argument=True),
    "expr_str": check_size,
    "guards_code": check_guard,
    "in_spec": partial(check_tree, arguments=True),
    "out_spec": check_tree,
}
_NAMED = frozenset(
    (
        "tensor_values",
        "sym_int_values",
        "sym_float_values",
        "sym_bool_values",
        "range_constraints",
        "as_string_to_argument",
    )
)
"""Fields whose keys are names."""

_REFUSED = frozenset(("as_custom_obj", "custom_obj", "custom_obj_values"))
