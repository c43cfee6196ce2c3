"""Keeps modules adapted where they are called outside of the model's own forward.

``model.encoder(...)``, ``model.get_encoder()`` in ``generate``, a feature extractor that calls one
layer: such calls never reach the model's forward, so no graph serves them. Hooks compute there
eagerly what the graph would. Graphs do not call modules, so inside of them no hook ever runs.
"""

import warnings
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from vera_fx._context import current_run, enter, holding, is_capturing, leave, now
from vera_fx.bank.adapter import Adapter, TrainedBias
from vera_fx.base.sharding import is_distributed, local_part
from vera_fx.branches.protocol import EagerCall
from vera_fx.errors import AdapterError, PartialCaptureWarning
from vera_fx.products.kinds import cut_of, known_kind

if TYPE_CHECKING:
    from vera_fx.bank.bank import AdapterBank


class EagerHook:
    """Forward hook of one module of the base model, serving one bank."""

    def __init__(self, bank: "AdapterBank", path: str) -> None:
        self.bank = bank
        self.path = path

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The adapted output, or None (leave it) while capturing or with nothing to add."""
        leave(self.path)
        if is_capturing() or not self.bank.computing():
            return None
        if getattr(now("names"), "bank", None) is self.bank:
            raise AdapterError(
                f"{self.path!r} was called outside of the model's own forward in a batch that mixes "
                "adapters; only calls of the model itself can mix them"
            )
        self._tell_if_replaced()
        with holding("unwatched", value=True):
            return self.adapted(module, args, kwargs, output)

    def _tell_if_replaced(self) -> None:
        """Warn once where calls of the model reach no graph: their forward was put on its object."""
        owner: Any = self.bank.__dict__.get("owner", lambda: None)()
        if owner is None or "forward" not in owner.__dict__ or current_run() is not None:
            return
        del self.bank.__dict__["owner"]
        warnings.warn(
            f"{self.path!r} runs in Python, as PEFT's would, and not in a graph: something has put another "
            f"forward on this {type(owner).__name__}, and it calls modules in it past the forward of its "
            "class. Results are right; call the model before it is wrapped so to have the speed",
            PartialCaptureWarning,
            stacklevel=3,
        )

    def adapted(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """What the module would return inside an adapted graph."""
        raise NotImplementedError


class Entering(EagerHook):
    """Forward pre-hook of an adapted module: notes that its own forward begins."""

    def __call__(self, _module: nn.Module, _args: Any, _kwargs: Any) -> None:  # type: ignore[override]
        """Note it; the hooks that adapt the module note the end."""
        enter(self.path)


class EagerBranch(EagerHook):
    """On a target: adds the computing adapters' branches to the output."""

    def adapted(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """``output`` plus every branch, in the dtype of ``output``."""
        x, total = self._input(module, args[0] if args else kwargs["input"]), output
        for name in self.bank.computing():
            adapter = self.bank.adapter(name)
            vectors = adapter.vectors_at(self.path)
            if vectors is not None:
                dtype = next(vectors.parameters()).dtype
                shared = self.bank.projections_of(adapter).tensors
                tensors = {n: t.to(dtype) for n, t in shared.items()} | vectors.tensors
                call = self._call(module, adapter, x, total, output)
                total = adapter.kind.maths.add(call, tensors)
        return total.to(output.dtype)

    def _input(self, module: nn.Module, x: Tensor) -> Tensor:
        """What this process has of the input; hooks of tensor parallelism made a ``DTensor`` of it."""
        if not is_distributed(x):
            return x
        cut = cut_of(module)
        if cut is not None and not cut.of:
            from torch.distributed.tensor import Replicate

            x = x.redistribute(placements=[Replicate()])  # type: ignore[operator]
        return local_part(x)

    def _call(
        self, module: nn.Module, adapter: Adapter, x: Tensor, total: Tensor, base: Tensor
    ) -> EagerCall:
        def weight() -> Tensor:
            kind = known_kind(module)
            if kind is None:
                raise AdapterError(f"{self.path!r} is no linear module any more")
            return kind.weight(module)

        def drop(value: Tensor) -> Tensor:
            if drops and cut_of(module) is not None:
                raise AdapterError(
                    f"{self.path!r} is under tensor parallelism, where processes would drop other elements "
                    "than each other; call model.eval(), or use an adapter without dropout"
                )
            return F.dropout(value, adapter.config.dropout, module.training)

        drops = module.training and adapter.config.dropout > 0
        bias = getattr(module, "bias", None)
        return EagerCall(x, total, base, bias, weight, drop, drops, cut_of(module))


class EagerCopy(EagerHook):
    """On a module that an adapter trains in full or for its bias: uses the adapter's copy."""

    def adapted(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The copy's output for the same input."""
        for name in self.bank.computing():
            copy = self.bank.adapter(name).copies.by_path.get(self.path)
            if isinstance(copy, TrainedBias):
                output = output + (copy.bias - cast("Tensor", module.bias))
            elif copy is not None:
                output = copy(*args, **kwargs)
        return output
