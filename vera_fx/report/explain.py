"""Tells what was adapted, in which graphs, by which passes, and what was left alone and why."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from vera_fx.bank.bank import AdapterBank
from vera_fx.capturing.export_call import Capture
from vera_fx.graphs.runtime import Runtime, require_adapted, runtime_of
from vera_fx.graphs.variants import Variant
from vera_fx.passes import Action, PipelineReport, Skip, Target, Why
from vera_fx.processes.wrapped import unwrapped
from vera_fx.report.headline import NOTHING, Headline, headline_of
from vera_fx.report.page import html_of
from vera_fx.report.picture import svg_of
from vera_fx.report.sharing import SharedCapture, shared_captures

_PLAN_PASSES = ("MergeWeight", "ScaleBranch")


@dataclass(frozen=True, slots=True)
class TargetRow:
    """One target and the adapters that have vectors for it."""

    path: str
    in_features: int
    out_features: int
    adapters: tuple[str, ...]
    parameters: int
    base: str = ""
    """Whose module it is, if graphs call it: a quantisation library's, with its bits."""


class SitePlan(NamedTuple):
    """How one site's branch is computed.

    Attributes:
        site: its name.
        plan: the plan that the graph follows.
        why: the reason with the costs that decided, or what kept a pass from following another plan.
            ``str()`` is a text.
    """

    site: str
    plan: str
    why: Why | Skip


@dataclass(frozen=True, slots=True)
class GraphRow:
    """One adapted graph.

    Attributes:
        signature: the inputs with dtypes and sizes; names such as ``s0`` are sizes left open.
        mode: ``train``, ``eval`` or ``mixed``.
        sites: names of the sites that got a branch, in the graph's order.
        plans: for each of them its plan, and why.
        kinds: the kinds of their branches.
        report: what every pass did, cleanup first.
    """

    signature: str
    mode: str
    sites: tuple[str, ...]
    plans: tuple[SitePlan, ...]
    kinds: tuple[str, ...]
    report: PipelineReport


