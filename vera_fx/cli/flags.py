"""Gives a command a flag for every field of a recipe, so that the two cannot differ."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vera_fx.recipes.recipe import Recipe
from vera_fx.recipes.recipe_fields import SPECS


def with_recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its own parameters, then those of recipes, which it takes as ``**flags``.

    A flag that is not given is None: what the recipe's file says, or the default, holds.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    defaults = {entry.name: _default(entry) for entry in dataclasses.fields(Recipe)}
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                spec.kind | None,
                typer.Option(*_names(name, spec.flags, spec.kind), help=spec.text + defaults[name]),
            ],
        )
        for name, spec in SPECS.items()
        if spec.kind is not None
    ]
    made: Any = command
    made.__signature__ = signature.replace(parameters=[*own, *flags])
    return made


def _names(name: str, given: tuple[str, ...], kind: Any) -> tuple[str, ...]:
    if given:
        return given
    flag = name.replace("_", "-")
    return (f"--{flag}/--no-{flag}",) if kind is bool else (f"--{flag}",)


def _default(entry: "dataclasses.Field[Any]") -> str:
    """A word of help on the default, where there is one."""
    value = entry.default
    if value is dataclasses.MISSING or value is None:
        return ""
    word = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
    return f" (default {word})"
