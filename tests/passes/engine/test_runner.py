"""The runner: reports that agree with the graph, dumps, limits, and errors that name the pass."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.passes.examples import EXAMPLES, adapted_readers
from vera_fx.passes import (
    Action,
    InsertBranches,
    Numerics,
    PassContractError,
    PassReport,
    Rewrite,
    RunOptions,
    ShareProjection,
    graph_text,
    run_passes,
)


@dataclass(frozen=True)
class Silent:
    """Changes the graph and says nothing."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: torch.fx.GraphModule, /) -> PassReport:
        node = next(n for n in gm.graph.nodes if n.op == "call_function")
        with gm.graph.inserting_after(node):
            gm.graph.call_function(torch.ops.aten.alias.default, (node,))
        return PassReport()


@dataclass(frozen=True)
class Boastful:
    """Changes nothing and says it did."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: torch.fx.GraphModule, /) -> PassReport:
        return PassReport((Rewrite("x", Action.MADE_CONTIGUOUS),))


@dataclass(frozen=True)
class Restless:
    """Finds something to do every time it is called."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: torch.fx.GraphModule, /) -> PassReport:
        Silent()(gm)
        return PassReport((Rewrite("x", Action.MADE_CONTIGUOUS),))


@dataclass(frozen=True)
class Broken:
    """Leaves a graph that is no graph."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: torch.fx.GraphModule, /) -> PassReport:
        nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
        nodes[0].prepend(nodes[-1])
        nodes[-1].args = (nodes[-1],)
        return PassReport((Rewrite("x", Action.MADE_CONTIGUOUS),))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Silent(), r"pass Silent .*changed the graph but reported 0 rewrites"),
        (Boastful(), r"pass Boastful .*left the graph as it was but reported 1 rewrites"),
        (Restless(), r"pass Restless .*not idempotent"),
        (Broken(), r"pass Broken \(after: ShareProjection\) failed"),
    ],
)
def test_broken_contracts_are_named(bad, message: str) -> None:
    with pytest.raises(PassContractError, match=message):
        run_passes(adapted_readers(), (ShareProjection(), bad), RunOptions(verify=True))


def test_report_counts_what_happened() -> None:
    report = run_passes(adapted_readers(), (ShareProjection(),), RunOptions(verify=True))
    (record,) = report.records

    assert record.name == "ShareProjection"
    assert record.nodes_before - record.nodes_after == 1
    assert record.op_changes == (("call_function aten.linear.default", -1),)
    assert "ShareProjection" in str(report)
    assert str(report).count("\n") == 1


def test_dump_writes_every_stage(tmp_path: Path) -> None:
    example = EXAMPLES["InsertBranches"]
    graph = example.build()
    before = graph_text(graph)
    run_passes(graph, (example.graph_pass, ShareProjection()), RunOptions(dump=tmp_path / "graphs"))

    names = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert names == ["00_start.txt", "01_InsertBranches.txt", "02_ShareProjection.txt"]
    assert (tmp_path / "graphs" / "00_start.txt").read_text() == before + "\n"


def test_limit_stops_early() -> None:
    example = EXAMPLES["InsertBranches"]
    report = run_passes(
        example.build(), (example.graph_pass, ShareProjection()), RunOptions(limit=1)
    )

    assert [record.name for record in report.records] == [InsertBranches.__name__]