class KeptRow(NamedTuple):
    """What is kept of a model's calls, and the limits, beyond which the least recently used goes.

    Attributes:
        made: how often it was captured until now.
        captures: how many captures are kept.
        most_captures: at most so many of the model, and of each part that runs a graph of its own.
        calls: how many exact calls are known, which go straight to their graph.
        most_calls: at most so many, of each as well.
    """

    made: int
    captures: int
    most_captures: int
    calls: int
    most_calls: int

    def __str__(self) -> str:
        return (
            f"{self.captures} captures ({self.made} made, at most {self.most_captures} of one entry), "
            f"{self.calls} known calls (at most {self.most_calls})"
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer of `explain`; ``str()`` is a table, `html` a page, `svg` a picture.

    Attributes:
        model: the model's class.
        adapters: names of all adapters.
        active: names of those that compute.
        projections: names and sizes of each set of projections, as graphs read them.
        targets: one row per target.
        graphs: one row per adapted graph.
    """

    model: str
    adapters: tuple[str, ...]
    active: tuple[str, ...]
    projections: tuple[str, ...]
    targets: tuple[TargetRow, ...]
    graphs: tuple[GraphRow, ...]
    python: tuple[tuple[str, str], ...] = ()
    """Paths of modules that run in Python because they cannot be captured whole, and why."""
    shared: tuple[SharedCapture, ...] = ()
    """For such a model: each capture of its parts, and which of them share it and what is compiled."""
    kept: KeptRow | None = None
    """How much is kept of the calls, and how much may be."""
    merged: tuple[str, ...] = ()
    """Names of the adapters in the base's weights; none inside ``disable_adapters``, as none is active."""
    disabled: bool = False
    """Whether a ``disable_adapters`` block is open."""
    headline: Headline = NOTHING
    """What trains, of how many, and what is held in memory."""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def state(self) -> str:
        """All adapters, and which of them have an effect and how, in one line."""
        merged = f"; merged: {', '.join(self.merged)}" if self.merged else ""
        disabled = "; disabled" if self.disabled else ""
        active = ", ".join(self.active) or "none"
        return f"{', '.join(self.adapters) or 'none'} (active: {active}{merged}{disabled})"

    def html(self) -> str:
        """A self-contained page: every graph before and after, passes, plans and reasons."""
        return html_of(self)

    def svg(self, graph: int = 0) -> str:
        """One graph before and after as an SVG picture; equal neighbouring layers are folded.

        Raises:
            IndexError: there is no such graph; graphs appear once they are captured.
        """
        return svg_of(self, self.graphs[graph])

    def target_table(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """The targets with a header; whose modules they are, if graphs call any (quantised bases)."""
        header = ("target", "in", "out", "parameters", "adapters", "base")
        rows: list[tuple[object, ...]] = [
            (t.path, t.in_features, t.out_features, t.parameters, ", ".join(t.adapters), t.base)
            for t in self.targets
        ]
        wide = len(header) if any(t.base for t in self.targets) else len(header) - 1
        return header[:wide], [row[:wide] for row in rows]

    def _lines(self) -> Iterator[str]:
        yield str(self.headline)
        yield f"adapters: {self.state()}"
        yield f"projections: {'; '.join(self.projections) or 'none'}"
        yield f"targets: {len(self.targets)}"
        yield from _table(*self.target_table())
        yield f"graphs: {len(self.graphs)}" + (
            "" if self.graphs else " (none captured yet; call the model)"
        )
        yield f"kept: {self.kept}"
        yield from (f"runs in Python: {path or 'the model'}: {why}" for path, why in self.python)
        yield from (f"parts: {row}" for row in self.shared)
        for number, graph in enumerate(self.graphs):
            yield f"\ngraph {number}, {graph.mode}: {graph.signature}"
            yield f"  {len(graph.sites)} sites adapted: {_count_plans(graph)}"
            yield from (f"  {line}" for line in str(graph.report).splitlines())
            yield from _skips(graph.report)


def _count_plans(graph: GraphRow) -> str:
    reasons = Counter((plan, str(why)) for _, plan, why in graph.plans)
    return "; ".join(f"{count} {plan} ({why})" for (plan, why), count in reasons.items())


def _skips(report: PipelineReport) -> Iterator[str]:
    for name, skip in report.skips():
        yield f"  left alone by {name}: {skip.subject}: {skip}"


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def explain(model: nn.Module) -> Explanation:
    """Report targets, graphs, sites, passes and skips of an adapted model.

    Graphs appear once they are captured: at the first call of each signature, or by `capture`.

    Raises:
        AdapterError: the model is not adapted.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    captures = list(runtime_of(model).all_captures())
    return Explanation(
        model=type(model).__name__,
        adapters=tuple(bank.adapters),
        active=bank.computing(),
        projections=tuple(_projections(bank)),
        targets=tuple(_target_row(bank, t) for t in bank.structure.targets.values()),
        graphs=tuple(
            _graph_row(capture, variant)
            for capture in captures
            for by_plans in capture.variants.values()
            for variant in by_plans.values()
        ),
        python=tuple(runtime_of(model).parts.reasons.items()),
        shared=shared_captures(runtime_of(model)),
        kept=_kept(runtime_of(model)),
        merged=bank.merged if bank.enabled else (),
        disabled=not bank.enabled,
        headline=headline_of(model, bank),
    )


def _kept(runtime: Runtime) -> KeptRow:
    entries = [runtime.kept, *(entry.kept for entry in runtime.entries.values())]
    return KeptRow(
        made=sum(kept.made for kept in entries),
        captures=len(list(runtime.all_captures())),
        most_captures=runtime.kept.graphs,
        calls=sum(kept.known() for kept in entries),
        most_calls=runtime.kept.calls,
    )


def _projections(bank: AdapterBank) -> Iterator[str]:
    for key in bank.projections:
        shared = bank.shared.padded(key, bank.structure.targets)
        yield ", ".join(f"{name} {tuple(t.shape)}" for name, t in shared.items()) or "none"


def _target_row(bank: AdapterBank, target: Target) -> TargetRow:
    found = {name: bank.adapter(name).vectors_at(target.path) for name in bank.adapters}
    held = {name: vectors for name, vectors in found.items() if vectors is not None}
    return TargetRow(
        path=target.path,
        in_features=target.in_features,
        out_features=target.out_features,
        adapters=tuple(held),
        parameters=sum(p.numel() for vectors in held.values() for p in vectors.parameters()),
        base=getattr(target.product, "make", ""),
    )


def _graph_row(capture: Capture, variant: Variant) -> GraphRow:
    modes = set(capture.training.values())
    rewrites = [w for record in variant.report.records for w in record.report.rewrites]
    sites = [rewrite for rewrite in rewrites if rewrite.action is Action.BRANCH_ADDED]
    return GraphRow(
        signature=_signature(capture),
        mode="mixed" if len(modes) > 1 else "train" if True in modes else "eval",
        sites=tuple(rewrite.subject for rewrite in sites),
        plans=tuple(_plan(variant, rewrite.subject) for rewrite in sites),
        kinds=variant.kinds,
        report=capture.report + variant.report,
    )


def _plan(variant: Variant, site: str) -> SitePlan:
    """The plan that the graph really follows: a pass may have left the site as it was."""
    skipped = {s.subject: s for name, s in variant.report.skips() if name in _PLAN_PASSES}
    if site in skipped:
        return SitePlan(site, "factored", skipped[site])
    plan = variant.choice.assignment.plan_of(site)
    return SitePlan(site, plan, variant.choice.reasons[site])


def _signature(capture: Capture) -> str:
    """The inputs with dtypes and sizes; open sizes are numbered as they appear."""
    inputs = [node for node in capture.graph.graph.nodes if node.op == "placeholder"]
    names: dict[str, str] = {}
    return ", ".join(
        f"{name} {_type(n.meta['val'], names)}"
        for name, n in zip(capture.inputs, inputs, strict=True)
    )


def _type(value: Tensor, names: dict[str, str]) -> str:
    sizes = ", ".join(
        str(size) if isinstance(size, int) else names.setdefault(str(size), f"s{len(names)}")
        for size in value.shape
    )
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
