"""What happens around a graph: a call is taken apart, its graph found, its result put together.

Everything here runs in plain Python outside of Dynamo. What torch.compile compiles is the graph
that `prepare` returns, one code object per signature, so that signatures never compete for one
compile cache.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from vera_fx._torch import behind_dynamo, in_transform, outside_dynamo, skip_frame
from vera_fx.bank.bank import bank_of
from vera_fx.base.positions import too_long
from vera_fx.capturing.export_call import Capture
from vera_fx.capturing.returned_objects import restore
from vera_fx.capturing.signature import Call
from vera_fx.errors import AdapterError, CaptureError
from vera_fx.graphs.runtime import Runtime, runtime_of
from vera_fx.mixing.check import mix_of
from vera_fx.mixing.kept_mix import mix_again
from vera_fx.mixing.kept_names import held_by
from vera_fx.mixing.mixer import Mix
from vera_fx.mixing.rows_of_call import row_names


@dataclass(slots=True)
class Prepared:
    """A call, taken apart, and what it is to run.

    Attributes:
        graph: the adapted graph.
        capture: what it was made from.
        call: the call.
        model: whose slots the graph reads.
        switches: how often they had been switched when it was chosen; None if it reads none.
    """

    graph: GraphModule
    capture: Capture
    call: Call
    model: nn.Module
    switches: int | None

    def is_switched(self) -> bool:
        """True if the graph may have read tensors of two sets of adapters."""
        return self.switches not in {None, bank_of(self.model).slots.switches}


@outside_dynamo
def prepare(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    entry: str = "",
    *,
    inside: bool = False,
) -> Prepared | None:
    """Take the call apart and find its graph; None if its forward is to run in Python.

    Args:
        model: the adapted model.
        args: positional arguments.
        kwargs: keyword arguments; ``adapter_names`` gives every row its adapter.
        entry: path of the part of the model that is called; nothing for the model itself.
        inside: whether another part was prepared in this call of the model, with the same adapters.
    """
    runtime = runtime_of(model)
    if entry:
        runtime = runtime.entries.get(entry) or runtime.entries.setdefault(
            entry, Runtime(model, entry, runtime)
        )
    names = kwargs.pop("adapter_names", None)
    call = runtime.read(model, args, kwargs)
    if call is None:
        _refuse_names(
            model, names, "an argument is neither a tensor nor a constant nor a tree of them"
        )
        return None
    mix = _mix_for(model, call, names)
    ready, switches = runtime.ready(model, call, mix)
    if not inside:
        runtime.reduced.check(model)
    if mix is not None and ready is not None:
        if ready.refused:
            mix.check(ready.refused)
        call.leaves += mix.tensors
    return None if ready is None else Prepared(ready.graph, ready.capture, call, model, switches)


@skip_frame
def run(prepared: Prepared) -> list[Tensor]:
    """Run the graph of a call.

    Raises:
        AdapterError: another thread switched the adapters meanwhile.
        LengthError: the graph failed, on more tokens than the model has positions for.
    """
    try:
        return prepared.graph(*prepared.call.leaves)
    except Exception as error:
        _explain(prepared, error)
        raise


@outside_dynamo
def _explain(prepared: Prepared, error: Exception) -> None:
    """Raise in the place of an error what led to it, where that is known."""
    if prepared.is_switched():
        raise _switched(prepared) from error
    first = behind_dynamo(error)
    found = too_long(prepared.model, prepared.call.arguments)
    if found is not None:
        raise found from first
    if first is not error:
        raise first


def _switched(prepared: Prepared) -> AdapterError:
    return AdapterError(
        f"another thread switched or replaced the active adapters while a call of this "
        f"{type(prepared.model).__name__} ran, so that its result would mix them; hold a lock around "
        "switches and calls, or give every row its adapter (adapter_names=[...]), which needs no switch"
    )


@skip_frame
def transformed(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """True for a call inside of a transform of ``torch.func``, where no graph can run.

    Tensors there stand for others, which torch.export cannot trace and the library's own functions
    cannot differentiate.

    Raises:
        CaptureError: the call mixes adapters, which only graphs can do.
    """
    if not in_transform():
        return False
    _refuse_names(model, kwargs.get("adapter_names"), "torch.func transforms it")
    return True


def _refuse_names(model: nn.Module, names: Any, why: str) -> None:
    if names is not None or held_by(bank_of(model)) is not None:
        raise CaptureError(
            f"adapter_names needs the call as one graph, and {why}; call the model once per adapter "
            "(set_adapter)"
        )


def _mix_for(model: nn.Module, call: Call, names: Any) -> Mix | None:
    """The mixture of a call: of its own ``adapter_names``, or of the ``generate`` around it."""
    if names is not None:
        return mix_of(model, names)
    held = held_by(bank_of(model))
    return held and mix_again(model, row_names(call, held.names), held)


@outside_dynamo
def finish(prepared: Prepared, outputs: list[Tensor]) -> Any:
    """Rebuild the result of a call from the graph's flat outputs.

    Raises:
        AdapterError: another thread switched the adapters meanwhile.
    """
    if prepared.is_switched():
        raise _switched(prepared)
    prepared.call.write_back(prepared.capture.writes)
    names = prepared.capture.stateful
    objects = {name: prepared.call.arguments[name] for name in names} if names else None
    return restore(list(outputs), prepared.capture.out_spec, objects)
