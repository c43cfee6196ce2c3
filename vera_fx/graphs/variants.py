"""Adapted graphs: a captured graph after the passes, for one structure of the bank and its plans."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from vera_fx._torch import skip_frame
from vera_fx._torch_graphs import copy_of
from vera_fx.bank.slots import served_path
from vera_fx.branches.kinds import kinds_in
from vera_fx.capturing.export_call import Capture
from vera_fx.debug import outline_least
from vera_fx.passes import (
    AdaptationPlan,
    Choice,
    LayerTime,
    OutlineLayers,
    PipelineReport,
    adaptation,
    is_outlined,
    training,
)
from vera_fx.pipelines import run_pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(slots=True)
class Variant:
    """One capture adapted for one structure of the bank, with one assignment of plans.

    Attributes:
        graph: the adapted graph, flat.
        report: what the passes did.
        choice: the plans and why.
        kinds: the kinds of its branches.
        refused: what a graph for mixtures does without, because it cannot differ from row to row:
            the reasons by path of a target or of a tensor.
        served: the same over the slots for calls without gradients, once it was asked for.
        trained: the same for calls with gradients, once it was asked for: what is cheap is computed
            again in backward, and equal layers are calls of one function.
    """

    graph: GraphModule
    report: PipelineReport
    choice: Choice
    kinds: tuple[str, ...] = ()
    refused: "Mapping[str, str]" = field(default_factory=dict[str, str])
    served: GraphModule | None = None
    trained: GraphModule | None = None

    def for_call(self, time: LayerTime) -> GraphModule:
        """The graph for a call that is made now.

        With gradients equal layers are outlined, which saves compile time but costs about 0.2 ms a
        call of a body when compiled: little where a layer is much work, and much where it is little
        or where one token is decoded. A graph that exists is kept whatever the work.

        Args:
            time: estimates the work of layers for the sizes at hand.
        """
        if not torch.is_grad_enabled():
            self.served = self.served or _served(self.graph)
            return self.served
        if self.trained is None:
            trained = copy_of(self.graph)
            passes = training(self.choice.assignment, _outline(time))
            report = run_pipeline(trained, passes, "train")
            self.report += report
            changed = any(record.report.rewrites for record in report.records)
            self.trained = trained if changed else self.graph
            if is_outlined(trained.graph):
                skip_frame(type(trained).forward)
        return self.trained


def _outline(time: LayerTime) -> OutlineLayers:
    """By work, or as the debugging knob has it."""
    least = outline_least()
    return OutlineLayers(time=time) if least is None else OutlineLayers(least)


def _served(graph: GraphModule) -> GraphModule:
    served = copy_of(graph)
    for node in served.graph.find_nodes(op="get_attr"):
        path = served_path(str(node.target))
        if (
            path != node.target
        ):  # another node: by its name compilers know it where it is an argument
            with served.graph.inserting_before(node):
                read = served.graph.create_node("get_attr", path)
            read.meta.update(node.meta)
            node.replace_all_uses_with(read)
            served.graph.erase_node(node)
    served.recompile()
    return served


def adapt_graph(plan: AdaptationPlan, capture: Capture, choice: Choice) -> Variant:
    """Run the adapting passes on a copy of a captured graph."""
    graph = copy_of(capture.graph)
    passes = adaptation(plan, choice.assignment, capture.checkpointed)
    report = run_pipeline(graph, passes, "adapt")
    return Variant(graph, report, choice, kinds_in(plan))
