"""Private corners of torch (2.11 to 2.15) around open sizes: fake tensors written down and made again."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo

Symbol = tuple[int, int, int | None]
"""An open size as it was met first, its least and its greatest value; None for no bound."""

_NAMED = {
    name: value
    for name, value in vars(functions).items()
    if isinstance(value, type) and value.__module__ == functions.__name__
}


def is_unbacked(value: Any) -> bool:
    """Whether a size depends on the values of tensors: only the run of a graph tells it."""
    symbols = value.node.expr.free_symbols
    return any(symbol not in _hints(value.node.shape_env) for symbol in symbols)


ENVIRONMENTS = (ShapeEnv, "__init__")
"""What makes the environment of a trace's open sizes."""


def noting_environments(init: Callable[..., None], noted: Callable[[], Any]) -> Callable[..., None]:
    """What to put in the place of `ENVIRONMENTS`, so that `forget_sizes` finds what to end.

    Args:
        init: what stands there.
        noted: gives the list that this thread notes environments in, or None.
    """

    def make(env: ShapeEnv, *args: Any, **kwargs: Any) -> None:
        init(env, *args, **kwargs)
        if (known := noted()) is not None:
            known.append(env)

    return make


def forget_sizes(environments: Iterable[Any]) -> None:
    """Let go of the open sizes of traces that have ended; torch would keep them for good.

    An environment lists the inputs of its trace, whose sizes, in C++, hold the environment: a cycle that
    Python's collector does not see. And caches of its methods hold every environment that was ever
    asked, one of them without a limit; what they hold follows from their arguments and is found again.
    """
    for env in environments:
        if env.tracked_fakes:
            env.tracked_fakes.clear()
    for method in vars(ShapeEnv).values():
        clear = getattr(method, "cache_clear", None)
        if clear is not None:
            clear()


def symbols_of(value: Any) -> dict[str, Symbol]:
    """The symbols in an open size, by name."""
    env = value.node.shape_env
    found: dict[str, Symbol] = {}
    for symbol in value.node.expr.free_symbols:
        span = env.var_to_range[symbol]
        top = None if span.upper in {int_oo, sympy.oo} else int(span.upper)
        found[str(symbol)] = int(_hints(env)[symbol]), int(span.lower), top
    return found


def _hints(env: Any) -> Mapping[Any, Any]:
    known = getattr(env, "backed_var_to_val", None)  # torch 2.12 and later
    return env.var_to_val if known is None else known


@dataclass(slots=True)
class Sizes:
    """Open sizes and fake tensors of a graph that is made again, all of one environment.

    Attributes:
        mode: what makes the fake tensors.
    """

    mode: FakeTensorMode = field(
        default_factory=lambda: FakeTensorMode(
            shape_env=ShapeEnv(), allow_non_fake_inputs=True, export=True
        )
    )
    _symbols: dict[str, Any] = field(default_factory=dict[str, Any])
    _known: dict[str, Any] = field(default_factory=dict[str, Any])

    def open(self, symbols: Mapping[str, Symbol]) -> None:
        """Make the symbols that sizes are written in."""
        env: Any = self.mode.shape_env
        for name, (hint, low, top) in symbols.items():
            symbol = env.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC)
            env.constrain_symbol_range(symbol, low, int_oo if top is None else top)
            self._symbols[name] = symbol

    def size(self, text: str) -> Any:
        """The size that was written as ``text``: a ``SymInt``, ``SymFloat`` or ``SymBool``."""
        if text not in self._known:
            env: Any = self.mode.shape_env
            expression = cast("Any", sympy).sympify(text, locals={**_NAMED, **self._symbols})
            hint = expression.xreplace(
                {s: sympy.Integer(_hints(env)[s]) for s in expression.free_symbols}
            )
            self._known[text] = _node(env, expression, hint)
        return self._known[text]

    def tensor(
        self, shape: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A fake tensor."""
        with self.mode:
            return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)


def _node(env: Any, expression: Any, hint: Any) -> Any:
    if expression.is_Boolean:
        return env.create_symboolnode(expression)
    if expression.is_integer is False or expression.is_Float:
        return env.create_symfloatnode(expression, hint=float(hint))
    return env.create_symintnode(expression, hint=int(hint))


def guards_of(values: Sequence[Tensor]) -> str | None:
    """What must hold of the sizes of a graph's inputs, as an expression of them; None if nothing."""
    symbols = [s for v in values for s in v.shape if isinstance(s, torch.SymInt)]
    return symbols[0].node.shape_env.produce_guards_expression(values) if symbols else None


def guards_hold(guards: str, leaves: Sequence[Tensor]) -> bool:
    """Whether such an expression holds of real inputs."""
    return bool(_environment().evaluate_guards_expression(guards, leaves))


@functools.cache
def _environment() -> ShapeEnv:
    return ShapeEnv()  # the expression says it all: nothing is asked of it
