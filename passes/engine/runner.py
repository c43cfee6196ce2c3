"""Runs a pipeline: lint, recompile, time, dump and verify around every pass."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.fx import GraphModule

from vera_fx.passes.engine.protocol import GraphPass, PassContractError, SiteError
from vera_fx.passes.engine.reports import PassReport, Skip
from vera_fx.passes.engine.text import graph_text

logger = logging.getLogger("vera_fx.passes")


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass of one run: what it reported, what it cost, how the graph changed."""

    name: str
    numerics: str
    report: PassReport
    milliseconds: float
    nodes_before: int
    nodes_after: int
    op_changes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class PipelineReport:
    """The records of a pipeline's run, in order. ``str()`` is an aligned table."""

    records: tuple[PassRecord, ...] = ()

    def skips(self) -> tuple[tuple[str, Skip], ...]:
        """Every (pass name, skip): the answer to "why was this left alone?"."""
        return tuple((record.name, skip) for record in self.records for skip in record.report.skips)

    def __add__(self, other: "PipelineReport") -> "PipelineReport":
        return PipelineReport(self.records + other.records)

    def __str__(self) -> str:
        header = ("pass", "numerics", "rewrites", "skips", "nodes", "ms")
        rows = [header, *(_row(record) for record in self.records)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def _row(record: PassRecord) -> tuple[str, ...]:
    return (
        record.name,
        record.numerics,
        str(len(record.report.rewrites)),
        str(len(record.report.skips)),
        f"{record.nodes_before} -> {record.nodes_after}",
        f"{record.milliseconds:.1f}",
    )


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a pipeline is run; none of it changes the result.

    Attributes:
        dump: folder that gets ``00_start.txt`` and one numbered text per pass.
        verify: check that a pass's report agrees with the change of the graph's text, and that
            a second call reports nothing more to do.
        limit: stop after that many passes (for bisecting).
    """

    dump: Path | None = None
    verify: bool = False
    limit: int | None = None


@dataclass(slots=True)
class _Run:
    gm: GraphModule
    options: RunOptions
    records: list[PassRecord] = field(default_factory=list[PassRecord])


def run_passes(
    gm: GraphModule, passes: Sequence[GraphPass], options: RunOptions | None = None
) -> PipelineReport:
    """Apply ``passes`` to ``gm`` in order, in place. If one changes it, its code is printed after the last.

    Raises:
        SiteError: a targeted module is used in a way that no pass can adapt.
        PassContractError: a pass left an invalid graph or misreported its work.
    """
    run = _Run(gm, options or RunOptions())
    _dump(run, "start")
    for graph_pass in passes[: run.options.limit]:
        _run_one(run, graph_pass)
    if any(record.report.changed for record in run.records):
        run.gm.recompile()
    return PipelineReport(tuple(run.records))


def _run_one(run: _Run, graph_pass: GraphPass) -> None:
    name = type(graph_pass).__name__
    text_before = graph_text(run.gm) if run.options.verify else ""
    ops_before = _op_counts(run.gm)
    start = time.perf_counter()
    try:
        report = graph_pass(run.gm)
        if report.changed:
            run.gm.graph.lint()
    except SiteError:
        raise
    except Exception as error:
        site = str(getattr(error, "site", ""))
        raise PassContractError(f"{_context(run, name)} failed: {error}", name, site) from error
    elapsed = 1e3 * (time.perf_counter() - start)
    if run.options.verify:
        _verify(run, graph_pass, report, text_before)
    changes = _op_counts(run.gm)
    changes.subtract(ops_before)
    run.records.append(
        PassRecord(
            name=name,
            numerics=graph_pass.numerics.name,
            report=report,
            milliseconds=elapsed,
            nodes_before=ops_before.total(),
            nodes_after=ops_before.total() + changes.total(),
            op_changes=tuple(sorted((op, n) for op, n in changes.items() if n)),
        )
    )
    logger.info("%s: %d rewrites, %d skips", name, len(report.rewrites), len(report.skips))
    _dump(run, name)


def _verify(run: _Run, graph_pass: GraphPass, report: PassReport, text_before: str) -> None:
    name = type(graph_pass).__name__
    text_after = graph_text(run.gm)
    if report.changed != (text_after != text_before):
        did = "changed the graph" if text_after != text_before else "left the graph as it was"
        raise PassContractError(
            f"{_context(run, name)} {did} but reported {len(report.rewrites)} rewrites", name
        )
    if graph_pass(run.gm).changed or graph_text(run.gm) != text_after:
        raise PassContractError(
            f"{_context(run, name)} is not idempotent: a second call changed the graph", name
        )


def _context(run: _Run, name: str) -> str:
    done = ", ".join(record.name for record in run.records) or "none"
    where = f"; graphs are in {run.options.dump}" if run.options.dump else ""
    return f"pass {name} (after: {done}{where})"


def _op_counts(gm: GraphModule) -> Counter[str]:
    return Counter(
        f"{node.op} {node.target}" if node.op == "call_function" else node.op
        for node in gm.graph.nodes
    )


def _dump(run: _Run, name: str) -> None:
    if run.options.dump is not None:
        run.options.dump.mkdir(parents=True, exist_ok=True)
        path = run.options.dump / f"{len(run.records):02d}_{name}.txt"
        path.write_text(graph_text(run.gm) + "\n", encoding="utf-8")
