"""The manifest of a program: what it says, by type and range."""

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from vera_fx.branches.kinds import KINDS
from vera_fx.config import SEEDS
from vera_fx.disk.safetensors_file import unique
from vera_fx.errors import ExportError, listing, shown

FORMS = ("merged", "constant", "input", "rows")
DTYPES = ("float64", "float32", "float16", "bfloat16")

_LARGEST = 2**40
_HASH = re.compile("[0-9a-f]{64}")

Check = Callable[[Any, str], None]


def read_manifest(text: str | bytes, where: object) -> dict[str, Any]:
    """The manifest in a text; empty for a program that vera_fx has not made.

    Raises:
        ExportError: it is not of a form that is known here.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return checked_manifest(json.loads(text or "{}", object_pairs_hook=unique))
    except (ValueError, RecursionError) as error:
        raise ExportError(
            f"the manifest of {where} is not of a form that is known here: {error}"
        ) from error


def checked_manifest(values: Any) -> dict[str, Any]:
    """The manifest, if it is one.

    Raises:
        ValueError: with the field.
    """
    if values != {}:
        _MANIFEST(values, "it")
    return values


def _refuse(value: Any, where: str, what: str) -> None:
    raise ValueError(f"{where} is {shown(value)}, not {what}")


def _number(value: Any, where: str, *, least: int = 0, largest: int = _LARGEST) -> None:
    if type(value) is not int or not least <= value <= largest:
        _refuse(value, where, f"a whole number from {least} to {largest}")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        _refuse(value, where, "a text")


def _flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _refuse(value, where, "true or false")


def _hash(value: Any, where: str) -> None:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        _refuse(value, where, "a SHA-256")


def _one_of(*known: str) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in known:
            _refuse(value, where, f"one of {listing(known)}")

    return check


def _or_null(inner: Check) -> Check:
    return lambda value, where: None if value is None else inner(value, where)


def _list(inner: Check, most: int = 1_000_000) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > most:
            _refuse(value, where, f"a list of at most {most:,}")
        for entry in value:
            inner(entry, f"an entry of {where}")

    return check


def _table(inner: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        for key, entry in value.items():
            inner(entry, f"{where}[{shown(key)}]")

    return check


def _object(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    known = {**needed, **(optional or {})}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "an object")
        missing, unknown = needed.keys() - value.keys(), value.keys() - known.keys()
        if missing or unknown:
            raise ValueError(
                f"{where} lacks {listing(sorted(missing))} and has {listing(sorted(unknown))} beside"
            )
        for key, entry in value.items():
            known[key](entry, key)

    return check


_KIND = _one_of(*(kind.name for kind in KINDS))
_TENSOR = _object({"shape": _list(_number, 8), "dtype": _one_of(*DTYPES), "sha256": _hash})
_TARGET = _object(
    {
        "path": _text,
        "in_features": partial(_number, least=1),
        "out_features": partial(_number, least=1),
        "layout": _one_of("out_in", "in_out"),
        "weights": _list(_text),
        "aliases": _list(_text),
    }
)
_PROJECTIONS = _object(
    {
        "sha256": _hash,
        "seed": _or_null(partial(_number, least=SEEDS[0], largest=SEEDS[-1])),
        "r": partial(_number, least=1),
        "through": _list(_one_of(*DTYPES), len(DTYPES)),
        "tensors": _table(_TENSOR),
        "left_out": _flag,
    },
    {"kind": _KIND, "max_in": partial(_number, least=1), "max_out": partial(_number, least=1)},
)
_MANIFEST = _object(
    {
        "form": _one_of(*FORMS),
        "adapter": _text,
        "targets": _list(_TARGET),
        "vectors": _table(_object({"shape": _list(_number, 8), "name": _or_null(_text)})),
        "projections": _PROJECTIONS,
    },
    {"kind": _KIND},
)
