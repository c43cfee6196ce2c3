"""What the passes of a capture did, written down for whoever reads the capture."""

from typing import Any

from vera_fx.passes import Action, PassRecord, PassReport, PipelineReport, Reason, Rewrite, Skip


def write_report(report: PipelineReport) -> Any:
    """A report as plain containers."""
    return [
        {
            "name": record.name,
            "numerics": record.numerics,
            "rewrites": [
                (w.subject, w.action.name, w.other, w.role, w.count) for w in record.report.rewrites
            ],
            "skips": [(s.subject, s.reason.name, s.other) for s in record.report.skips],
            "nodes": (record.nodes_before, record.nodes_after),
            "ops": record.op_changes,
        }
        for record in report.records
    ]


def read_report(written: Any) -> PipelineReport:
    """The report that was written; its passes took no time here.

    Raises:
        KeyError, TypeError, ValueError: it was not written by `write_report`.
    """
    return PipelineReport(tuple(map(_record, written)))


def _record(entry: Any) -> PassRecord:
    before, after = map(int, entry["nodes"])
    return PassRecord(
        name=str(entry["name"]),
        numerics=str(entry["numerics"]),
        report=PassReport(
            tuple(Rewrite(s, Action[a], o, r, n) for s, a, o, r, n in entry["rewrites"]),
            tuple(Skip(s, Reason[a], o) for s, a, o in entry["skips"]),
        ),
        milliseconds=0.0,
        nodes_before=before,
        nodes_after=after,
        op_changes=tuple((str(op), int(count)) for op, count in entry["ops"]),
    )
