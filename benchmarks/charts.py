"""Small charts as SVG, which follow the reader's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, ROW, TOP, LEFT, RIGHT = 760, 30, 56, 290, 80

_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
.title { font-size: 15px; font-weight: 600 }
.small { font-size: 11px; fill: #57606a }
.ours { fill: #0969da } .beside { fill: #8c959f } .base { fill: #57606a }
.spread { stroke: #24292f; stroke-width: 1.5 } .grid { stroke: #d0d7de }
.line { stroke-width: 6; stroke-linecap: round; opacity: .55 }
line.ours { stroke: #0969da } line.beside { stroke: #8c959f } line.base { stroke: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 }
  .ours { fill: #4493f8 } .beside { fill: #656c76 } .base { fill: #9198a1 }
  .spread { stroke: #e6edf3 } .grid { stroke: #3d444d }
  line.ours { stroke: #4493f8 } line.beside { stroke: #656c76 } line.base { stroke: #9198a1 }
}
"""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of a chart. `low` and `high` are the spread; where there is no value, `told` says why."""

    name: str
    detail: str
    #: `ours`, `base` (what others are compared with) or `beside`.
    role: str
    value: float | None
    low: float = 0.0
    high: float = 0.0
    told: str = ""


def bar_chart(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """Return a chart of bars from zero, with a whisker for the spread and the value beside it."""
    most = max((bar.high for bar in bars if bar.value is not None), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / most

    def draw(bar: Bar, y: float) -> list[str]:
        if bar.value is None:
            return []
        end, low, high = (LEFT + max(0.0, value) * scale for value in (bar.value, bar.low, bar.high))
        middle = y + ROW / 2
        return [
            f'<rect class="{bar.role}" x="{LEFT}" y="{y + 6}" width="{max(end - LEFT, 1):.1f}" height="{ROW - 12}"/>',
            f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
            _text(max(high, end) + 8, middle, bar.told),
        ]

    return _chart(title, f"{unit}; median, and the spread of the rounds", bars, draw, [])


def range_chart(title: str, unit: str, bars: Sequence[Bar]) -> str:
    """Return a chart of ranges on a logarithmic scale: from `low` over a dot at `value` to `high`."""
    shown = [bar for bar in bars if bar.value is not None and bar.low > 0]
    first = math.floor(math.log10(min((bar.low for bar in shown), default=1.0)))
    last = max(math.ceil(math.log10(max((bar.high for bar in shown), default=10.0))), first + 1)
    step = (WIDTH - LEFT - RIGHT) / (last - first)

    def at(value: float) -> float:
        return LEFT + (math.log10(value) - first) * step

    def draw(bar: Bar, y: float) -> list[str]:
        if bar not in shown or bar.value is None:
            return []
        low, value, high = at(bar.low), at(bar.value), at(bar.high)
        middle = y + ROW / 2
        return [
            f'<line class="line {bar.role}" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<circle class="{bar.role}" cx="{value:.1f}" cy="{middle}" r="6"/>',
            _text(high + 10, middle, bar.told),
        ]

    ticks = [(at(10.0**power), f"{10.0**power:g}") for power in range(first, last + 1)]
    return _chart(title, unit, bars, draw, ticks)


def _chart(
    title: str,
    subtitle: str,
    bars: Sequence[Bar],
    draw: Callable[[Bar, float], list[str]],
    ticks: Sequence[tuple[float, str]],
) -> str:
    bottom = TOP + ROW * len(bars)
    height = bottom + (26 if ticks else 10)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="8" y="20">{escape(title)}</text>',
        f'<text class="small" x="8" y="38">{escape(subtitle)}</text>',
    ]
    for x, told in ticks:
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{told}</text>')
    for number, bar in enumerate(bars):
        y = TOP + ROW * number
        parts.append(f'<text x="{LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(bar.name)}</text>')
        parts.append(
            f'<text class="small" x="{LEFT - 10}" y="{y + 25}" text-anchor="end">{escape(_short(bar.detail))}</text>'
        )
        parts += draw(bar, y) or [_text(LEFT + 4, y + ROW / 2, bar.told)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _short(text: str, most: int = 46) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(x: float, middle: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{middle + 4.5:.1f}">{escape(text)}</text>'
