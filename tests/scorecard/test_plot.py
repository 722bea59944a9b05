"""The drawing: well formed, one bar for each count, and nothing of a name can break it."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from watch_tasks.scorecard.figures import Timeline
from watch_tasks.scorecard.plot import ASCII, Panel, draw, text_bars

TIMELINE = Timeline(start=-1.0, handled=(4, 8, 0, 2, 8), late=(0, 0, 0, 1, 0))
SVG = "{http://www.w3.org/2000/svg}"


def panel(name: str = "ours", timeline: Timeline = TIMELINE) -> Panel:
    return Panel(name=name, verdict="1 not handled within 30 s of the kill", timeline=timeline)


def bars(root: ElementTree.Element, kind: str) -> list[float]:
    """Return the heights of the bars of one kind, without the legend's."""
    found = [rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == kind]
    return [float(rect.get("height", "")) for rect in found[1:]]


class TestText:
    def test_bars_stand_on_both_sides_of_the_kill_with_marks_below(self) -> None:
        assert text_bars(TIMELINE, peak=8) == ("▄█| ▂█", "    ^")

    def test_a_single_message_is_seen_beside_many(self) -> None:
        assert text_bars(Timeline(start=0.0, handled=(1, 1000), late=(0, 0)), peak=1000) == ("|▁█", "")

    def test_it_goes_without_unicode(self) -> None:
        text, marks = text_bars(TIMELINE, 8, ASCII)

        assert (text + marks).isascii()

    def test_nothing_handled_is_an_empty_line(self) -> None:
        assert text_bars(Timeline(start=-0.5, handled=(0, 0), late=(0, 0)), peak=0) == (" |", "")


class TestSvg:
    def test_has_a_bar_for_each_count_in_proportion(self) -> None:
        root = ElementTree.fromstring(draw([panel()]))

        heights = bars(root, "bar")
        assert [round(height / max(heights) * 8) for height in heights] == [4, 8, 2, 8]
        assert len(bars(root, "late")) == 1

    def test_panels_share_their_axes(self) -> None:
        small = Timeline(start=-1.0, handled=(4,), late=(0,))

        heights = bars(ElementTree.fromstring(draw([panel(), panel(timeline=small)])), "bar")

        assert heights[-1] == heights[0]

    def test_says_who_what_and_where_the_kill_was(self) -> None:
        root = ElementTree.fromstring(draw([panel("A & <B>"), panel("C")]))

        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert {"A & <B>", "C", "kill", "seconds from the kill", "messages handled in each 0.5 s"} <= set(texts)
        assert texts.count("1 not handled within 30 s of the kill") == 2

    def test_everything_lies_within_it(self) -> None:
        root = ElementTree.fromstring(draw([panel(), panel()]))

        _, _, width, height = map(float, root.get("viewBox", "").split())
        for text in root.iter(f"{SVG}text"):
            if text.get("x"):
                assert 0 <= float(text.get("x", "")) <= width
                assert 0 <= float(text.get("y", "")) <= height - 4

    def test_has_colours_for_the_light_and_for_the_dark(self) -> None:
        assert "prefers-color-scheme: dark" in draw([panel()])

    @pytest.mark.parametrize("handled", [(), (0, 0), (1,)])
    def test_draws_next_to_nothing_too(self, handled: tuple[int, ...]) -> None:
        timeline = Timeline(start=-0.5, handled=handled, late=(0,) * len(handled))

        ElementTree.fromstring(draw([panel(timeline=timeline)]))
