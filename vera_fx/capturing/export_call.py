"""Captures one signature of a model as a graph that reads the live parameters.

`torch.export` (non-strict) runs the original forward once on fake tensors. The exported graph is
then bound to the model itself: it shares the model's dictionaries of modules, parameters and
buffers, so that whatever is assigned, moved or loaded there later is what the graph reads.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.graph import CodeGen

from vera_fx._torch import TreeSpec
from vera_fx._torch_graphs import LiveGraph
from vera_fx.base.hf import capture_hint
from vera_fx.base.modules import BANK
from vera_fx.capturing.budget import Opening, OutOfTime
from vera_fx.capturing.returned_objects import Stateful
from vera_fx.capturing.signature import Call, CallReader
from vera_fx.capturing.stand_ins import call_live
from vera_fx.capturing.trace import aliased, trace
from vera_fx.errors import CaptureError, FixedSizesWarning, TargetError, first_line, listing
from vera_fx.passes import PipelineReport, cleanup, resolve, written_attributes, written_inputs
from vera_fx.pipelines import run_pipeline


@dataclass(slots=True, eq=False)
class Capture:
    """One signature as a graph.

    Attributes:
        graph: the captured graph after cleanup, reading the live model; flat tensors in and out.
        out_spec: the tree of its outputs.
        report: what the cleanup passes did.
        training: for each module path, whether it was in train mode.
        inputs: the argument that each input tensor came from.
        stateful: names of the arguments whose new state is among the outputs.
        guards: which sizes the graph admits.
        values: its inputs as fake tensors, whose sizes may be symbols.
        checkpointed: paths of the layers whose activations are to be recomputed in backward.
        aliased: paths of the model's tensors that the code read by another way than their modules.
        variants: adapted graphs made from it, by the bank's structure and the plans.
        planners: what chooses the plans, by the bank's structure.
        opening: which sizes it was to leave open.
        writes: numbers of the inputs that it writes to.
        used: when it was last asked for, to tell which one to give up.
    """

    graph: GraphModule
    out_spec: TreeSpec
    report: PipelineReport
    training: dict[str, bool]
    inputs: tuple[str, ...]
    stateful: tuple[str, ...]
    guards: "Guards"
    values: list[Tensor]
    checkpointed: frozenset[str] = frozenset()
    aliased: tuple[str, ...] = ()
    variants: dict[Any, dict[Any, Any]] = field(default_factory=dict[Any, dict[Any, Any]])
    planners: dict[Any, Any] = field(default_factory=dict[Any, Any])
    opening: Opening = Opening.ALL
    writes: tuple[int, ...] = ()
    used: int = 0


class Guards:
    """What sizes a captured graph admits: fixed ones, and relations found while tracing."""

    def __init__(self, values: list[Tensor]) -> None:
        # A size that tracing has fixed may still be a SymInt, one that stands for a constant.
        self._fixed = [
            (index, dim, int(size))
            for index, value in enumerate(values)
            for dim, size in enumerate(value.shape)
            if is_concrete_int(size)
        ]
        symbols = [s for v in values for s in v.shape if isinstance(s, torch.SymInt)]
        self._env = symbols[0].node.shape_env if symbols else None
        self._code = self._env.produce_guards_expression(values) if self._env is not None else None

    def admit(self, leaves: list[Tensor]) -> bool:
        """True if the graph is valid for inputs of these sizes."""
        if any(leaves[index].shape[dim] != size for index, dim, size in self._fixed):
            return False
        if self._env is None or self._code is None:
            return True
        return bool(self._env.evaluate_guards_expression(self._code, leaves))


def capture_call(
    model: nn.Module, forward: Any, reader: CallReader, call: Call, opening: Opening = Opening.ALL
) -> Capture:
    """Export the call and bind the graph to ``model``.

    Args:
        model: the live model.
        forward: the original, unbound forward of the model's class.
        reader: the reader that took ``call`` apart.
        call: the call to capture; its tensors are copied, never written to.
        opening: which sizes to leave open, if that does not take too long.

    Raises:
        CaptureError: torch.export cannot trace the call.

    Warns:
        FixedSizesWarning: leaving these sizes open takes too long, so fewer were.
    """
    stateful = Stateful.of(call.arguments)
    exported, checkpointed, opening = _traced(model, (forward, reader), call, stateful, opening)
    graph = bind_live(exported, model)
    report = run_pipeline(graph, cleanup(), "capture")
    _check_writes(exported, graph)
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return Capture(
        graph=graph,
        out_spec=cast("TreeSpec", exported.call_spec.out_spec),
        report=report,
        training={path: module.training for path, module in model.named_modules()},
        inputs=call.tensor_names(),
        stateful=stateful.names,
        guards=Guards(values),
        values=values,
        checkpointed=checkpointed,
        aliased=tuple(aliased(exported, model)),
        opening=opening,
        writes=written_inputs(graph.graph),
    )


def _check_writes(exported: ExportedProgram, graph: GraphModule) -> None:
    """Refuse a call that writes to parameters, once (RWKV does so between train and eval mode)."""
    written = written_attributes(graph.graph) & {*exported.graph_signature.parameters}
    if written:
        raise CaptureError(
            f"this call writes to {listing(sorted(written), limit=3)}, which a graph would do again with "
            "every call"
        )


def _traced(
    model: nn.Module,
    entry: tuple[Any, CallReader],
    call: Call,
    stateful: Stateful,
    opening: Opening,
) -> tuple[ExportedProgram, frozenset[str], Opening]:
    """The call as a program, its layers under gradient checkpointing, and what could be left open."""
    while True:
        try:
            return *trace(model, entry, call, stateful, opening), opening
        except OutOfTime:
            _tell(model, call, opening)
            opening = opening.next()
        except TargetError:
            raise
        except Exception as error:
            raise CaptureError(_explain(model, call, error)) from error


def bind_live(exported: ExportedProgram, model: nn.Module) -> GraphModule:
    """The exported graph as a module that reads ``model`` itself.

    The result is not to run before it is recompiled, as a pipeline does at its end. It shares the
    model's dictionaries of modules, parameters and buffers. Constants that the export lifted out of
    the code become attributes of its own.
    """
    source = exported.module(check_guards=False)
    graph = cast("Graph", source.graph)
    graph.set_codegen(CodeGen())
    _drop_constant_inputs(graph)
    live = {*exported.graph_signature.parameters, *exported.graph_signature.buffers}
    bound = LiveGraph(nn.Module(), Graph())
    for name in ("_modules", "_parameters", "_buffers"):
        bound.__dict__[name] = model.__dict__[name]
    if BANK in model.__dict__:
        bound.__dict__[BANK] = model.__dict__[BANK]
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in live:
            value = resolve(source, node.target)
            node.target = f"_constant_{node.target.replace('.', '_')}"
            bound.__dict__[node.target] = value
    call_live(graph)
    bound.take(graph)
    return bound


def _drop_constant_inputs(graph: Graph) -> None:
    """Remove inputs that are constants: they are part of the signature and baked in."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            node.replace_all_uses_with(node.meta.get("val"))
            graph.erase_node(node)


def _tell(model: nn.Module, call: Call, opening: Opening) -> None:
    warnings.warn(
        f"{type(model).__name__}({', '.join(call.arguments)}) takes too long to capture with "
        f"{opening.value} left open; now it is captured with {opening.next().value} left open, so that "
        "calls of other sizes are captured anew. Let calls have few different sizes, or allow more "
        "seconds: VERA_FX_CAPTURE_SECONDS=n (0: any time).",
        FixedSizesWarning,
        stacklevel=2,
    )


def _explain(model: nn.Module, call: Call, error: BaseException) -> str:
    shown = ", ".join(call.arguments) or "no arguments"
    hint = capture_hint(model, call.arguments)
    return (
        f"torch.export cannot capture {type(model).__name__}({shown}): "
        f"{first_line(error)}{' ' * bool(hint)}{hint}\n"
        "  Calls whose control flow depends on tensor values, or that use unregistered types, cannot "
        "become one graph. Call a part of the model that can, or change the arguments; the full "
        "reason is the exception above."
    )
