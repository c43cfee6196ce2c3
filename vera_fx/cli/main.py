"""``vera-fx``: one command a function; errors of the library are a line on stderr, never a traceback."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from vera_fx.errors import VeraFxError, first_line

P = ParamSpec("P")
R = TypeVar("R")


def _missing(library: str) -> NoReturn:
    sys.stderr.write(
        f"error: the command line needs {library}, which is not installed; pip install 'vera-fx[cli]'\n"
    )
    raise SystemExit(2)


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Let errors that a user can do something about end the command with status 1 and a line."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (VeraFxError, OSError, ValueError) as error:
            text = str(error) if isinstance(error, VeraFxError) else first_line(error)
            sys.stderr.write(f"error: {text}\n")
            raise SystemExit(1) from None

    return run


def main() -> None:
    """The entry point of the package."""
    for library in ("typer", "rich", "transformers"):
        if importlib.util.find_spec(library) is None:
            _missing(library)
    from vera_fx.cli.app import app

    app()
