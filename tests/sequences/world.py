"""What must be true of an adapted model after any sequence of calls: plain data, and ten lines a rule.

Nothing here calls the library: what it should compute is computed from weights and vectors alone.
"""

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.sequences.packed import Packed

BASE = "__base__"
WIDTHS = {"lin0": (5, 7), "lin1": (7, 5), "head": (5, 3)}
PACKED = ("lin0", "lin1")
"""Layers that a quantised model has packed."""


class Net(nn.Module):
    """Three layers, and a scale that a plain attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        for name, (n_in, n_out) in WIDTHS.items():
            setattr(self, name, nn.Linear(n_in, n_out))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x))))) * self.scale


class Reused(Net):
    """Its layers are called twice."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.lin1(torch.tanh(self.lin0(x))))
        return self.head(x) * self.scale


class Abstract(abc.ABC):
    """A class of another layout, in front of the module's."""

    __slots__ = ()

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class Mixed(Abstract, Net):
    """Computes what `Net` does."""

    def forward(self, x: Tensor) -> Tensor:
        return Net.forward(self, x)


class Quantised(Net):
    """Two of its layers have a weight that only their own code reads."""

    def __init__(self) -> None:
        super().__init__()
        for name in PACKED:
            setattr(self, name, Packed(*WIDTHS[name]))


KINDS: dict[str, type[Net]] = {
    "plain": Net,
    "reused": Reused,
    "mixed in": Mixed,
    "quantised": Quantised,
}


@dataclass
class Own:
    """One adapter.

    Attributes:
        A: ``(r, widest input)``.
        B: ``(widest output, r)``.
        vectors: ``(d, b)`` by target.
        head: its own weight and bias of the head, if it has them.
        folded: its vectors and head as they went into the base, while it is merged.
        trainable: whether it ever trains.
        learns: whether it trains now, if it is not off.
    """

    A: Tensor
    B: Tensor
    vectors: dict[str, tuple[Tensor, Tensor]]
    head: tuple[Tensor, Tensor] | None = None
    folded: "Own | None" = None
    trainable: bool = True
    learns: bool = False

    def copied(self) -> "Own":
        vectors = {
            path: (d.detach().clone(), b.detach().clone()) for path, (d, b) in self.vectors.items()
        }
        head = self.head and (self.head[0].detach().clone(), self.head[1].detach().clone())
        return Own(self.A, self.B, vectors, head, trainable=self.trainable, learns=self.learns)

    def tensors(self) -> dict[str, Tensor]:
        """What it trains, by PEFT's key."""
        found = {
            f"base_model.model.{path}.vera_lambda_{which}": tensor
            for path, pair in self.vectors.items()
            for which, tensor in zip("db", pair, strict=True)
        }
        if self.head is not None:
            found |= dict(
                zip(
                    ("base_model.model.head.weight", "base_model.model.head.bias"),
                    self.head,
                    strict=True,
                )
            )
        return found


def own(state: dict[str, Tensor]) -> Own:
    """An adapter, from its tensors under PEFT's keys."""
    state = {
        key.removeprefix("base_model."): tensor.detach().clone() for key, tensor in state.items()
    }
    vectors = {
        path: (state[f"model.{path}.vera_lambda_d"], state[f"model.{path}.vera_lambda_b"])
        for path in WIDTHS
        if f"model.{path}.vera_lambda_d" in state
    }
    head = (
        (state["model.head.weight"], state["model.head.bias"])
        if "model.head.weight" in state
        else None
    )
    return Own(state["vera_A"], state["vera_B"], vectors, head)


@dataclass
class World:
    """The model, its adapters, and what is on.

    Attributes:
        kind: of the model.
        base: weight and bias by layer.
        together: adapters that train in the place of the active ones, each on its own rows.
    """

    kind: str
    base: dict[str, tuple[Tensor, Tensor]]
    scale: float = 1.0
    adapters: dict[str, Own] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    together: list[str] = field(default_factory=list)
    disabled: int = 0

    def computing(self) -> list[str]:
        """Adapters whose vectors a call reads."""
        return [] if self.disabled else [name for name in self.active if name not in self.merged]

    def learning(self) -> list[str]:
        """Adapters that a training step of a call without names changes."""
        return [name for name in self.computing() if self.adapters[name].learns]

    def at_work(self) -> list[Own]:
        """All that a call's result depends on, as it does."""
        if self.disabled:
            return []
        folded = [self.adapters[name].folded for name in self.merged]
        return [
            *(one for one in folded if one),
            *(self.adapters[name] for name in self.computing()),
        ]

    def output(self, x: Tensor, owns: Iterable[Own] | None = None) -> Tensor:
        """What a call gives."""
        chosen = self.at_work() if owns is None else list(owns)
        for _ in range(2 if self.kind == "reused" else 1):
            x = torch.tanh(self.site("lin1", torch.tanh(self.site("lin0", x, chosen)), chosen))
        return self.site("head", x, chosen) * self.scale

    def site(self, path: str, x: Tensor, owns: Sequence[Own]) -> Tensor:
        heads = [one.head for one in owns if one.head is not None and path == "head"]
        weight, bias = heads[-1] if heads else self.base[path]
        result = F.linear(x, weight, bias)
        for one in owns:
            if path in one.vectors:
                (d, b), (n_in, n_out) = one.vectors[path], WIDTHS[path]
                result = result + b * F.linear(d * F.linear(x, one.A[:, :n_in]), one.B[:n_out])
        return result

    def clash(self, names: Iterable[str]) -> bool:
        """Whether two adapters have heads of their own."""
        return sum(self.adapters[name].head is not None for name in names) > 1

    def hidden(self, merged: Iterable[str]) -> bool:
        """Whether an active adapter that is not merged reads a head of its own where one is merged."""
        names = set(merged)
        reads = any(
            self.adapters[name].head is not None for name in self.active if name not in names
        )
        return reads and any("head" in self.adapters[name].vectors for name in names)

    def packed(self, paths: Iterable[str]) -> bool:
        """Whether the weight of one of these layers is read by its own code alone."""
        return self.kind == "quantised" and not {*PACKED}.isdisjoint(paths)

    def coarse(self, names: Iterable[str]) -> bool:
        """Whether to merge one of them rounds, so that it has to be asked for."""
        return any(self.packed(self.adapters[name].vectors) for name in names)

    def merge(self, names: Iterable[str]) -> None:
        for name in names:
            self.adapters[name].folded = self.adapters[name].copied()
            self.merged.append(name)

    def unmerge(self) -> None:
        for name in self.merged:
            self.adapters[name].folded = None
        self.merged = []

    def enable(self) -> None:
        """The end of a block; what was merged is merged as it is now."""
        self.disabled -= 1
        if not self.disabled:
            merged = self.merged
            self.unmerge()
            self.merge(merged)

    def activate(self, names: list[str], together: list[str] | None = None) -> None:
        """These are active; and those of ``together`` train in their place, as long as there are some."""
        before = [*self.active, *self.together]
        self.together = [
            name
            for name in (self.together if together is None else together)
            if name in self.adapters
        ]
        learning = self.together or names
        for name in {*before, *names, *self.together} & self.adapters.keys():
            self.adapters[name].learns = self.adapters[name].trainable and name in learning
        self.active = names

    def trained(self) -> dict[str, dict[str, Tensor]]:
        """What requires gradients, by adapter and key."""
        learning = {name: one for name, one in self.adapters.items() if one.learns}
        return {} if self.disabled else {name: one.tensors() for name, one in learning.items()}
