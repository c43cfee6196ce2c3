"""The body of an upload: what it may say, checked before any of it becomes a file."""

import base64
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from fastapi import HTTPException

import vera_fx

_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_NAME = re.compile(r"[\w\-.]{1,1000}")
_BRACKETS = 1000
"""Lists and objects in a body; a configuration has a dozen. Python takes seconds for a body full of them."""
_FORM = 'the body must be {"config": {...}, "weights": "base64 of a safetensors file"}'


def parts(body: bytes, most: int) -> tuple[dict[str, Any], bytes]:
    """``{"config": {...}, "weights": "base64 of a safetensors file"}``, taken apart.

    Args:
        body: the body.
        most: most names in a list of the configuration.

    Raises:
        HTTPException: it is something else, nests too much, or the configuration holds expressions.
    """
    if body.count(b"[") + body.count(b"{") > _BRACKETS:
        raise HTTPException(422, f"{_FORM}, with at most {_BRACKETS} brackets")
    try:
        values = json.loads(body)
        config, weights = values["config"], base64.b64decode(values["weights"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HTTPException(422, _FORM) from None
    if not isinstance(config, dict):
        raise HTTPException(422, _FORM)
    for field in _LISTS:
        _check_names(field, config.get(field), most)
    return config, weights


def _check_names(field: str, value: Any, most: int) -> None:
    """Refuse expressions: the library bounds what they cost, but nobody here needs them."""
    names = [] if value is None else value
    if not isinstance(names, list) or len(names) > most:
        raise HTTPException(422, f"{field} must be a list of at most {most} names")
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise HTTPException(422, f"{field} must be a list of names, without expressions")


def add(store: vera_fx.AdapterStore, name: str, config: dict[str, Any], weights: bytes) -> None:
    """Write the files and have the store check and take them.

    Raises:
        VeraFxError: the name or the files cannot be used.
        OSError: there is no room to write them.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        Path(folder, "adapter_model.safetensors").write_bytes(weights)
        store.add(name, folder)
