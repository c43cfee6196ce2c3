"""``adapter_config.json`` in PEFT's form: exactly PEFT 0.21.2's keys, read and written."""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, cast

from torch import nn

from vera_fx.bank.adapter import Adapter
from vera_fx.base.hf import base_model_name
from vera_fx.base.modules import base_modules
from vera_fx.branches.kinds import kind_called, known_types
from vera_fx.config import AdapterConfig
from vera_fx.disk.safetensors_file import unique
from vera_fx.errors import CheckpointError, ConfigError, nearest, shown
from vera_fx.expressions import FileText
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
MAX_BYTES = 16 << 20
"""Of a configuration; one that lists every expert of a large model has some megabytes."""

_EXPRESSIONS = ("target_modules", "layers_pattern", "exclude_modules")
_MOST = {
    "target_modules": 200_000,
    "layers_to_transform": 100_000,
    "modules_to_save": 256,
    "layers_pattern": 64,
}
_MAX_NAME = 4_000
_HINTS = 8


def to_json(model: nn.Module, adapter: Adapter, config: AdapterConfig) -> str:
    """The text of an adapter's ``adapter_config.json``.

    Args:
        model: the adapted model.
        adapter: the adapter.
        config: its configuration, as it is to be written.
    """
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
        base_model_name_or_path=base_model_name(model)
        or adapter.origin.get(_BASE)
        or config.base_model_name_or_path,
        inference_mode=True,
        peft_type=adapter.kind.peft_type,
        peft_version=PEFT_VERSION,
        revision=adapter.origin.get(_REVISION) or config.revision,
    )
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def config_json(config: AdapterConfig) -> str:
    """The text of the ``adapter_config.json`` of no adapter: what the configuration says alone.

    Raises:
        ConfigError: it has ``exclude_modules``.
    """
    if config.exclude_modules:
        raise ConfigError(
            f"exclude_modules={shown(config.exclude_modules)} has no place in PEFT's files; save an adapter "
            "(vera_fx.save_adapter), whose file lists the targets that a model has"
        )
    values: dict[str, Any] = {n: _plain(getattr(config, n)) for n in _fields(type(config))}
    values.update(
        auto_mapping=config.auto_mapping,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=config.inference_mode,
        peft_type=config.peft_type,
        peft_version=PEFT_VERSION,
        revision=config.revision,
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


def config_of(values: Mapping[str, Any], where: str) -> AdapterConfig:
    """The configuration that a file describes.

    Args:
        values: the object in it.
        where: which file, for messages.

    Raises:
        CheckpointError: it is of no known kind, or has keys or values that mean nothing here.
    """
    kind = kind_called(values.get("peft_type"))
    if kind is None:
        raise CheckpointError(
            f"{where} is for peft_type={shown(values.get('peft_type'))}; vera_fx loads "
            f"{known_types()} adapters only"
        )
    names = _fields(kind.config)
    _check_keys(where, values, names)
    for name, most in _MOST.items():
        _check_list(where, name, values.get(name), most)
    given = {name: _from_file(name, values[name]) for name in names if name in values}
    try:
        return kind.config(**given)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def origin_of(values: Mapping[str, Any]) -> dict[str, str]:
    """What a file says of the base model: its name and revision, if it does."""
    return {key: text for key in (_BASE, _REVISION) if isinstance(text := values.get(key), str)}


def differences(values: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The fields of the configuration that two files do not agree on; what they say of the base is none."""
    known = {*values, *others} - _PEFTS
    return sorted(name for name in known if values.get(name) != others.get(name))


def _check_list(where: str, name: str, value: Any, most: int) -> None:
    if not isinstance(value, list):
        return
    wrong = [v for v in value if v == "" or (isinstance(v, str) and len(v) > _MAX_NAME)]
    if len(value) > most or wrong:
        reason = f"the entry {shown(wrong[0])}" if wrong else f"{len(value):,} entries"
        raise CheckpointError(
            f"{where}: {name} has {reason}; a file may have {most:,} there, of 1 to {_MAX_NAME:,} "
            "characters"
        )


def _from_file(name: str, value: Any) -> Any:
    """Expressions are marked as a file's, which Python's matcher shall not see."""
    if name not in _EXPRESSIONS:
        return value
    if isinstance(value, list):
        return [FileText(v) if isinstance(v, str) else v for v in value]
    return FileText(value) if isinstance(value, str) else value


def parse_config(text: bytes | str, where: str) -> Mapping[str, Any]:
    """The object in the text of an ``adapter_config.json``.

    Raises:
        CheckpointError: the text is no JSON, or no object.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{where} holds a {type(values).__name__} where an object was expected"
        )
    return values


def _fields(config: type[AdapterConfig]) -> frozenset[str]:
    """The fields that PEFT knows as well."""
    names = (field.name for field in fields(cast("Any", config)))
    return frozenset(names) - _PEFTS - {"exclude_modules", "plan"}


def _check_keys(where: str, values: Mapping[str, Any], names: frozenset[str]) -> None:
    known = names | _PEFTS
    unknown = sorted(set(values) - known)
    if not unknown:
        return
    some = unknown[:_HINTS]
    hints = "".join(f"\n  {shown(name)}{nearest(name, known) or ' is unknown'}" for name in some)
    if _is_newer(str(values.get("peft_version") or "")):
        warnings.warn(f"{where} was written by a newer PEFT; ignoring keys:{hints}", stacklevel=5)
        return
    raise CheckpointError(f"{where} has keys that VeRA configurations do not have:{hints}")


def _is_newer(version: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int(part[:9]) for part in text.split(".")[:3] if part.isdecimal()]

    return parts(version[:99]) > parts(PEFT_VERSION)
