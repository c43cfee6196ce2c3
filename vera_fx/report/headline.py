"""What a reader of `explain` looks for first: what trains, what it takes in memory, which plans."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor, nn

from vera_fx.bank.bank import AdapterBank
from vera_fx.report.picture import COLOURS

# `explain` imports this file, so its types are named in words only.
GraphRow = Any

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Headline:
    """Counts of numbers and bytes; ``str()`` is two lines.

    Attributes:
        trainable: numbers that train now.
        total: parameters of the model and its adapters; the projections are no parameters.
        base: bytes of the base's parameters and buffers.
        projections: bytes of all frozen projections.
        adapters: bytes of the adapters' vectors, heads and biases.
        training: bytes of gradients and AdamW's two moments of what trains now.
    """

    trainable: int
    total: int
    base: int
    projections: int
    adapters: int
    training: int

    @property
    def share(self) -> float:
        """What trains now, in per cent of all parameters."""
        return 100 * self.trainable / max(self.total, 1)

    def memory(self) -> dict[str, str]:
        """Every part of what is held, in words a person reads."""
        parts = (self.base, self.projections, self.adapters, self.training)
        names = ("base", "projections", "adapters", "gradients and AdamW")
        return {name: size(count) for name, count in zip(names, parts, strict=True)}

    def __str__(self) -> str:
        held = ", ".join(f"{name} {text}" for name, text in self.memory().items())
        return (
            f"trainable: {self.trainable:,} of {self.total:,} parameters ({self.share:.2f} %)\n"
            f"memory: {held}; activations are not counted"
        )


NOTHING = Headline(0, 0, 0, 0, 0, 0)


def headline_of(model: nn.Module, bank: AdapterBank) -> Headline:
    """Count the tensors of an adapted model, each once."""
    own = {id(tensor) for tensor in (*bank.parameters(), *bank.buffers())}
    everything = (*model.parameters(), *model.buffers())
    trained = [p for p in model.parameters() if p.requires_grad]
    return Headline(
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in model.parameters()),
        base=_bytes(t for t in everything if id(t) not in own),
        projections=_bytes(bank.buffers()),
        adapters=_bytes(bank.parameters()),
        training=3 * _bytes(trained),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def size(count: int) -> str:
    """Bytes in the unit that leaves few digits: ``"27.5 MiB"``."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:  # noqa: PLR2004
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{count} B"


def cards(headline: Headline, graphs: Sequence[GraphRow]) -> Iterator[str]:
    """Three cards side by side: what trains, the memory, the plans of each graph."""
    yield '<div class="cards"><section><h2>trainable</h2>'
    yield f'<p class="large">{headline.share:.2f} %</p>'
    yield f"<p>{headline.trainable:,} of {headline.total:,} parameters</p>"
    yield _bar({"#b35c00": headline.share, "#dddddd": 100 - headline.share})
    yield "</section><section><h2>memory</h2><table>"
    for name, text in headline.memory().items():
        yield f'<tr><td>{name}</td><td class="number">{text}</td></tr>'
    yield "</table><p>activations are not counted</p></section><section><h2>plans</h2>"
    yield from _mixes(graphs)
    yield "</section></div>"


def _mixes(graphs: Sequence[GraphRow]) -> Iterator[str]:
    if not graphs:
        yield "<p>none yet: call the model</p>"
    for number, graph in enumerate(graphs[:_SHOWN]):
        mix = plan_mix(graph)
        words = ", ".join(f"{count} {escape(plan)}" for plan, count in mix.items()) or "no sites"
        yield f"<p>graph {number}, {escape(graph.mode)}: {words}</p>"
        yield _bar({COLOURS[plan]: count for plan, count in mix.items()})
    if len(graphs) > _SHOWN:
        yield f"<p>and {len(graphs) - _SHOWN} more graphs below</p>"


def plan_mix(graph: GraphRow) -> dict[str, int]:
    """How many sites of a graph follow each plan, in the order of the legend."""
    counts = Counter(plan for _, plan, _ in graph.plans)
    return {plan: counts[plan] for plan in COLOURS if plan in counts}


def _bar(shares: Mapping[str, float]) -> str:
    """Coloured stretches that fill the width in proportion."""
    whole = sum(shares.values())
    parts = "".join(
        f'<i style="width:{100 * value / whole:.2f}%;background:{colour}"></i>'
        for colour, value in shares.items()
        if value
    )
    return f'<div class="bar">{parts}</div>' if whole else ""
