"""What a run is made of: lines, how many messages each gets, what messages carry."""

from __future__ import annotations

import time

import pytest

from benchmarks.__main__ import count_of
from benchmarks.contenders import CONTENDERS
from benchmarks.scenarios import SCENARIOS, Kind
from benchmarks.send import Bodies

NAMES = [one.name for one in CONTENDERS]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_every_contender_is_in_every_scenario(scenario) -> None:
    found = {line.contender.name for line in scenario.lines(NAMES)}

    assert found | {"watch_tasks, bulk"} == set(NAMES)


@pytest.mark.parametrize("scenario", [one for one in SCENARIOS if one.pools], ids=lambda one: one.name)
def test_all_have_the_same_number_of_processes_that_handle(scenario) -> None:
    assert {line.pool.processes for line in scenario.lines(NAMES) if line.pool} == {2 if scenario.pools == "two" else 1}


def test_a_line_gets_as_many_messages_as_took_it_the_time_in_the_round_before(results_of) -> None:
    line = next(one for scenario in SCENARIOS if scenario.name == "handle-one" for one in scenario.lines(NAMES))
    results = results_of("handle-one", ("RQ", 1, {"rate": 1}))

    assert count_of(line, results, None, 1.0) == 1000
    assert count_of(line, results, 3000.0, 1.0) == 6000
    assert count_of(line, results, 1.0, 1.0) == 100


def test_bulk_is_of_many_packets(results_of) -> None:
    lines = [one for scenario in SCENARIOS for one in scenario.lines(["watch_tasks, bulk"])]
    results = results_of("handle-two", ("watch_tasks, bulk", 1, {"rate": 1}))

    for rate in (None, 100.0):
        counts = {line.scenario.name: count_of(line, results, rate, 1.0) for line in lines}
        # Two packets at least for each that is handled at a time.
        assert counts == {"handle-two": 20_000, "io": 100_000, "cpu": 20_000}


def test_latency_is_measured_with_the_same_messages_for_all(results_of) -> None:
    scenario = next(one for one in SCENARIOS if one.kind is Kind.LATENCY)
    results = results_of("latency", ("RQ", 1, {"rate": 1}))
    results.latency_rate = 400.0

    assert {count_of(line, results, rate, 1.0) for line in scenario.lines(NAMES) for rate in (None, 9.0)} == {1600}


def test_messages_are_numbered_and_carry_their_payload() -> None:
    assert [*Bodies(2, 5, 3, None, 0)] == [[5, "xxx"], [6, "xxx"]]


def test_at_a_rate_messages_carry_when_they_were_sent() -> None:
    before = time.monotonic()

    sent = [when for (when,) in Bodies(3, 0, 0, 1000.0, 0)]

    assert before <= sent[0] < sent[1] < sent[2] <= time.monotonic()
    assert sent[2] >= before + 0.003
