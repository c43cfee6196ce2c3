"""`explain` as a picture: sites before and after side by side, repeated blocks folded."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

# `explain` imports this file, so its types are named in words only.
Explanation = Any
GraphRow = Any

_COLOURS = {"factored": "#4e79a7", "scaled": "#59a14f", "merged": "#f28e2b", "dense": "#b07aa1"}
_ROW, _WIDTH, _BOX, _WIDE = 22, 940, 300, 380
_LEFT, _RIGHT, _LABEL = 20, 540, 328


@dataclass(frozen=True, slots=True)
class Row:
    """One site as it is drawn."""

    name: str
    in_features: int
    out_features: int
    plan: str
    shared: bool


@dataclass(frozen=True, slots=True)
class Block:
    """Equal neighbouring layers, drawn once."""

    title: str
    rows: tuple[Row, ...]


def blocks(explanation: Explanation, graph: GraphRow) -> tuple[Block, ...]:
    """The graph's sites by layer; neighbouring layers with equal rows become one block."""
    layers: dict[tuple[str, int | None], list[Row]] = {}
    for prefix, index, row in _rows(explanation, graph):
        layers.setdefault((prefix, index), []).append(row)
    runs: list[tuple[str, list[int | None], tuple[Row, ...]]] = []
    for (prefix, index), rows in layers.items():
        last = runs[-1] if runs else None
        if last is not None and last[0] == prefix and last[2] == tuple(rows) and index is not None:
            last[1].append(index)
        else:
            runs.append((prefix, [index], tuple(rows)))
    return tuple(Block(_title(prefix, numbers), rows) for prefix, numbers, rows in runs)


def _rows(explanation: Explanation, graph: GraphRow) -> Iterator[tuple[str, int | None, Row]]:
    targets = {target.path: target for target in explanation.targets}
    shared = {
        rewrite.subject
        for record in graph.report.records
        if record.name == "ShareProjection"
        for rewrite in record.report.rewrites
        if rewrite.action.startswith("z ")
    }
    for site, plan, _ in graph.plans:
        target = targets[site.partition("#")[0]]
        found = re.match(r"(.*?)\.?\b(\d+)\.(.+)$", site)
        prefix, index, name = (found[1], int(found[2]), found[3]) if found else ("", None, site)
        sizes = target.in_features, target.out_features
        yield prefix, index, Row(name, *sizes, plan, site in shared)


def _title(prefix: str, numbers: Sequence[int | None]) -> str:
    if numbers[0] is None:
        return ""
    if len(numbers) == 1:
        return f"{prefix}.{numbers[0]}".lstrip(".")
    return f"{prefix}.{numbers[0]} … {numbers[-1]}".lstrip(".") + f"  ({len(numbers)} equal layers)"


def svg_of(explanation: Explanation, graph: GraphRow) -> str:
    """One graph as a picture of its own."""
    parts: list[str] = []
    y = 44
    for block in blocks(explanation, graph):
        height = _ROW * (len(block.rows) + 1) + 8
        parts.append(f'<rect x="8" y="{y}" width="{_WIDTH - 16}" height="{height}" class="block"/>')
        parts.append(_text(16, y + 15, block.title, "title"))
        for number, row in enumerate(block.rows):
            parts += _row(row, y + _ROW * (number + 1))
        y += height + 8
    head = [_text(_LEFT, 26, "before", "head"), _text(_RIGHT, 26, "after", "head")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 4}" '
        f'viewBox="0 0 {_WIDTH} {y + 4}" role="img"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join([*head, *parts])}</svg>'
    )


_STYLE = (
    "text{font:12px sans-serif;fill:#222222}.head{font-weight:bold;font-size:14px}"
    ".title{font-weight:bold}.block{fill:#f6f6f6;stroke:#cccccc}.base{fill:#dddddd}.on{fill:#ffffff}"
)


def _row(row: Row, y: int) -> list[str]:
    base = f"linear {row.in_features} → {row.out_features}"
    plan = f"+ VeRA, {row.plan}" + (", shared x·Aᵀ" if row.shared else "")
    fill = _COLOURS.get(row.plan, "#777777")
    return [
        f'<rect x="{_LEFT}" y="{y}" width="{_BOX}" height="18" rx="3" class="base"/>',
        _text(_LEFT + 6, y + 13, base),
        _text(_LABEL, y + 13, row.name),
        f'<rect x="{_RIGHT}" y="{y}" width="{_WIDE}" height="18" rx="3" fill="{fill}"/>',
        _text(_RIGHT + 6, y + 13, f"{base}  {plan}", "on"),
    ]


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>' if text else ""


def html_of(explanation: Explanation) -> str:
    """A page of its own: every graph as a picture, with passes, skips and reasons."""
    names = ", ".join(explanation.adapters) or "none"
    active = ", ".join(explanation.active) or "none"
    count = sum(target.parameters for target in explanation.targets)
    line = f"adapters: {names} (active: {active}); {len(explanation.targets)} targets, {count:,} numbers"
    body = ["<h1>vera_fx</h1>", f"<p>{escape(line)} in vectors</p>"]
    for number, graph in enumerate(explanation.graphs):
        body += [
            f"<h2>graph {number}, {escape(graph.mode)}</h2>",
            f"<p><code>{escape(graph.signature)}</code></p>",
            svg_of(explanation, graph),
            f"<pre>{escape(str(graph.report))}</pre>",
            _reasons(graph),
        ]
    if not explanation.graphs:
        body.append("<p>No graph has been captured yet: call the model.</p>")
    style = "body{font-family:sans-serif;margin:24px}pre{background:#f6f6f6;padding:8px}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vera_fx</title>'
        f"<style>{style}</style></head><body>{''.join(body)}</body></html>"
    )


def _reasons(graph: GraphRow) -> str:
    counts: dict[tuple[str, str], int] = {}
    for _, plan, why in graph.plans:
        counts[plan, why] = counts.get((plan, why), 0) + 1
    lines = [f"{count} sites {plan}: {why}" for (plan, why), count in counts.items()]
    lines += [f"{n} left {s.subject} alone: {s.reason}" for n, s in graph.report.skips()]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
