"""Checks of a recipe's values by type and range; each gives the value as the recipe keeps it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vera_fx.config import check_choice, check_finite, check_flag, is_int
from vera_fx.errors import ConfigError, shown

Check = Callable[[str, Any], Any]
"""Takes a field's name and a value; raises ConfigError for one that cannot be used."""


def maybe(check: Check) -> Check:
    """None, or what another check takes."""
    return lambda name, value: None if value is None else check(name, value)


def whole(least: int) -> Check:
    """Whole numbers from ``least`` on."""

    def check(name: str, value: Any) -> int:
        if not is_int(value) or value < least:
            raise ConfigError(
                f"{name} must be a whole number of at least {least}, got {shown(value)}"
            )
        return int(value)

    return check


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Check:
    """Real numbers from ``least`` (``above``: without it) to ``most``."""

    def check(name: str, value: Any) -> float:
        value = _as_number(value)
        check_finite(name, value)
        if not least <= value <= most or (above and value == least):
            limit = f" and at most {most:g}" if most < float("inf") else ""
            start = f"above {least:g}" if above else f"at least {least:g}"
            raise ConfigError(f"{name} must be {start}{limit}, got {shown(value)}")
        return float(value)

    return check


def _as_number(value: Any) -> Any:
    """YAML reads ``1e-2``, without a dot, as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def one_of(*choices: str) -> Check:
    """One of some words."""

    def check(name: str, value: Any) -> str:
        check_choice(name, value, choices)
        return value

    return check


def flag(name: str, value: Any) -> bool:
    """True or False."""
    check_flag(name, value)
    return value


def path(name: str, value: Any) -> Path:
    """A path, made absolute."""
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigError(f"{name} must be a path, got {shown(value)}")
    return Path(value).expanduser().absolute()


def names(name: str, value: Any) -> tuple[str, ...] | str:
    """A list of words, or one text; configurations of adapters tell them apart.

    A flag can only make lists: ``all-linear`` by itself is the text.
    """
    if isinstance(value, str):
        return value
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(v, str) for v in value)
    ):
        raise ConfigError(f"{name} must be a text or a list of texts, got {shown(value)}")
    return "all-linear" if tuple(value) == ("all-linear",) else tuple(value)


def texts_by_text(name: str, value: Any) -> dict[str, str]:
    """Texts under texts, as a mapping or as a list of ``key=value``."""
    if isinstance(value, list | tuple):
        pairs = [str(entry).partition("=") for entry in value]
        wrong = [f"{key}{sign}{text}" for key, sign, text in pairs if not (key and text)]
        if wrong:
            raise ConfigError(f"{name} must be given as name=column, got {shown(wrong[0])}")
        value = {key: text for key, _, text in pairs}
    if not isinstance(value, Mapping) or not all(
        isinstance(word, str) for pair in value.items() for word in pair
    ):
        raise ConfigError(f"{name} must name a column for a name, got {shown(value)}")
    return dict(value)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Anything under texts."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must be a mapping, got {shown(value)}")
    return dict(value)
