"""The page and its charts tell all that was found, the bad as well as the good."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.charts import Bar, bar_chart, range_chart
from benchmarks.report import number, render, write_report
from benchmarks.results import read_results


def test_a_row_has_median_spread_and_ratios(results_of) -> None:
    results = results_of(
        "handle-one",
        *[("stock Celery", n, {"rate": 1000}) for n in (1, 2, 3)],
        *[("watch_tasks", n, {"rate": 1000 * n}) for n in (1, 2, 3)],
        *[("Huey", n, {"rate": 4000}) for n in (1, 2, 3)],
        *[("Taskiq (streams)", n, {"rate": 500}) for n in (1, 2, 3)],
    )

    page = render(results)

    assert "| watch_tasks | solo | 2,000 | 1,000 to 3,000 | 2.00 | 0.50 | 1,000 |" in page
    assert "| Huey | solo | 4,000 | 4,000 to 4,000 | 4.00 | 1.00 | 1,000 |" in page


def test_where_a_peer_wins_is_told(results_of) -> None:
    results = results_of("handle-one", ("watch_tasks", 1, {"rate": 1000}), ("Huey", 1, {"rate": 4000}))

    won = render(results).partition("## Where a peer wins")[2].partition("## What is not equal")[0]

    assert "| Handle a no-op, one process | messages/s | Huey | 4,000 | 1,000 | watch_tasks | 4.00 | 1 of 1 |" in won


def test_where_no_peer_wins_is_told(results_of) -> None:
    results = results_of("handle-one", ("watch_tasks", 1, {"rate": 5000}), ("Huey", 1, {"rate": 4000}))

    assert "In no figure of this run is another library ahead" in render(results)


def test_a_failure_is_told_beside_the_table_and_on_top(results_of) -> None:
    results = results_of("handle-one", ("watch_tasks", 1, {"rate": 5000}), ("RQ", 1, "a worker ended: No module"))

    page = render(results)

    assert "| RQ | solo | failed |" in page
    assert "- RQ (solo) failed in round 1 of 1: a worker ended: No module" in page
    assert "Measurements failed, and are in no figure: RQ (solo) in Handle a no-op, one process." in page


def test_messages_handled_twice_are_told(results_of) -> None:
    results = results_of("handle-one", ("Dramatiq", 1, {"rate": 5000, "repeated": 3}))

    assert "- Dramatiq (solo) handled 3 messages more than once" in render(results)


def test_a_sender_that_does_not_keep_up_is_told(results_of) -> None:
    results = results_of("latency", ("Dramatiq", 1, {"rate": 400, "p50": 1.0, "p99": 2.0, "max": 3.0}))
    results.latency_rate = 500.0

    assert "sent only 400 messages/s" in render(results)


def test_page_and_charts_are_written_from_a_file(results_of, tmp_path) -> None:
    results_of("memory", ("watch_tasks", 1, {"idle": 90.0, "peak": 95.5, "growth": -3.0})).write(tmp_path / "r.json")

    page = write_report(read_results(tmp_path / "r.json"), tmp_path)

    assert "![Memory, two processes](benchmarks/memory.svg)" in page.read_text()
    ElementTree.parse(tmp_path / "benchmarks" / "memory.svg")


@pytest.mark.parametrize("draw", [bar_chart, range_chart])
@pytest.mark.parametrize(
    "bars",
    [
        [],
        [Bar(name="a<b", detail='"quoted" & more', role="ours", value=3.0, low=1.0, high=4.0, told="3")],
        [Bar(name="a", detail="", role="base", value=None, told="failed")],
        [Bar(name="a", detail="", role="beside", value=0.0, told="0")],
    ],
)
def test_a_chart_is_well_formed(draw, bars) -> None:
    assert ElementTree.fromstring(draw('of "a" & <b>', "ms", bars)).tag.endswith("svg")


@pytest.mark.parametrize(
    ("value", "told"),
    [(66123.4, "66,123"), (581.2, "581"), (34.56, "34.6"), (0.684, "0.68"), (-250.4, "-250")],
)
def test_a_figure_has_the_digits_that_can_be_told_apart(value, told) -> None:
    assert number(value) == told
