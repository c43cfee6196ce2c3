"""What nodes of a graph hold, written down and made again: fake tensors and open sizes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vera_fx._torch_sizes import Sizes, Symbol, is_unbacked, symbols_of
from vera_fx.caching.content import Unreadable
from vera_fx.disk.sizes_and_names import check_size

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (bool, int, float, str, type(None))


class ValueWriter:
    """Writes values; collects the symbols in them.

    Attributes:
        symbols: what open sizes are written in.
    """

    def __init__(self) -> None:
        self.symbols: dict[str, Symbol] = {}

    def write(self, value: Any) -> Any:
        """A value as plain containers.

        Raises:
            Unreadable: it depends on values of tensors, or is of a kind that is not known here.
        """
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, _SYMBOLIC):
            return self._size(value)
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [self.write(part) for part in value]}
        if isinstance(value, Tensor):
            return self._tensor(value)
        raise Unreadable(f"a node that holds a {type(value).__name__}")

    def _size(self, value: Any) -> Any:
        if is_unbacked(value):
            raise Unreadable("sizes that depend on the values of tensors")
        self.symbols |= symbols_of(value)
        text = str(value.node.expr)
        try:
            check_size(text)
        except ValueError as error:
            raise Unreadable(f"the size {text}") from error
        return {"size": text}

    def _tensor(self, value: Tensor) -> Any:
        if value.layout != torch.strided or value.is_quantized:
            raise Unreadable(f"a node that holds a tensor of layout {value.layout}")
        return {
            "shape": [self.write(size) for size in value.shape],
            "stride": [self.write(step) for step in value.stride()],
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": str(value.device),
        }


class ValueReader:
    """Makes values of one graph again."""

    def __init__(self, symbols: dict[str, Any]) -> None:
        """Args: the symbols as they were written.

        Raises:
            ValueError: they are none.
        """
        self._sizes = Sizes()
        for name, numbers in symbols.items():
            check_size(name)
            if not name.isidentifier() or not all(n is None or type(n) is int for n in numbers):
                raise ValueError(f"{name!r} is no open size")
        self._sizes.open({name: (n[0], n[1], n[2]) for name, n in symbols.items()})

    def read(self, written: Any) -> Any:
        """The value that was written.

        Raises:
            ValueError: it was not written by `ValueWriter`.
        """
        if isinstance(written, _PLAIN):
            return written
        if not isinstance(written, dict):
            raise ValueError(f"{written!r} is no value")  # noqa: TRY004
        if "shape" in written:
            return self._tensor(written)
        (kind, value), *_ = written.items()
        if kind not in _READ:
            raise ValueError(f"{kind!r} is no kind of value")
        return _READ[kind](self, value)

    def _tensor(self, written: dict[str, Any]) -> Tensor:
        shape, stride = map(self.read, written["shape"]), map(self.read, written["stride"])
        dtype = dtype_called(written["dtype"])
        return self._sizes.tensor([*shape], [*stride], dtype, torch.device(written["device"]))

    def _size(self, text: str) -> Any:
        check_size(text)
        return self._sizes.size(text)


_READ: dict[str, Callable[[ValueReader, Any], Any]] = {
    "size": ValueReader._size,
    "list": lambda reader, value: [reader.read(part) for part in value],
    "tuple": lambda reader, value: tuple(reader.read(part) for part in value),
}


def dtype_called(name: str) -> torch.dtype:
    """A dtype by its name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")  # noqa: TRY004
    return found
