"""`explain` as a page of its own: no scripts, nothing loaded from elsewhere."""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from vera_fx.report.headline import cards
from vera_fx.report.picture import svg_of

# `explain` imports this file, so its types are named in words only.
Explanation = Any
GraphRow = Any

_STYLE = (
    "body{font:14px/1.5 sans-serif;color:#222222;max-width:1000px;margin:24px auto;padding:0 16px}"
    "h1{font-size:20px}h2{font-size:16px;margin-top:24px}svg{max-width:100%;height:auto}"
    "table{border-collapse:collapse}td,th{padding:2px 16px 2px 0;text-align:left}"
    ".cards{display:flex;gap:12px;flex-wrap:wrap;margin-bottom:16px}"
    ".cards section{flex:1 1 220px;border:1px solid #cccccc;"
    "border-radius:4px;padding:8px 16px 12px}"
    ".cards h2{margin:0}.cards p{margin:4px 0}"
    ".large{font-size:28px;line-height:1.2}.bar{display:flex;height:12px;border-radius:3px;overflow:hidden}"
    "td.number{text-align:right}tr.idle{color:#767676}details{margin:12px 0}summary{cursor:pointer;font-weight:bold}"
)


def html_of(explanation: Explanation) -> str:
    """A page: every graph as a picture, with plans, passes and skips."""
    body = [
        f"<h1>{escape(explanation.model)}, adapted</h1>",
        *cards(explanation.headline, explanation.graphs),
        *_facts(explanation),
        *_targets(explanation),
    ]
    for number, graph in enumerate(explanation.graphs):
        body += _graph(explanation, number, graph)
    if not explanation.graphs:
        body.append("<p>No graph has been captured yet: call the model.</p>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(explanation.model)}, adapted</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(body)}</body></html>"
    )


def _facts(explanation: Explanation) -> Iterator[str]:
    count = sum(target.parameters for target in explanation.targets)
    frozen = sum(target.in_features * target.out_features for target in explanation.targets)
    yield from _table(
        (),
        [
            ("adapters", explanation.state()),
            ("targets", f"{len(explanation.targets)}, with {frozen:,} frozen weights"),
            ("vectors", f"{count:,} numbers in all adapters"),
            *(("projections", sizes) for sizes in explanation.projections),
            *(("parts", str(row)) for row in explanation.shared),
        ],
    )


def _targets(explanation: Explanation) -> Iterator[str]:
    """Every target, folded away; with its library and bits where the base is quantised."""
    makes = Counter(target.base for target in explanation.targets if target.base)
    header, rows = explanation.target_table()
    shown = ": " + ", ".join(f"{count} {make}" for make, count in makes.items()) if makes else ""
    yield f"<details><summary>targets{escape(shown)}</summary>"
    yield from _table(header, rows)
    yield "</details>"


def _graph(explanation: Explanation, number: int, graph: GraphRow) -> Iterator[str]:
    yield f"<h2>graph {number}, {escape(graph.mode)}: {len(graph.sites)} sites</h2>"
    yield f"<p><code>{escape(graph.signature)}</code></p>"
    yield svg_of(explanation, graph)
    yield "<details open><summary>plans, and why</summary>"
    yield from _table(("sites", "plan", "why (costs are modelled; factored is 1)"), _reasons(graph))
    yield "</details><details open><summary>passes</summary>"
    yield from _passes(graph)
    yield "</details>"
    skips = [(name, skip.subject, str(skip)) for name, skip in graph.report.skips()]
    if skips:
        yield "<details><summary>left alone</summary>"
        yield from _table(("by", "what", "why"), skips)
        yield "</details>"


def _reasons(graph: GraphRow) -> list[tuple[object, ...]]:
    counts = Counter((plan, str(why)) for _, plan, why in graph.plans)
    return [(count, plan, why) for (plan, why), count in counts.items()]


def _passes(graph: GraphRow) -> Iterator[str]:
    header = ("pass", "numerics", "rewrites", "skips", "nodes before", "after", "ms")
    rows = [
        (
            record.name,
            record.numerics.lower(),
            len(record.report.rewrites),
            len(record.report.skips),
            record.nodes_before,
            record.nodes_after,
            round(record.milliseconds),
        )
        for record in graph.report.records
    ]
    yield from _table(header, rows, idle=[not r.report.changed for r in graph.report.records])


def _table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, idle: Sequence[bool] = ()
) -> Iterator[str]:
    """A table; numbers stand at the right, and rows marked idle are grey."""
    yield "<table>"
    if header:
        yield f"<tr>{''.join(f'<th>{escape(word)}</th>' for word in header)}</tr>"
    for place, row in enumerate(rows):
        kind = ' class="idle"' if place < len(idle) and idle[place] else ""
        yield f"<tr{kind}>{''.join(map(_cell, row))}</tr>"
    yield "</table>"


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{escape(str(value))}</td>"
