"""Bar charts as SVG, by hand: small, the same to the letter for the same figures, legible in light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _TOP = 760, 330, 60, 13, 9, 62

_STYLE = """<style>
.paper{fill:#ffffff} text{font:12px sans-serif;fill:#1f2328} .title{font-weight:bold;font-size:14px}
.end{text-anchor:end} .s0{fill:#1f6feb} .s1{fill:#8c959f} .mark{stroke:#1f2328;stroke-dasharray:3 3}
@media (prefers-color-scheme: dark) { .paper{fill:#1c2128} text{fill:#e6edf3} .s0{fill:#58a6ff}
.s1{fill:#768390} .mark{stroke:#e6edf3} }
</style>"""


@dataclass(frozen=True)
class Bars:
    """One group of bars: what it is called, and a value for each series."""

    label: str
    values: tuple[float, ...]


def drawn(
    title: str,
    groups: Sequence[Bars],
    series: Sequence[str],
    *,
    mark: float | None = None,
    logarithmic: bool = False,
) -> str:
    """A chart of horizontal bars with their numbers; ``mark`` is a dashed line at a value."""
    most = max(mark or 0.0, *(value for group in groups for value in group.values))

    def width(value: float) -> float:
        share = math.log(max(value, 1.0)) / math.log(most) if logarithmic else value / most
        return round((_WIDTH - _LEFT - _RIGHT) * share, 1)

    y, parts = float(_TOP), []
    for group in groups:
        middle = y + _BAR * len(group.values) / 2 + 4
        parts.append(
            f'<text class="end" x="{_LEFT - 8}" y="{middle:g}">{escape(group.label)}</text>'
        )
        for number, value in enumerate(group.values):
            long = width(value)
            parts.append(
                f'<rect class="s{number}" x="{_LEFT}" y="{y:g}" width="{long:g}" height="{_BAR - 1}"/>'
                f'<text class="end" x="{_WIDTH - 12}" y="{y + 10:g}">{_shown(value)}</text>'
            )
            y += _BAR
        y += _GAP
    if mark is not None:
        x = _LEFT + width(mark)
        parts.insert(0, f'<path class="mark" d="M{x:g} {_TOP - 6}V{y:g}"/>')
    head = _head(title + (" (logarithmic)" if logarithmic else ""), series)
    body = "\n".join(
        [_STYLE, f'<rect class="paper" width="{_WIDTH}" height="{y:g}" rx="6"/>', *head, *parts]
    )
    size = f'viewBox="0 0 {_WIDTH} {y:g}" width="{_WIDTH}" height="{y:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{body}\n</svg>\n'


def _head(title: str, series: Sequence[str]) -> list[str]:
    parts = [
        f'<title>{escape(title)}</title><text class="title" x="16" y="24">{escape(title)}</text>'
    ]
    for number, name in enumerate(series):
        x = 16 + 110 * number
        parts.append(
            f'<rect class="s{number}" x="{x}" y="36" width="12" height="12"/>'
            f'<text x="{x + 18}" y="46">{escape(name)}</text>'
        )
    return parts


def _shown(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value == round(value)
        else f"{value:.2f}"
        if value < 2
        else f"{value:.1f}"
    )
