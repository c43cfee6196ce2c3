"""`explain` as a picture: sites before and after side by side, repeated blocks folded."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vera_fx.branches.kinds import kind_named
from vera_fx.branches.protocol import PlanWords
from vera_fx.passes import Action

# `explain` imports this file, so its types are named in words only.
Explanation = Any
GraphRow = Any

COLOURS = {"factored": "#3f6fa3", "scaled": "#3d8142", "merged": "#b35c00", "dense": "#8a4f83"}
"""For each plan, in the order of the legend."""

_WIDTH, _ROW, _BAR = 1000, 24, 18
_NAME, _BEFORE, _AFTER, _BRACKET = 24, 222, 432, 416
_BOX, _WIDE, _FROZEN, _TRAINED = 170, 330, 880, 976
_LONGEST = 26


@dataclass(frozen=True, slots=True)
class Row:
    """One site as it is drawn.

    Attributes:
        name: the site's path within its layer.
        in_features: width of its input.
        out_features: width of its output.
        plan: how its branch is computed.
        words: how that is drawn.
        z: the site, within the layer, whose product ``x·Aᵀ`` it uses with others; or nothing.
        vectors: how many numbers all adapters have for it.
    """

    name: str
    in_features: int
    out_features: int
    plan: str
    words: PlanWords
    z: str
    vectors: int


@dataclass(frozen=True, slots=True)
class Block:
    """Equal neighbouring layers, drawn once."""

    title: str
    rows: tuple[Row, ...]
    layers: int = 1


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
    return tuple(
        Block(_title(prefix, numbers), rows, len(numbers)) for prefix, numbers, rows in runs
    )


def _rows(explanation: Explanation, graph: GraphRow) -> Iterator[tuple[str, int | None, Row]]:
    targets = {target.path: target for target in explanation.targets}
    plans = {site: plan for site, plan, _ in graph.plans}
    owners = _owners(graph, plans)
    words = kind_named(graph.kinds[0]).words
    for site, plan in plans.items():
        target = targets[site.partition("#")[0]]
        prefix, index, name = _place(site)
        z = _place(owners[site])[2] if site in owners else ""
        sizes = target.in_features, target.out_features
        yield prefix, index, Row(name, *sizes, plan, words[plan], z, target.parameters)


def _owners(graph: GraphRow, plans: dict[str, str]) -> dict[str, str]:
    """For each site that shares its product ``x·Aᵀ`` the first one that uses it, which is named, too."""
    found: dict[str, str] = {}
    for record in graph.report.records:
        for rewrite in record.report.rewrites:
            if rewrite.action is Action.SHARED and rewrite.role == "z":
                found |= {rewrite.other: rewrite.other, rewrite.subject: rewrite.other}
    return {site: owner for site, owner in found.items() if plans.get(site, "dense") != "dense"}


def _place(site: str) -> tuple[str, int | None, str]:
    """A site's path as what leads to its layer, the layer's number, and its path within."""
    found = re.match(r"(.*?)\.?\b(\d+)\.(.+)$", site)
    return (found[1], int(found[2]), found[3]) if found else ("", None, site)


def _title(prefix: str, numbers: Sequence[int | None]) -> str:
    if numbers[0] is None:
        return "outside of layers"
    if len(numbers) == 1:
        return f"{prefix}.{numbers[0]}".lstrip(".")
    return f"{prefix}.{numbers[0]} … {numbers[-1]}".lstrip(".") + f"  ({len(numbers)} equal layers)"


def svg_of(explanation: Explanation, graph: GraphRow) -> str:
    """One graph as a picture of its own."""
    found = blocks(explanation, graph)
    parts, y = _head(), 44
    for block in found:
        parts += _block(block, y)
        y += _ROW * (len(block.rows) + 1) + 18
    legend = _legend(found, y + 8)
    height = y + 20 * len(legend) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join([*parts, *legend])}</svg>'
    )


_STYLE = (
    "text{font:12px sans-serif;fill:#222222}.head{font-weight:bold}.title{font-weight:bold}"
    ".block{fill:#f7f7f7;stroke:#cccccc}.base{fill:#dddddd}.on{fill:#ffffff}.end{text-anchor:end}"
    ".bracket{fill:none;stroke:#222222;stroke-width:1.5}.quiet{fill:#555555}"
)


def _head() -> list[str]:
    columns = ((_NAME, "site"), (_BEFORE, "before"), (_AFTER, "after"))
    ends = ((_FROZEN, "frozen"), (_TRAINED, "vectors"))
    return [_text(x, 26, word, "head") for x, word in columns] + [
        _text(x, 26, word, "head end") for x, word in ends
    ]


def _block(block: Block, y: int) -> list[str]:
    height = _ROW * (len(block.rows) + 1) + 10
    frozen = sum(row.in_features * row.out_features for row in block.rows)
    vectors = sum(row.vectors for row in block.rows)
    each = "each layer: " if block.layers > 1 else ""
    parts = [
        f'<rect x="8" y="{y}" width="{_WIDTH - 16}" height="{height}" rx="4" class="block"/>',
        _text(_NAME - 8, y + 17, block.title, "title"),
        _text(_FROZEN, y + 17, f"{each}{frozen:,}", "end quiet"),
        _text(_TRAINED, y + 17, f"{vectors:,}", "end quiet"),
    ]
    tops = [y + _ROW * (number + 1) + 2 for number in range(len(block.rows))]
    for row, top in zip(block.rows, tops, strict=True):
        parts += _row(row, top)
    for owner in dict.fromkeys(row.z for row in block.rows if row.z):
        joined = [top for row, top in zip(block.rows, tops, strict=True) if row.z == owner]
        parts += _bracket(joined)
    return parts


def _row(row: Row, y: int) -> list[str]:
    base = f"linear {row.in_features} → {row.out_features}"
    colour, formula = COLOURS[row.plan], row.words.formula
    return [
        f"<g><title>{escape(row.name)}</title>{_text(_NAME, y + 13, _short(row.name))}</g>",
        _bar(_BEFORE, y, _BOX, "base"),
        _text(_BEFORE + 6, y + 13, base),
        _bar(_AFTER, y, _WIDE, "site", f' fill="{colour}"'),
        _text(_AFTER + 6, y + 13, f"{base}  {formula}", "on"),
        _text(_AFTER + _WIDE - 6, y + 13, row.plan, "on end"),
        _text(_FROZEN, y + 13, f"{row.in_features * row.out_features:,}", "end"),
        _text(_TRAINED, y + 13, f"{row.vectors:,}", "end"),
    ]


def _bar(x: int, y: int, width: int, kind: str, fill: str = "") -> str:
    size = f'width="{width}" height="{_BAR}"'
    return f'<rect x="{x}" y="{y}" {size} rx="3" class="{kind}"{fill}/>'


def _bracket(tops: Sequence[int]) -> list[str]:
    """Joins the sites that use one product ``z``."""
    if len(tops) < 2:  # noqa: PLR2004  # the others of its group use no z
        return []
    middles = [top + _BAR // 2 for top in tops]
    path = f"M{_BRACKET} {middles[0]}V{middles[-1]}" + "".join(
        f"M{_BRACKET} {y}H{_AFTER - 2}" for y in middles
    )
    return [
        f'<path d="{path}" class="bracket"/>',
        _text(_BRACKET - 4, (middles[0] + middles[-1]) // 2 + 4, "z", "end"),
    ]


def _legend(found: Sequence[Block], y: int) -> list[str]:
    rows = [row for block in found for row in block.rows]
    lines: list[str] = []
    used = {row.plan: row.words for row in rows}
    for plan in (plan for plan in COLOURS if plan in used):
        colour, words = COLOURS[plan], used[plan]
        top = y + 20 * len(lines)
        lines.append(
            f'<rect x="{_NAME - 8}" y="{top}" width="12" height="12" rx="2" fill="{colour}"/>'
            + _text(
                _NAME + 12, top + 10, f"{plan}: linear {words.formula}, {words.meaning}", "quiet"
            )
        )
    if any(row.z for row in rows):
        words = "z = x·Aᵀ is computed once for the sites that a bracket joins"
        lines.append(_text(_NAME + 12, y + 20 * len(lines) + 10, words, "quiet"))
    return lines


def _short(name: str) -> str:
    """The end of a name that is too long for its column."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>' if text else ""
