"""Messages handled around a kill, drawn: as an SVG, and as bars of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from .figures import STEP, Timeline

__all__ = ["ASCII", "BLOCKS", "Panel", "draw", "text_bars"]

#: Heights of a bar of text, from none to full.
BLOCKS: Final = " ▁▂▃▄▅▆▇█"
#: The same for terminals that have no others.
ASCII: Final = " .:-=+*%#"

_WIDTH: Final = 760
_LEFT: Final = 64
_RIGHT: Final = 24
_TOP: Final = 62
#: From one panel to the next, and how much of it bars may fill.
_PITCH: Final = 128
_HEIGHT: Final = 78
_BOTTOM: Final = 44
#: Seconds between two numbers below.
_TICK: Final = 1

_STYLE: Final = """
  svg { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
  .name { font-weight: 600; font-size: 13px; }
  .paper { fill: #ffffff; } text { fill: #1f2328; } .quiet { fill: #59636e; }
  .axis { stroke: #818b98; } .grid { stroke: #d1d9e0; } .bar { fill: #3b7dd8; } .late { fill: #e07b00; }
  .kill { stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 4 3; } .killed { fill: #cf222e; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117; } text { fill: #e6edf3; } .quiet { fill: #9198a1; }
    .axis { stroke: #656c76; } .grid { stroke: #2a313c; } .bar { fill: #4f8ff0; } .late { fill: #f0a030; }
    .kill { stroke: #ff7b72; } .killed { fill: #ff7b72; }
  }
"""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One contender's part of a drawing."""

    #: Who.
    name: str
    #: What it came to.
    verdict: str
    timeline: Timeline


def text_bars(timeline: Timeline, peak: int, blocks: str = BLOCKS) -> tuple[str, str]:
    """Return two lines of text: a bar for each step with a `|` at the kill, and marks below.

    Args:
        timeline: what to draw.
        peak: how many messages fill a bar.
        blocks: characters for heights from none to full.

    Returns:
        The bars; and below them a `^` for each step after the kill that handled something sent before it.
    """
    ahead = round(-timeline.start / STEP)
    top = len(blocks) - 1
    bars = [blocks[min(-(-count * top // max(peak, 1)), top)] for count in timeline.handled]
    marks = ["^" if count else " " for count in timeline.late]
    return (
        "".join([*bars[:ahead], "|", *bars[ahead:]]).rstrip(),
        "".join([*marks[:ahead], " ", *marks[ahead:]]).rstrip(),
    )


def draw(panels: Sequence[Panel]) -> str:
    """Return an SVG of one panel for each contender below the other, on common axes. Readable on light and on dark."""
    start = min(panel.timeline.start for panel in panels)
    end = max(panel.timeline.start + STEP * len(panel.timeline.handled) for panel in panels)
    peak = max(max(panel.timeline.handled, default=0) for panel in panels)
    scale = _Scale(start, max(end, start + STEP), max(peak, 1))
    height = _TOP + _PITCH * len(panels) - (_PITCH - _HEIGHT - 22) + _BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-label="Messages handled over time around a kill -9">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
        *_legend(),
    ]
    for number, panel in enumerate(panels):
        lines += _panel(panel, scale, _TOP + _PITCH * number + 22)
    foot = _TOP + _PITCH * (len(panels) - 1) + 22 + _HEIGHT
    lines += _seconds(scale, foot)
    middle = (_TOP + 22 + foot) / 2
    lines.append(
        f'<text class="quiet" text-anchor="middle" transform="translate(16 {middle:g}) rotate(-90)">'
        f"messages handled in each {STEP:g} s</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


@dataclass(frozen=True)
class _Scale:
    start: float
    end: float
    peak: int

    def x(self, seconds: float) -> float:
        return _LEFT + (seconds - self.start) / (self.end - self.start) * (_WIDTH - _LEFT - _RIGHT)

    def height(self, count: int) -> float:
        return count / self.peak * _HEIGHT


def _legend() -> Iterator[str]:
    yield f'<text class="name" x="{_LEFT}" y="24">Messages handled around a kill -9 of one of two workers</text>'
    yield f'<rect class="bar" x="{_LEFT}" y="36" width="10" height="10"/>'
    yield f'<text class="quiet" x="{_LEFT + 15}" y="45">handled</text>'
    yield f'<rect class="late" x="{_LEFT + 80}" y="36" width="10" height="10"/>'
    yield f'<text class="quiet" x="{_LEFT + 95}" y="45">of these, sent before the kill and handled after it</text>'


def _panel(panel: Panel, scale: _Scale, top: float) -> Iterator[str]:
    foot, right = top + _HEIGHT, _WIDTH - _RIGHT
    yield f'<text class="name" x="{_LEFT}" y="{top - 8:g}">{escape(panel.name)}</text>'
    yield f'<text x="{right}" y="{top - 8:g}" text-anchor="end">{escape(panel.verdict)}</text>'
    yield f'<path class="grid" d="M{_LEFT} {top:g}H{right}"/>'
    for count, y in ((scale.peak, top), (0, foot)):
        yield f'<text class="quiet" x="{_LEFT - 8}" y="{y + 4:g}" text-anchor="end">{count}</text>'
    for place, (count, late) in enumerate(zip(panel.timeline.handled, panel.timeline.late, strict=True)):
        left = scale.x(panel.timeline.start + place * STEP)
        width = scale.x(panel.timeline.start + (place + 1) * STEP) - left
        for kind, number in (("bar", count), ("late", late)):
            if number:
                tall = scale.height(number)
                yield (
                    f'<rect class="{kind}" x="{left + 1:.1f}" y="{foot - tall:.1f}" '
                    f'width="{width - 2:.1f}" height="{tall:.1f}"/>'
                )
    yield f'<path class="axis" d="M{_LEFT} {foot:g}H{right}"/>'
    yield f'<path class="kill" d="M{scale.x(0):.1f} {top - 4:g}V{foot:g}"/>'


def _seconds(scale: _Scale, foot: float) -> Iterator[str]:
    """Number the axis below: every few seconds, and the kill by its name."""
    steps = range(round(scale.start), round(scale.end) + 1)
    every = _TICK if len(steps) <= 24 else 5
    for second in steps:
        if second % every == 0 and scale.start <= second <= scale.end:
            kind, text = ("killed", "kill") if second == 0 else ("quiet", f"{second:+d}")
            yield f'<text class="{kind}" x="{scale.x(second):.1f}" y="{foot + 17:g}" text-anchor="middle">{text}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield f'<text class="quiet" x="{middle:g}" y="{foot + 35:g}" text-anchor="middle">seconds from the kill</text>'
