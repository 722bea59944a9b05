"""Medians, ratios within a round, and who is ahead."""

from __future__ import annotations

import pytest

from benchmarks.figures import best, compare, ratio, rows
from benchmarks.scenarios import SCENARIOS

BY_NAME = {one.name: one for one in SCENARIOS}


def compared(results, scenario, other, figure="rate"):
    found = compare(results, [BY_NAME[scenario]])
    (one,) = [one for one in found if one.other == other and one.figure == figure and one.ours == "watch_tasks"]
    return one


def test_a_ratio_is_the_median_of_those_within_a_round() -> None:
    # 2, 3 and 8 within the rounds; of the medians it would be 40 / 10 = 4
    assert ratio({1: 20.0, 2: 90.0, 3: 40.0}, {1: 10.0, 2: 30.0, 3: 5.0}) == 3


def test_rounds_that_only_one_of_two_has_are_in_no_ratio() -> None:
    assert ratio({1: 20.0, 3: 40.0}, {1: 10.0, 2: 30.0}) == 2


@pytest.mark.parametrize("base", [{}, {2: 1.0}, {1: 0.0}, {1: -3.0}])
def test_there_is_no_ratio_to_what_was_not_found_or_is_not_above_zero(base) -> None:
    assert ratio({1: 20.0}, base) is None


def test_the_best_of_several_pools_is_chosen_in_each_round(results_of) -> None:
    one = results_of("handle-two", ("stock Celery", 1, {"rate": 5, "p99": 5}), ("stock Celery", 2, {"rate": 9}))
    other = results_of("handle-two", ("stock Celery", 1, {"rate": 7, "p99": 7}), pool="prefork")

    table = rows([*one.found, *other.found])

    assert best(table, "rate") == {1: 7, 2: 9}
    assert best(table, "p99") == {1: 5}


def test_a_peer_with_a_higher_rate_is_ahead(results_of) -> None:
    results = results_of(
        "handle-one",
        ("watch_tasks", 1, {"rate": 100}),
        ("Huey", 1, {"rate": 300}),
        ("watch_tasks", 2, {"rate": 200}),
        ("Huey", 2, {"rate": 180}),
        ("watch_tasks", 3, {"rate": 100}),
        ("Huey", 3, {"rate": 200}),
    )

    one = compared(results, "handle-one", "Huey")

    assert one.is_lost
    assert (one.times, one.ahead_in, one.rounds) == (2, 2, 3)


def test_a_peer_with_a_longer_latency_is_not_ahead(results_of) -> None:
    results = results_of("latency", ("watch_tasks", 1, {"p99": 2.0}), ("Huey", 1, {"p99": 3.0}))

    assert not compared(results, "latency", "Huey", "p99").is_lost


def test_a_peer_that_grows_less_is_ahead_though_no_ratio_can_be_told(results_of) -> None:
    results = results_of("memory", ("watch_tasks", 1, {"growth": 200.0}), ("Huey", 1, {"growth": -20.0}))

    one = compared(results, "memory", "Huey", "growth")

    assert one.is_lost
    assert one.times is None or one.times < 0


def test_what_is_behind_by_its_median_and_ahead_within_the_rounds_is_told_to_be_ahead(results_of) -> None:
    results = results_of(
        "handle-one",
        ("watch_tasks", 1, {"rate": 100}),
        ("Huey", 1, {"rate": 110}),
        ("watch_tasks", 2, {"rate": 500}),
        ("Huey", 2, {"rate": 120}),
        ("watch_tasks", 3, {"rate": 1000}),
        ("Huey", 3, {"rate": 2000}),
    )

    one = compared(results, "handle-one", "Huey")

    assert one.other_value < one.our_value
    assert one.is_lost


def test_what_failed_is_in_no_comparison_and_keeps_its_error(results_of) -> None:
    results = results_of("handle-one", ("watch_tasks", 1, {"rate": 100}), ("RQ", 1, "a worker ended"))

    assert not compare(results, [BY_NAME["handle-one"]])
    assert rows(results.found)[-1].errors == {"a worker ended": [1]}
