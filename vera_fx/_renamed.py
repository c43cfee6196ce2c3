"""Arguments under the names that they had before: an adapter's name is ``adapter_name`` everywhere."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let keywords be given by their old names, too, with a DeprecationWarning.

    Args:
        names: the new name of each old one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs:
                warnings.warn(
                    f"{function.__name__}({old}=...) is called {names[old]} now; the old name will go",
                    DeprecationWarning,
                    stacklevel=2,
                )
                if names[old] in kwargs:
                    raise TypeError(
                        f"{function.__name__}() got {names[old]!r} and its old name {old!r} at once"
                    )
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return called

    return decorate
