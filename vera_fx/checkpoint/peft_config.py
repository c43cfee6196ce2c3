"""``adapter_config.json`` in PEFT's form: exactly PEFT 0.21.2's keys, read and written."""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import nn

from vera_fx.bank.adapter import Adapter
from vera_fx.base.hf import base_model_name
from vera_fx.base.modules import base_modules
from vera_fx.branches.kinds import kind_called, known_types
from vera_fx.config import AdapterConfig
from vera_fx.errors import CheckpointError, ConfigError, listing, nearest
from vera_fx.products.kinds import is_flipped

CONFIG_FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"
"""The PEFT release whose files these are; newer files may have keys that are unknown here."""

_BASE, _REVISION = "base_model_name_or_path", "revision"
_PEFTS = frozenset(
    {
        _BASE,
        _REVISION,
        "auto_mapping",
        "inference_mode",
        "peft_type",
        "peft_version",
    }
)
_MAX_BYTES = 1 << 20


def to_json(model: nn.Module, adapter: Adapter) -> str:
    """The text of an adapter's ``adapter_config.json``."""
    config = adapter.config
    values: dict[str, Any] = {n: _plain(getattr(config, n)) for n in _fields(type(config))}
    values["modules_to_save"] = list(config.saved_modules) or None
    # PEFT flips the flag at every target of the other kind; what it writes is that of the last one.
    *_, last = adapter.vectors.by_path
    values["fan_in_fan_out"] = is_flipped(model, last)
    if config.is_all_linear or config.exclude_modules:
        # PEFT knows no exclude_modules, so the choice is written out as full paths.
        values["target_modules"] = exact_targets(model, adapter.vectors.by_path)
        values["layers_to_transform"] = values["layers_pattern"] = None
    values.update(
        auto_mapping=auto_mapping(model, config),
        base_model_name_or_path=base_model_name(model) or adapter.origin.get(_BASE),
        inference_mode=True,
        peft_type=adapter.kind.peft_type,
        peft_version=PEFT_VERSION,
        revision=adapter.origin.get(_REVISION),
    )
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def exact_targets(model: nn.Module, paths: Iterable[str]) -> list[str] | str:
    """The targets as full paths; as an expression where those are the ends of other paths."""
    # PEFT matches the entries of a list with the ends of paths, too.
    found = sorted(paths)
    ends = tuple(f".{path}" for path in found)
    if any(path.endswith(ends) and path not in found for path in base_modules(model)):
        return "|".join(re.escape(path) for path in found)
    return found


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value


def auto_mapping(model: nn.Module, config: AdapterConfig) -> dict[str, str] | None:
    """What PEFT notes of a model that no task type describes."""
    if config.task_type is not None:
        return None
    kind = type(model)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def read_json(directory: Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: the file is missing, damaged, not VeRA's, or has keys or values that
            mean nothing here.
    """
    path = directory / CONFIG_FILE
    values = _parse(path)
    kind = kind_called(values.get("peft_type"))
    if kind is None:
        raise CheckpointError(
            f"{path} is for peft_type={values.get('peft_type')!r}; vera_fx loads {known_types()} "
            "adapters only"
        )
    names = _fields(kind.config)
    _check_keys(path, values, names)
    given = {name: values[name] for name in names if name in values}
    try:
        return kind.config(**given)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_origin(directory: Path) -> dict[str, str]:
    """What ``adapter_config.json`` says of the base model: its name and revision, if it does.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    values = _parse(directory / CONFIG_FILE)
    return {key: text for key in (_BASE, _REVISION) if isinstance(text := values.get(key), str)}


def _parse(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        there = (
            listing(sorted(p.name for p in path.parent.iterdir()))
            if path.parent.is_dir()
            else "no folder"
        )
        raise CheckpointError(f"there is no {path.name} in {path.parent} (found: {there})")
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(
            f"{path} is larger than {_MAX_BYTES} bytes, so it is no adapter configuration"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__} where an object was expected"
        )
    return values


def _fields(config: type[AdapterConfig]) -> frozenset[str]:
    """The fields that PEFT knows as well."""
    names = (field.name for field in fields(cast("Any", config)))
    return frozenset(names) - {"exclude_modules", "plan"}


def _check_keys(path: Path, values: Mapping[str, Any], names: frozenset[str]) -> None:
    known = names | _PEFTS
    unknown = sorted(set(values) - known)
    if not unknown:
        return
    hints = "".join(f"\n  {name!r}{nearest(name, known) or ' is unknown'}" for name in unknown)
    if _is_newer(str(values.get("peft_version") or "")):
        warnings.warn(f"{path} was written by a newer PEFT; ignoring keys:{hints}", stacklevel=4)
        return
    raise CheckpointError(f"{path} has keys that VeRA configurations do not have:{hints}")


def _is_newer(version: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:3] if part.isdecimal()]

    return parts(version) > parts(PEFT_VERSION)
