"""What a kind of branch says of itself: the seam on which VeRA and its like stand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vera_fx.config import AdapterConfig
from vera_fx.passes import BranchGraph, Cut, PlanCosts, Target

Dims = tuple[str, ...]
"""The sizes of a tensor by name: ``"r"``, ``"in"`` and ``"out"``."""

Tensors = Mapping[str, Tensor]
"""A branch's tensors by their names."""


class Parameters(Protocol):
    """Which tensors a branch has, and what they are at first.

    Names are those of checkpoints and of ``named_parameters``.
    """

    @property
    def shared(self) -> Mapping[str, Dims]:
        """Frozen tensors that all targets of an adapter share, with sizes over all targets."""
        ...

    @property
    def own(self) -> Mapping[str, Dims]:
        """Trained tensors of every target."""
        ...

    @property
    def unrounded(self) -> frozenset[str]:
        """Names of own tensors whose first values are not rounded to the base's dtype."""
        ...

    def draw(self, config: AdapterConfig, max_in: int, max_out: int) -> Tensors:
        """The shared tensors at first, in float32 on the CPU."""
        ...

    def first(self, config: AdapterConfig, target: Target, weight: Callable[[], Tensor]) -> Tensors:
        """A target's own tensors at first, in float32.

        Args:
            config: the configuration.
            target: the target.
            weight: gives its weight, ``(out, in)``, for kinds that start from it.
        """
        ...

    def redraw(self, seed: int, r: int, max_in: int, max_out: int) -> Tensors:
        """The shared tensors once more, of a configuration with this seed and rank."""
        ...

    def seed(self, config: AdapterConfig) -> int | None:
        """What the shared tensors are drawn from; None if they are not drawn from a seed."""
        ...


@dataclass(frozen=True, slots=True)
class EagerCall:
    """One call of a target's module, for the branch computed beside it.

    Attributes:
        x: the module's input, as it was passed.
        output: the site's output so far.
        base: the module's own output.
        bias: the module's bias, if it has one.
        weight: gives its weight, ``(out, in)``.
        drop: drops elements of the branch's input, if it is to be.
        drops: whether it does.
        cut: how the module is cut over processes; ``x`` and ``output`` are this process's then.
    """

    x: Tensor
    output: Tensor
    base: Tensor
    bias: Tensor | None
    weight: Callable[[], Tensor]
    drop: Callable[[Tensor], Tensor]
    drops: bool
    cut: Cut | None = None


@dataclass(frozen=True, slots=True)
class LoraForm:
    """A target's branch as LoRA's: ``lora_B @ lora_A`` at a scale of 1.

    Attributes:
        A: ``(r, in)``.
        B: ``(out, r)``.
        more: further tensors by the end of their key, such as DoRA's magnitude.
    """

    A: Tensor
    B: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Maths(Protocol):
    """What a branch computes, outside of any graph."""

    def add(self, call: EagerCall, tensors: Tensors) -> Tensor:
        """The site's output with the branch; not yet cast back to the output's dtype."""
        ...

    def delta(self, tensors: Tensors, in_features: int, weight: Callable[[], Tensor]) -> Tensor:
        """The change of the weight that the branch amounts to, ``(out, in)``."""
        ...

    def lora(self, tensors: Tensors, in_features: int) -> LoraForm:
        """The branch as LoRA's, exactly."""
        ...

    @property
    def lora_fields(self) -> Mapping[str, object]:
        """What PEFT's LoRA configuration says of such a branch beyond the usual."""
        ...

    @property
    def adds_up(self) -> bool:
        """True if the changes of several adapters' weights add up, whatever the order."""
        ...


class TimedSteps(Protocol):
    """The plans as eager code, to time them."""

    def __call__(
        self,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        trains: bool,
    ) -> Mapping[str, Callable[[], object]]:
        """One step of each plan, and of the base alone under ``"base"``.

        Args:
            shape: tokens, in_features, out_features, rank, and the number of sites that read one input.
            dtype: of the base.
            device: of the base.
            trains: whether a step includes gradients.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlanWords:
    """How a plan is drawn: the formula behind the base's product, and what it means."""

    formula: str
    meaning: str


@dataclass(frozen=True, slots=True, eq=False)
class BranchKind:
    """One kind of branch.

    Attributes:
        name: what people call it.
        paper: where it is from.
        peft_type: what configurations on disk call it.
        config: the class of its configurations.
        parameters: which tensors it has.
        maths: what it computes.
        graph: how it is written into graphs and read back.
        costs: what its plans cost.
        steps: its plans as eager code.
        words: how its plans are drawn, by plan.
        idle_at_zero: whether a branch adds nothing where all its vectors are zero.
        not_mixed: why it cannot differ from row to row of a batch; nothing if it can.
        not_peft: why PEFT does not load its files; nothing if it does.
        not_cut: why it cannot be computed beside a product that is cut over processes; nothing if it can.
    """

    name: str
    paper: str
    peft_type: str
    config: type[AdapterConfig]
    parameters: Parameters
    maths: Maths
    graph: BranchGraph
    costs: PlanCosts
    steps: TimedSteps
    words: Mapping[str, PlanWords]
    idle_at_zero: bool = True
    not_mixed: str = ""
    not_peft: str = ""
    not_cut: str = ""

    def __deepcopy__(self, _memo: object) -> "BranchKind":
        return self

    def shared_sizes(self, r: int, max_in: int, max_out: int) -> dict[str, tuple[int, ...]]:
        """The sizes of the shared tensors."""
        return _sizes(self.parameters.shared, r, max_in, max_out)

    def own_sizes(self, r: int, target: Target) -> dict[str, tuple[int, ...]]:
        """The sizes of a target's own tensors."""
        return _sizes(self.parameters.own, r, target.in_features, target.out_features)

    def open_with_rank(self) -> dict[str, int]:
        """For each tensor whose sizes depend on the rank, the dimension that does."""
        named = {**self.parameters.shared, **self.parameters.own}
        return {name: dims.index("r") for name, dims in named.items() if "r" in dims}


def _sizes(
    named: Mapping[str, Dims], r: int, in_features: int, out_features: int
) -> dict[str, tuple[int, ...]]:
    known = {"r": r, "in": in_features, "out": out_features}
    return {name: tuple(known[dim] for dim in dims) for name, dims in named.items()}
