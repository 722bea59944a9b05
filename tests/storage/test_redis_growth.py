"""How records lie on Redis: few bytes each, listed and ended in bounded steps, and nothing left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.servers import RedisServer
from watch_tasks.record import Record
from watch_tasks.storage.protocol import Granted, Put, Step
from watch_tasks.storage.redis import RedisStorage
from watch_tasks.storage.redis_client import open_client
from watch_tasks.storage.redis_script import Script, read_script
from watch_tasks.storage.stored import encode_record
from watch_tasks.testing import ManualClock
from watch_tasks.testing.storage_values import TOPIC, ask, grant, handle, kinds, record, settle, unclaimed
from watch_tasks.topics import WEEK

pytestmark = pytest.mark.integration

#: What is there for good, whatever was handled and ended.
_LASTING = {"counters", "topics", "token", "layout", "tended"}


@pytest.fixture(params=["valkey", "redis_server"])
def server(request: pytest.FixtureRequest) -> RedisServer:
    found: RedisServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def storage(server: RedisServer, clock: ManualClock) -> Iterator[RedisStorage]:
    with RedisStorage(open_client(server.url), clock=clock) as storage:
        yield storage


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


# -- bytes


def test_a_record_takes_few_bytes(server: RedisServer) -> None:
    """As it does from a million on; `benchmarks.growth` measures that."""
    chance = random.Random(1)
    now = time.time()

    def some(first: int, count: int) -> Iterator[Record]:
        for number in range(first, first + count):
            handled_at = datetime.fromtimestamp(now - 3600 + number / 10, UTC)
            yield Record(
                topic=TOPIC,
                index=f"order-{number:018d}",  # 24 characters
                id=str(UUID(int=chance.getrandbits(128), version=4)),
                max_retries=3,
                sent_at=handled_at - timedelta(seconds=0.04),
                handled_at=handled_at,
                expires_at=handled_at + timedelta(seconds=WEEK),
                seconds=0.0123,
                worker="celery@web-1",
                digest=f"{chance.getrandbits(128):032x}",
            )

    with RedisStorage(open_client(server.url)) as storage, server.client() as client:
        storage.restore(some(0, 4_000))
        before = client.info("memory")["used_memory"]
        storage.restore(some(4_000, 16_000))
        slope = (client.info("memory")["used_memory"] - before) / 16_000

        assert storage.len(TOPIC) == 20_000
        assert slope <= 250


def test_a_record_is_its_bytes_and_few_more(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    id, digest = "0123abcd-0123-4123-8123-0123456789ab", "d" * 32
    storage.put(record("short", id=id, digest=digest, at=clock() - 1))

    with server.client() as client:
        value = client.hget("watch:r:orders", "short")

    blob = encode_record(record("short"))
    assert value.endswith(blob)
    # flags, time, token, and retention; id and digest with a byte that says how long they are
    assert len(value) - len(blob) <= 1 + 8 + 8 + 4 + 17 + 17
    found = storage.get(TOPIC, "short")
    assert found is not None
    assert (found.id, found.digest) == (id, digest)


@pytest.mark.parametrize(
    "id", ["m1", "0" * 36, "0123ABCD-0123-4123-8123-0123456789AB", "\x00" * 16, "x" * 5000, "ß", ""]
)
@pytest.mark.parametrize("digest", ["", "d1", "D" * 32, "g" * 32, "0" * 31])
def test_ids_and_digests_of_any_form_come_back(storage: RedisStorage, clock: ManualClock, id: str, digest: str) -> None:
    storage.put(record("order-1", id=id, digest=digest, at=clock()))
    storage.remove(TOPIC, "order-1")  # leaves a mark of the id
    storage.put(record("order-1", id=id, digest=digest, at=clock()))

    found = storage.get(TOPIC, "order-1")

    assert found is not None
    assert (found.id, found.digest) == (id, digest)
    assert not isinstance(storage.claim(ask(id, index="order-1")), Granted)


def test_large_data_is_not_read_with_each_claim(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    for size in (10_000, 10, 10_000):
        storage.put(record("order-1", at=clock(), data="x" * size))

        with server.client() as client:
            assert client.hexists("watch:b:orders", "order-1") == (size > 4096)
            assert client.hstrlen("watch:r:orders", "order-1") < 4096
        assert [found.data for found in storage.range(TOPIC)] == ["x" * size]

    storage.remove(TOPIC, "order-1")
    assert _left(server) <= _LASTING | {"m", "t"}


# -- order


def test_records_are_listed_in_order_however_they_came(storage: RedisStorage, clock: ManualClock) -> None:
    places = [(clock() - 5000 + number // 3, f"order-{number % 100}-{number}") for number in range(1500)]
    random.Random(1).shuffle(places)

    storage.restore(record(index, id=index, at=at) for at, index in places)

    expected = [index for _, index in sorted(places)]
    assert [found.index for found in storage.range(TOPIC, newest_first=False)] == expected
    assert [found.index for found in storage.range(TOPIC)] == expected[::-1]
    since = datetime.fromtimestamp(clock() - 4700, UTC)
    assert [one.index for one in storage.range(since=since)] == [
        one for at, one in sorted(places, reverse=True) if at >= clock() - 4700
    ]


@pytest.mark.parametrize("step", [1, -1])
def test_leaves_are_full_where_records_come_in_order(
    server: RedisServer, storage: RedisStorage, clock: ManualClock, step: int
) -> None:
    storage.restore(record(f"{number}", id=f"{number}", at=clock() + step * number) for number in range(1280))

    assert 10 <= len(_keys(server, "z")) <= 14


def test_records_far_apart_are_listed_too(storage: RedisStorage, clock: ManualClock) -> None:
    """A leaf holds times near each other; and some are of before 1970, or far ahead."""
    hours = [0, 1, 2, 50, 3, 7, 49, 100_000, -5, -9, 6]
    times = [-2_000_000_000.0, *(clock() + hour * 3600 for hour in hours)]
    for number, at in enumerate(times):
        storage.put(record(f"{number}", id=f"{number}", at=at), retention=None)

    found = [one.handled_at.timestamp() for one in storage.range(TOPIC, newest_first=False)]

    assert found == sorted(times)
    assert storage.clear() == len(times)


def test_records_of_several_retentions_are_one_list(storage: RedisStorage, clock: ManualClock) -> None:
    """More retentions than have an order of their own, and some that last for ever."""
    kept = {}
    for number in range(600):
        retention = None if number % 20 == 7 else WEEK + number % 13 * 10
        at = clock() - (number * 337) % 1000
        storage.put(record(f"order-{number}", id=f"m{number}", at=at), retention=retention)
        kept[f"order-{number}"] = (at, retention)

    def expected() -> list[str]:
        left = {name: at for name, (at, lasts) in kept.items() if lasts is None or at + lasts > clock()}
        return sorted(left, key=lambda name: left[name])

    for passed in (0, WEEK - 500, 300, 150, 50, 60, 100):
        clock.advance(passed)
        found = [one.index for one in storage.range(TOPIC, newest_first=False)]
        assert sorted(found) == sorted(expected())
        assert [kept[index][0] for index in found] == [kept[index][0] for index in expected()]
        assert [one.index for one in storage.range(TOPIC)][::-1] == found
        assert storage.len(TOPIC) == len(found)
        _tend(storage, clock, 1)
    _tend(storage, clock)
    assert storage.len(TOPIC) == 30


_INDEXES = st.sampled_from([f"order-{number}" for number in range(40)])
_TIMES = st.integers(0, 30)
_RETENTIONS = st.sampled_from([None, *range(60, 100, 3)])
_CHANGES = st.one_of(
    st.tuples(st.just("put"), st.lists(st.tuples(_INDEXES, _TIMES, _RETENTIONS), min_size=1, max_size=200)),
    st.tuples(st.just("remove"), _INDEXES),
    st.tuples(st.just("advance"), st.sampled_from([1, 10, 30])),
    st.tuples(st.just("tend"), st.none()),
    st.tuples(st.just("handle"), _INDEXES),
)


@pytest.mark.parametrize("leaf", [2, 4])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(_CHANGES, max_size=25))
@example(changes=[("put", [("order-0", 0, None), ("order-1", 1, None), ("order-1", 0, None)])])
@example(
    changes=[("put", [("order-1", 0, 60)]), ("put", [("order-0", 0, 60), ("order-1", 0, None), ("order-0", 0, None)])]
)
def test_orders_are_as_a_plain_sorted_list(valkey: RedisServer, leaf: int, changes: list[tuple[str, Any]]) -> None:
    clock = ManualClock()
    with valkey.client() as client:
        client.flushall()
    kept: dict[str, tuple[float, float | None]] = {}
    with RedisStorage(open_client(valkey.url), clock=clock) as storage:
        _shorten_leaves(storage, leaf)
        for number, (verb, what) in enumerate(changes):
            if verb == "put":
                given = [(index, clock() - ago, retention) for index, ago, retention in what]
                storage._put(
                    [
                        _put(index, at, retention, f"{number}-{place}")
                        for place, (index, at, retention) in enumerate(given)
                    ]
                )
                kept |= {index: (at, retention) for index, at, retention in given}
            elif verb == "remove":
                storage.remove(TOPIC, what)
                kept.pop(what, None)
            elif verb == "advance":
                clock.advance(what)
            elif verb == "tend":
                _tend(storage, clock, 1)
            else:
                handle(storage, f"h{number}", index=what, retention=60)
                kept[what] = (clock(), 60)
            kept = {name: one for name, one in kept.items() if one[1] is None or one[0] + one[1] > clock()}

            found = [(one.handled_at.timestamp(), one.index) for one in storage.range(TOPIC, newest_first=False)]
            assert sorted(found) == sorted((at, index) for index, (at, _) in kept.items())
            assert [at for at, _ in found] == sorted(at for at, _ in found)
            assert {(one.handled_at.timestamp(), one.index) for one in storage.range(TOPIC)} == set(found)
            assert storage.len(TOPIC) == len(kept)

        storage.clear()
        clock.advance(WEEK)
        _tend(storage, clock)
    assert _left(valkey) <= _LASTING | {"m", "t"}


# -- the end


def test_what_expired_is_trimmed_a_little_with_each_write(
    server: RedisServer, storage: RedisStorage, clock: ManualClock
) -> None:
    for number in range(300):
        storage.put(record(f"order-{number}", at=clock()))
    clock.advance(WEEK)
    with server.client() as client:
        sizes = [client.hlen("watch:r:orders")]
        for number in range(310):
            storage.put(record(f"new-{number}", at=clock()))
            sizes.append(client.hlen("watch:r:orders"))

    assert min(after - before for before, after in pairwise(sizes)) >= -3
    assert sizes[-1] == 310


def test_writes_of_many_trim_as_many(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    with server.client() as client:
        for number in range(4):
            storage._put([_put(f"{number}-{place}", clock(), WEEK, f"m{number}-{place}") for place in range(500)])
            clock.advance(WEEK)

            assert client.hlen("watch:r:orders") == 500


def test_many_that_expire_are_forgotten_in_bounded_steps(
    server: RedisServer, storage: RedisStorage, clock: ManualClock
) -> None:
    storage._put([_put(f"order-{number}", clock(), WEEK, f"m{number}") for number in range(3000)])
    storage.commit_many([unclaimed(Step.RETRY, f"m{number}", f"order-{number}") for number in range(500)])
    clock.advance(WEEK)

    with server.client() as client:
        sizes = [client.hlen("watch:r:orders")]
        while sizes[-1] and len(sizes) < 100:
            storage._run("tend", ([TOPIC], 64, None))
            sizes.append(client.hlen("watch:r:orders"))

    assert sizes[-1] == 0
    assert all(0 < before - after <= 64 for before, after in pairwise(sizes))
    assert _left(server) <= _LASTING


def test_a_silent_storage_is_emptied_by_tending(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    for number in range(300):
        handle(storage, f"m{number}", index=f"order-{number}", topic=f"topic-{number % 50}")
    clock.advance(WEEK)

    _tend(storage, clock)

    assert _left(server) <= _LASTING


def test_of_many_workers_one_tends_at_a_time(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    storage.put(record("order-1", at=clock() - WEEK + 0.5))
    storage.tend()
    clock.advance(0.6)

    storage.tend()
    with server.client() as client:
        assert client.hlen("watch:r:orders") == 1
        clock.advance(0.5)
        storage.tend()
        assert client.hlen("watch:r:orders") == 0


def test_no_story_outlives_its_record(server: RedisServer, storage: RedisStorage, clock: ManualClock) -> None:
    handle(storage, "m1")
    claim = ask("refused", retention=WEEK)
    clock.advance(WEEK / 2)
    assert isinstance(storage.claim(claim), Granted)  # its event keeps the story for longer than the record
    storage.release("w1", ["refused"])
    clock.advance(WEEK / 2)
    _tend(storage, clock)

    assert kinds(storage)
    with server.client() as client:
        assert 0 < client.ttl("watch:t:orders:order-1") <= WEEK / 2
    assert isinstance(storage.claim(claim), Granted)
    with server.client() as client:
        assert client.ttl("watch:t:orders:order-1") == -1  # an unfinished message owns it again


@pytest.mark.parametrize("how", ["dead", "moved", "suppressed", "retention", "fenced", "put"])
def test_every_story_ends(server: RedisServer, storage: RedisStorage, clock: ManualClock, how: str) -> None:
    """Whichever way an index lost its record and its last unfinished message."""
    claim = ask("m1")
    granted = grant(storage, claim)
    match how:
        case "dead":
            storage.commit(settle(Step.DEAD, claim, granted))
            storage.dead_remove("m1")
        case "moved":
            clock.advance(10)
            grant(storage, ask("m1", index="order-2"))
        case "suppressed":
            storage.commit(settle(Step.HANDLED, claim, granted))
            storage.remove(TOPIC, "order-1")
            storage.claim(claim)
        case "retention":
            storage.commit(settle(Step.HANDLED, claim, granted, retention=0))
        case "fenced":
            storage.commit(settle(Step.HANDLED, claim, granted, retention=0))
            assert not storage.commit(settle(Step.RETRY, claim, granted))
        case "put":
            storage.release("w1", ["m1"])
            storage.put(record("order-2", id="m1", at=clock()))

    with server.client() as client:
        assert client.ttl("watch:t:orders:order-1") > 0


def _put(index: str, at: float, retention: float | None, id: str) -> Put:
    blob = encode_record(record(index))
    return Put(topic=TOPIC, index=index, id=id, digest="d1", at=at, retention=retention, blob=blob)


def _shorten_leaves(storage: RedisStorage, size: int) -> None:
    """Let few records make many leaves."""
    for name in ("commit", "put", "remove", "tend"):
        text = read_script(name)
        assert "local LEAF = 128" in text
        storage._scripts[name] = Script(text.replace("local LEAF = 128", f"local LEAF = {size}"))


def _tend(storage: RedisStorage, clock: ManualClock, times: int = 50) -> None:
    for _ in range(times):
        clock.advance(1)
        storage.tend()


def _keys(server: RedisServer, kind: str) -> list[bytes]:
    with server.client() as client:
        return list(client.scan_iter(f"watch:{kind}:*"))


def _left(server: RedisServer) -> set[str]:
    """Return the kinds of the keys that are there."""
    with server.client() as client:
        kinds = {bytes(key).split(b":")[1].decode() for key in client.scan_iter("*")}
    return {"counters" if kind == "c" else kind for kind in kinds}
