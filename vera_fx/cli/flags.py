"""Gives a command a flag for every field of a recipe or of limits, so that the two cannot differ."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_type_hints

import typer

from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.recipe_fields import SPECS

Command = Callable[..., None]


def with_recipe_flags(command: Command) -> Command:
    """The command with its own parameters, then those of recipes, which it takes as ``**flags``.

    A flag that is not given is None: what the recipe's file says, or the default, holds.
    """
    defaults = {entry.name: _default(entry) for entry in dataclasses.fields(Recipe)}
    flags = (
        _flag(
            name,
            spec.kind | None,
            None,
            typer.Option(*_names(name, spec.flags, spec.kind), help=spec.text + defaults[name]),
        )
        for name, spec in SPECS.items()
        if spec.kind is not None
    )
    return _with(command, flags)


def with_limit_flags(limits: type[Any]) -> Callable[[Command], Command]:
    """The command with a flag for every field of a dataclass of numbers, which it takes as ``**flags``.

    What a flag says is what the docstring of the class says of the field.
    """
    kinds, texts = get_type_hints(limits), texts_of(limits)
    flags = [
        _flag(
            entry.name,
            kinds[entry.name],
            entry.default,
            typer.Option(
                f"--{_dashed(entry.name)}", help=texts[entry.name], min=0, rich_help_panel="Limits"
            ),
        )
        for entry in dataclasses.fields(limits)
    ]
    return lambda command: _with(command, flags)


def texts_of(documented: type[Any]) -> dict[str, str]:
    """What the docstring of a class says of its attributes, by name, without the full stop."""
    entries = re.findall(r"^    (\w+): (.*)\.$", inspect.getdoc(documented) or "", re.MULTILINE)
    return dict(entries)


def _with(command: Command, flags: Iterable[inspect.Parameter]) -> Command:
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    made: Any = command
    made.__signature__ = signature.replace(parameters=[*own, *flags])
    return made


def _flag(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _names(name: str, given: tuple[str, ...], kind: Any) -> tuple[str, ...]:
    if given:
        return given
    flag = _dashed(name)
    return (f"--{flag}/--no-{flag}",) if kind is bool else (f"--{flag}",)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _default(entry: "dataclasses.Field[Any]") -> str:
    """A word of help on the default, where there is one."""
    value = entry.default
    if value is dataclasses.MISSING or value is None:
        return ""
    word = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
    return f" (default {word})"
