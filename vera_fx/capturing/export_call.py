"""Captures one signature of a model as a graph that reads the live parameters.

`torch.export` (non-strict) runs the original forward once on fake tensors. The exported graph is
then bound to the model itself: it shares the model's dictionaries of modules, parameters and
buffers, so that whatever is assigned, moved or loaded there later is what the graph reads.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.graph import CodeGen

from vera_fx._torch import TreeSpec
from vera_fx._torch_graphs import LiveGraph
from vera_fx._torch_sizes import guards_hold, guards_of
from vera_fx.base.hf import capture_hint
from vera_fx.base.modules import BANK
from vera_fx.capturing.budget import Opening, OutOfTime
from vera_fx.capturing.returned_objects import Stateful
from vera_fx.capturing.signature import Call, CallReader
from vera_fx.capturing.stand_ins import call_live
from vera_fx.capturing.trace import aliased, nothing_kept, trace
from vera_fx.errors import CaptureError, FixedSizesWarning, TargetError, first_line, listing
from vera_fx.passes import PipelineReport, cleanup, resolve, written_attributes, written_inputs
from vera_fx.pipelines import run_pipeline

CONSTANT = "_constant_"
"""What the attributes of a graph that are its own are called first."""


@dataclass(slots=True, eq=False, weakref_slot=True)
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


@dataclass(frozen=True, slots=True)
class Guards:
    """What sizes a captured graph admits.

    Attributes:
        fixed: numbers of the input and of its dimension, and the size there.
        relations: what was found while tracing, as torch writes it; None for nothing.
    """

    fixed: tuple[tuple[int, int, int], ...]
    relations: str | None

    @classmethod
    def of(cls, values: list[Tensor]) -> "Guards":
        """Read them off a graph's inputs."""
        # A size that tracing has fixed may still be a SymInt, one that stands for a constant.
        fixed = (
            (index, dim, int(size))
            for index, value in enumerate(values)
            for dim, size in enumerate(value.shape)
            if is_concrete_int(size)
        )
        return cls(tuple(fixed), guards_of(values))

    def admit(self, leaves: list[Tensor]) -> bool:
        """True if the graph is valid for inputs of these sizes."""
        if any(leaves[index].shape[dim] != size for index, dim, size in self.fixed):
            return False
        return self.relations is None or guards_hold(self.relations, leaves)


@dataclass(frozen=True, slots=True)
class Exported:
    """One call as a graph of the live model: before any pass, or kept after those of a capture.

    Attributes:
        graph: the graph; it is not to run before it is printed.
        out_spec: the tree of its outputs.
        opening: which sizes it leaves open.
        checkpointed: paths of the layers whose activations are to be recomputed in backward.
        aliased: paths of the model's tensors that the code read by another way than their modules.
        guards: which sizes it admits; None to read that off the inputs after the passes.
        report: what the passes did; None before them.
    """

    graph: LiveGraph
    out_spec: TreeSpec
    opening: Opening
    checkpointed: frozenset[str] = frozenset()
    aliased: tuple[str, ...] = ()
    guards: Guards | None = None
    report: PipelineReport | None = None


def export_call(
    model: nn.Module, forward: Any, reader: CallReader, call: Call, opening: Opening
) -> Exported:
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
    with nothing_kept():
        exported, checkpointed, opening = _traced(model, (forward, reader), call, stateful, opening)
        graph = bind_live(exported, model)
    out_spec = cast("TreeSpec", exported.call_spec.out_spec)
    return Exported(graph, out_spec, opening, checkpointed, tuple(aliased(exported, model)))


def cleaned(model: nn.Module, call: Call, exported: Exported) -> Capture:
    """The capture of an exported call, after the passes that every capture goes through."""
    graph = exported.graph
    # One that was read from disk has been through them: its code alone is to be printed.
    report = exported.report or run_pipeline(graph, cleanup(), "capture")
    if not graph.printed:
        graph.recompile()
    _check_writes(model, graph)
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return Capture(
        graph=graph,
        out_spec=exported.out_spec,
        report=report,
        training={path: module.training for path, module in model.named_modules()},
        inputs=call.tensor_names(),
        stateful=Stateful.of(call.arguments).names,
        guards=exported.guards or Guards.of(values),
        values=values,
        checkpointed=exported.checkpointed,
        aliased=exported.aliased,
        opening=exported.opening,
        writes=written_inputs(graph.graph),
    )


def _check_writes(model: nn.Module, graph: GraphModule) -> None:
    """Refuse a call that writes to parameters, once (RWKV does so between train and eval mode)."""
    parameters = {path for path, _ in model.named_parameters(remove_duplicate=False)}
    written = written_attributes(graph.graph) & parameters
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
        except (TargetError, CaptureError):
            raise
        except Exception as error:
            raise CaptureError(_explain(model, call, error)) from error


def bind_live(exported: ExportedProgram, model: nn.Module) -> LiveGraph:
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
    constants: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in live:
            value = resolve(source, node.target)
            node.target = f"{CONSTANT}{node.target.replace('.', '_')}"
            constants[node.target] = value
    call_live(graph, model)
    return live_graph(graph, model, constants)


def live_graph(graph: Graph, model: nn.Module, constants: Mapping[str, Any]) -> LiveGraph:
    """A graph with the model's dictionaries of modules, parameters and buffers, and its own constants."""
    bound = LiveGraph(nn.Module(), Graph())
    for name in ("_modules", "_parameters", "_buffers"):
        bound.__dict__[name] = model.__dict__[name]
    if BANK in model.__dict__:
        bound.__dict__[BANK] = model.__dict__[BANK]
    bound.__dict__.update(constants)
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
