"""CUDA graphs as Inductor records and replays them (torch/_inductor/cudagraph_trees.py), on the CPU.

A recording belongs to one compiled function, its open sizes and the addresses of its *static* inputs:
parameters and tensors of modules, and in backward all that forward has kept. What else comes in is
copied to where it was when it was recorded, and what comes out stands where it stood. A function that
writes to an input which is not static is not recorded at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule


@dataclass
class Recording:
    """Where everything is that a replay touches."""

    static: list[int]
    inputs: dict[int, Tensor]
    outputs: list[Any] = field(default_factory=list[Any])


@dataclass
class Function:
    """What Inductor was asked to compile.

    Attributes:
        graph: of the function.
        static: numbers of its inputs that must stay in place.
        backward: whether it is one.
        written: numbers of its inputs that it writes to.
        empty: some input has no element, as stand-ins for integers have, which are on the CPU wherever
            the model is: Inductor records nothing that reads tensors of two devices.
        recordings: for each set of open sizes.
    """

    graph: GraphModule
    static: list[int]
    backward: bool
    written: list[int]
    empty: bool
    recordings: dict[Any, list[Recording]] = field(default_factory=dict[Any, list[Recording]])

    def recording(self, inputs: Sequence[Any]) -> tuple[Recording, bool]:
        """The recording that these inputs may replay; and whether it is new."""
        addresses = [inputs[i].data_ptr() for i in self.static if isinstance(inputs[i], Tensor)]
        known = self.recordings.setdefault(tuple(x for x in inputs if isinstance(x, int)), [])
        found = next((old for old in known if old.static == addresses), None)
        if found is not None:
            return found, False
        fixed = {*self.static}
        tensors = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor) and i not in fixed}
        known.append(Recording(addresses, {i: same_layout(x) for i, x in tensors.items()}))
        return known[-1], True


class Replays:
    """A backend of ``torch.compile`` that counts what would be recorded.

    Attributes:
        functions: all that were compiled.
        recorded: how many recordings were made.
        skipped: how many calls ran without, as they write to inputs that are not static.
    """

    def __init__(self) -> None:
        self.functions: list[Function] = []
        self.recorded = self.skipped = 0

    def __call__(self, graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=self._compiled)

    def _compiled(self, graph: GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        static = list(options.get("static_input_idxs") or ())
        backward = bool(options.get("is_backward"))
        empty = any(isinstance(x, Tensor) and not x.numel() for x in inputs)
        function = Function(graph, static, backward, written(graph), empty)
        self.functions.append(function)

        def call(given: list[Any]) -> Any:
            return self._run(function, given)

        call._boxed_call = True
        return call

    def _run(self, function: Function, inputs: list[Any]) -> Any:
        given = [*inputs]
        inputs.clear()
        if not {*function.written} <= {*function.static}:
            self.skipped += 1
            return function.graph(*given)
        found, new = function.recording(given)
        self.recorded += new
        for i, place in found.inputs.items():
            given[i] = place.copy_(given[i])
        outputs = function.graph(*given)
        if new:
            found.outputs = [x.clone() if fresh(x, given) else x for x in outputs]
            return tuple(found.outputs)
        return tuple(map(replayed, found.outputs, outputs))


def same_layout(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def fresh(output: Any, inputs: Sequence[Any]) -> bool:
    """True for a tensor that is no input, and so has memory of the recording's own."""
    return isinstance(output, Tensor) and all(output is not x for x in inputs)


def replayed(place: Any, output: Any) -> Any:
    if not isinstance(place, Tensor) or place is output:
        return output
    with torch.no_grad():
        return place.copy_(output)


def written(graph: GraphModule) -> list[int]:
    """Numbers of the inputs that a functional graph writes to at its end."""
    numbers = {node: i for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
    copies = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return [numbers[node.args[0]] for node in copies if node.args[0] in numbers]
