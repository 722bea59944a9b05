"""Every storage says the same as `MemoryStorage`, whatever is asked in whatever order, tended or not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.servers import RedisServer
from tests.storage.test_sql import empty
from watch_tasks.storage.base import Storage
from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Claim, Granted, Step
from watch_tasks.storage.redis import RedisStorage
from watch_tasks.storage.redis_client import open_client
from watch_tasks.storage.sql import open_url
from watch_tasks.testing import ManualClock
from watch_tasks.testing.storage_values import LEASE, TOPIC, ask, record, settle, unclaimed
from watch_tasks.topics import DAY, WEEK

#: Seconds that may pass before a step: whole µs, and exactly so as a float.
_TICK = 1 / 64
_NAMES = ["m1", "m2", "m3", "0123abcd-0123-4123-8123-0123456789ab", "m\u00df"]
_IDS = st.sampled_from(_NAMES)
_INDEXES = st.sampled_from(["a", "b"])
_WORKERS = st.sampled_from(["w1", "w2"])
_CLAIMS = st.builds(
    ask,
    _IDS,
    index=st.sampled_from(["a", "a", "b", "c", "d"]),
    copy=st.sampled_from([0, 0, 0, 1, 2, 3]),
    once=st.sampled_from(["message", "message", "index"]),
    worker=_WORKERS,
    nonce=st.sampled_from(["", "", "n1"]),
    digest=st.sampled_from(["d1", "d1", "d2"]),
    started=st.booleans(),
    retention=st.sampled_from([WEEK, WEEK, WEEK, DAY, DAY / 2, None]),
    topic=st.sampled_from([TOPIC, TOPIC, TOPIC, "other"]),
)
#: Many that are alike, mostly of messages nobody knows yet.
_GROUPS = st.builds(
    lambda pairs, worker, once: [ask(id, index=index, worker=worker, once=once) for id, index in pairs],
    st.lists(st.tuples(_IDS, st.sampled_from("abcdef")), min_size=1, max_size=5),
    _WORKERS,
    st.sampled_from(["message", "index"]),
)
_RETENTIONS = st.sampled_from([None, DAY / 2, DAY, WEEK])
#: A verb and what it is asked.
_STEPS = st.one_of(
    st.tuples(st.just("claim"), st.lists(_CLAIMS, min_size=1, max_size=4)),
    st.tuples(st.just("claim"), _GROUPS),
    st.tuples(st.just("settle"), st.tuples(st.sampled_from(Step), st.integers(0, 20), st.sampled_from([0.0, 5.0]))),
    st.tuples(st.just("handle"), st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.none())),
    st.tuples(st.just("handle"), st.tuples(st.lists(st.integers(0, 6), min_size=1, max_size=4), _RETENTIONS)),
    st.tuples(st.just("all"), st.lists(st.sampled_from(Step), max_size=3)),
    st.tuples(st.just("unclaimed"), st.tuples(st.sampled_from(Step), _IDS, _INDEXES)),
    st.tuples(st.just("advance"), st.sampled_from([0.5, 4.0, LEASE, LEASE + 5, DAY / 2, WEEK / 2, WEEK])),
    st.tuples(st.just("renew"), _WORKERS),
    st.tuples(st.just("release"), st.tuples(_WORKERS, _IDS, st.booleans())),
    st.tuples(st.just("put"), st.tuples(_IDS, _INDEXES)),
    st.tuples(st.just("remove"), _INDEXES),
    st.tuples(st.just("dead_remove"), _IDS),
)


Grant = tuple[Claim, Granted]
#: Opens a storage, empty, with a clock.
Open = Callable[[ManualClock], Storage]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def on_sql(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """One opener for all examples of a test; each finds tables of its own."""
    if request.param == "sqlite":
        names = count()
        return lambda clock: open_url(f"sqlite:///{tmp_path}/{next(names)}.db", clock=clock)
    url = request.getfixturevalue("postgres")

    def emptied(clock: ManualClock) -> Storage:
        empty(url)
        return open_url(url, clock=clock)

    return emptied


@pytest.fixture
def on_redis(valkey: RedisServer) -> Open:
    """The same; each finds keys of its own."""
    names = count()
    return lambda clock: RedisStorage(open_client(valkey.url), clock=clock, prefix=f"{next(names)}:")


#: What is asked, each after so many seconds.
_schedules = given(steps=st.lists(st.tuples(_STEPS, st.sampled_from([_TICK, _TICK, 0.0])), max_size=30))
_quiet = {
    "deadline": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
}


@settings(max_examples=50, **_quiet)
@_schedules
def test_sql_storages_answer_alike(on_sql: Open, steps: list[tuple[tuple[str, Any], float]]) -> None:
    _compare(on_sql, steps, are_told=False)


@pytest.mark.integration
@settings(max_examples=200, **_quiet)
@_schedules
def test_the_redis_storage_answers_alike(on_redis: Open, steps: list[tuple[tuple[str, Any], float]]) -> None:
    _compare(on_redis, steps, are_told=True)


def _compare(fresh: Open, steps: list[tuple[tuple[str, Any], float]], are_told: bool) -> None:
    """Take steps on a storage and in memory; `are_told`: compare their stories after each."""
    clock = ManualClock()
    with MemoryStorage(clock=clock) as memory, fresh(clock) as other:
        expected_grants: list[Grant] = []
        grants: list[Grant] = []
        for (verb, what), passed in steps:
            clock.advance(passed)
            expected = _ask(memory, clock, verb, what, expected_grants)
            answered = _ask(other, clock, verb, what, grants)
            assert _without_tokens(answered) == _without_tokens(expected), f"{verb} {what}"
            if verb == "advance":
                clock.advance(what)
                other.tend()
            if are_told:
                assert _stories(other) == _stories(memory), f"{verb} {what}"

        assert _everything(other) == _everything(memory)
        assert _stories(other) == _stories(memory)
    # A storage may leave numbers out, as long as they grow.
    assert _ranks(grants) == _ranks(expected_grants)


def _ranks(grants: list[Grant]) -> list[int]:
    tokens = [granted.token for _, granted in grants]
    return [sorted(set(tokens)).index(token) for token in tokens]


def _without_tokens(answer: Any) -> Any:
    if not isinstance(answer, list):
        return answer
    return [replace(one, token=0) if isinstance(one, Granted) else one for one in answer]


def _ask(storage: Storage, clock: ManualClock, verb: str, what: Any, granted: list[Grant]) -> Any:
    match verb:
        case "claim":
            answers = storage.claim_many(what)
            granted += [pair for pair in zip(what, answers, strict=True) if isinstance(pair[1], Granted)]
            return answers
        case "settle" if granted:
            step, which, delay = what
            commit = settle(step, *granted[which % len(granted)], blob=b"" if step in _WHOLE else b"p", delay=delay)
            return storage.commit_many([commit, commit])
        case "handle" if granted:
            numbers, retention = what
            pairs = [granted[number % len(granted)] for number in numbers]
            return storage.commit_many(
                [settle(Step.HANDLED, *pair, retention=retention or pair[0].retention) for pair in pairs]
            )
        case "all" if granted:
            # Those that were granted last, most of them handled.
            steps = [*what, *[Step.HANDLED] * 3]
            return storage.commit_many(
                [
                    settle(step, *pair, blob=b"" if step in _WHOLE else b"p", retention=pair[0].retention)
                    for step, pair in zip(steps, granted[-len(steps) :], strict=False)
                ]
            )
        case "unclaimed":
            return storage.commit(unclaimed(*what))
        case "renew":
            return storage.renew(what, _NAMES, LEASE)
        case "release":
            worker, id, crashed = what
            return storage.release(worker, [id], crashed=crashed)
        case "put":
            id, index = what
            return storage.put(record(index, id=id, at=clock()))
        case "remove":
            return storage.remove(TOPIC, what)
        case "dead_remove":
            return storage.dead_remove(what)
    return None


#: Steps whose bytes are a record or a letter.
_WHOLE = (Step.HANDLED, Step.DEAD)


def _everything(storage: Storage) -> dict[str, Any]:
    return {
        "records": sorted(map(repr, storage.range())),
        "len": storage.len(),
        "dead": sorted(map(repr, storage.dead())),
        "counters": [storage.counters(topic) for topic in (TOPIC, "other")],
        "topics": storage.topics(),
    }


def _stories(storage: Storage) -> dict[tuple[str, str], Any]:
    return {(topic, index): list(storage.explain(topic, index)) for topic in (TOPIC, "other") for index in "abcdef"}
