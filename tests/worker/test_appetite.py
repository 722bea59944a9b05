"""How many messages a worker has in hand: few where they may wait for a slow one, many where none is."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from kombu.common import QoS

from watch_tasks.worker.appetite import Appetite

from ..servers import RedisServer
from ..workers import until
from .test_gathering import in_hand, send, waiting
from .test_groups import JOB, SHORT, WARM, MakeSite, gather, together


def qos_of(initial: int, most: int | None = None) -> QoS:
    return QoS(lambda prefetch_count: None, initial, max_prefetch=most)


def told(appetite: Appetite, seconds: float, size: int = 0) -> None:
    """Tell it of so many like this that it may have any number of them."""
    for _ in range(200):
        appetite.told(seconds, size)


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(0.0001, 200), (0.001, 100), (0.005, 20), (0.0099, 10), (0.01, 0), (60.0, 0)]
)
def test_the_limit_follows_the_pace(seconds: float, wanted: int) -> None:
    qos = qos_of(2)
    appetite = Appetite(lambda: qos)
    told(appetite, seconds)

    appetite.fit(2)
    assert qos.value == 2 + wanted


def test_each_message_is_worth_one_more() -> None:
    qos = qos_of(1)
    appetite = Appetite(lambda: qos)
    appetite.told(0.001)
    for _ in range(3):
        appetite.fit(1)
    assert qos.value == 2
    appetite.told(0.001)
    appetite.told(0.001)
    appetite.fit(1)
    assert qos.value == 4


def test_large_ones_are_few() -> None:
    qos = qos_of(1)
    appetite = Appetite(lambda: qos)
    told(appetite, 0.001, size=1_000_000)
    appetite.fit(1)
    assert qos.value == 1 + 8


def test_nothing_is_raised_before_a_pace_is_known() -> None:
    qos = qos_of(2)
    appetite = Appetite(lambda: qos)
    appetite.fit(2)
    assert qos.value == 2
    assert appetite.most_waiting(2) == math.inf


@pytest.mark.parametrize(("set_to", "left"), [(2, 0), (100, 98)])
def test_a_slow_one_takes_it_back_and_is_forgotten_in_time(set_to: int, left: int) -> None:
    qos = qos_of(set_to)
    appetite = Appetite(lambda: qos)
    told(appetite, 0.001)
    appetite.fit(2)

    assert appetite.most_waiting(2) == math.inf
    appetite.told(0.2)
    appetite.fit(2)
    assert qos.value == set_to
    assert appetite.most_waiting(2) == math.inf, "they will soon be done with"
    appetite.told(5.0)
    appetite.fit(2)
    assert qos.value == set_to
    assert appetite.most_waiting(2) == left

    count = 0
    while qos.value == set_to:
        appetite.told(0.001)
        appetite.fit(2)
        count += 1
    assert 200 < count < 400


def test_little_changes_change_nothing() -> None:
    qos = qos_of(1)
    appetite = Appetite(lambda: qos)
    told(appetite, 0.001)
    appetite.fit(1)
    seen = Counter[int]()
    for seconds in (0.0011, 0.0012, 0.001, 0.0015):
        appetite.told(seconds)
        appetite.fit(1)
        seen[qos.value] += 1
    assert set(seen) == {51}


def test_limits_of_others_are_kept() -> None:
    unlimited, limited = qos_of(0), qos_of(2, most=10)
    for qos, value in ((unlimited, 0), (limited, 10)):  # as Celery's `worker_eta_task_limit` makes
        appetite = Appetite(lambda qos=qos: qos)  # type: ignore[misc]
        told(appetite, 0.0001)
        appetite.fit(2)
        assert qos.value == value
        appetite.told(10.0)
        appetite.fit(2)
        assert appetite.most_waiting(2) == (0 if value else math.inf)
    assert (unlimited.value, limited.value) == (0, 2)


def test_where_it_may_not_be_changed_it_is_not() -> None:
    appetite = Appetite(lambda: None)
    appetite.told(0.0001)
    appetite.fit(2)
    appetite.told(10.0)
    assert appetite.most_waiting(2) == math.inf


def test_a_new_connection_begins_anew() -> None:
    first, second = qos_of(2), qos_of(2)
    now = first
    appetite = Appetite(lambda: now)
    told(appetite, 0.001)
    appetite.fit(2)
    appetite.let_go()
    now = second
    told(appetite, 0.001)

    appetite.fit(2)

    assert (first.value, second.value) == (102, 102)


@pytest.mark.worker
class TestWorker:
    def test_quick_ones_come_many_at_a_time(self, make_site: MakeSite) -> None:
        site = make_site(JOB, **SHORT)
        site.worker(concurrency=1)

        ids = gather(site, *range(10))

        site.until_handled(WARM + 10, topic="job")
        assert together(site, ids) >= 5

    def test_it_is_left_as_it_was_set_where_somebody_says_so(self, make_site: MakeSite, valkey: RedisServer) -> None:
        site = make_site(JOB, "worker_disable_prefetch = True\n", **SHORT)
        site.worker(concurrency=1)
        for number in range(WARM):
            site.send("job", number)
        site.until_handled(WARM, topic="job")
        site.send("gate", "open")
        until(lambda: site.calls()["gate"] == 1, "the child is taken")

        send(site, *range(10))

        until(lambda: waiting(valkey) == 10, "they wait for whoever is free")
        site.touch("open")
        site.until_handled(WARM + 10, topic="job")

    def test_behind_a_slow_one_nobody_waits(self, make_site: MakeSite, valkey: RedisServer) -> None:
        site = make_site(JOB, **SHORT)
        first = site.worker(concurrency=1)
        for number in range(WARM):
            site.send("job", number)
        site.until_handled(WARM, topic="job")
        site.send("gate", "open")
        until(lambda: site.calls()["gate"] == 1, "the child is taken")
        ids = send(site, *range(10))
        until(lambda: all(f"[{id}] received" in first.text() for id in ids), "the worker has all in hand")

        until(lambda: waiting(valkey) == 10, "they are given back", 10)
        site.worker(concurrency=1)

        site.until_handled(WARM + 10, topic="job")
        site.touch("open")
        site.until_handled(1, topic="gate")
        until(lambda: waiting(valkey) + in_hand(valkey) == 0, "all are acked")
        calls = Counter(line["id"] for line in site.lines() if line["handler"] == "begin")
        assert {calls[id] for id in ids} == {1}
