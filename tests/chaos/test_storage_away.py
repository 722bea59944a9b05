"""The storage away under load (F8), when messages are claimed, committed, buried: its server, or SQLite's only lock.

CHAOS_F8 says how often; CHAOS_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from watch_tasks import Reason
from watch_tasks.queue.wire import HEADER

from ..postgres import PostgresServer
from ..servers import RedisServer
from ..workers import until
from .harness import Place, Producer, Tally, check, pass_time, percentile, seed_of_run, settle
from .storages import FleetingServer, FleetingStorage, HeldSqlite

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(3600)]

#: Seconds after the storage is back until everything that came meanwhile is handled.
DRAINED = 30.0

#: Headers of a message that the main process buries: no handler sees it.
OF_TOMORROW = {HEADER: {"version": 99}}

#: Some are dead at once, some at their second try.
TOPICS = """
job = topic("job", retry=RetryPolicy(max_retries=1, backoff=0.05))

@job.handler
def work(message):
    note("again" if message.retries else "begin", message)
    time.sleep(abs(message.data))
    if message.data == -0.01:
        raise Discard("as it was told")
    if message.data == -0.02:
        raise ValueError("no luck")
    note("end", message)
"""


@pytest.fixture(params=["valkey", "postgresql", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FleetingStorage]:
    made: FleetingStorage
    match request.param:
        case "valkey":
            made = FleetingServer(RedisServer.lasting(tmp_path / "storage").start(), ("killed", "frozen"))
        case "postgresql":
            server: PostgresServer = request.getfixturevalue("own_postgres")
            made = FleetingServer(server, ("stopped", "killed", "frozen"))
        case _:
            made = HeldSqlite(tmp_path / "storage.db")
    yield made
    made.close()


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_storage_away_under_load(
    tmp_path: Path, own_valkey: RedisServer, storage: FleetingStorage, pool: str
) -> None:
    seed, kind = seed_of_run(), storage.url.partition(":")[0]
    chance = random.Random(f"{seed}:{kind}:{pool}")
    work = random.Random(chance.random())
    place = Place(tmp_path / "site", own_valkey.url, TOPICS, WATCH_STORAGE_BACKEND=storage.url)
    producer = Producer(place, tmp_path / "sent.jsonl")
    tally = Tally()
    #: From when to when nobody could claim, by the clock of the ledger.
    away: list[tuple[float, float]] = []
    drained: list[float] = []
    ways: Counter[str] = Counter()
    try:
        workers = [place.spawn(pool=pool, concurrency=2) for _ in range(2)]
        until(lambda: all("ready." in worker.text() for worker in workers), "the workers are ready", 40)
        with producer.flowing(
            own_valkey,
            0.03,
            lambda: work.choice((0.0, 0.01, 0.05, -0.01, -0.02)),
            options=lambda: {"headers": OF_TOMORROW} if work.random() < 0.05 else {},
        ):
            for _ in range(int(os.environ.get("CHAOS_F8", "6"))):
                pass_time(chance.uniform(0.5, 2.0))
                ways[storage.go_away(chance)] += 1
                began = time.time()
                pass_time(chance.uniform(0.5, 9.0))
                away.append((began, time.time()))
                waited = set(producer.sent)
                storage.come_back()
                back = time.monotonic()
                until(
                    lambda: waited <= set(place.handled_ids()) | {letter.id for letter in place.dead()},  # noqa: B023
                    "what came meanwhile has ended",
                    DRAINED,
                    place.report,
                )
                drained.append(time.monotonic() - back)
        settle(place, own_valkey, producer, tally)
        exits = [worker.process.returncode for worker in workers if not worker.is_running()]
        lines = place.lines()
        check(place, producer, tally, in_flight=0)
        reasons = {letter.id: letter.reason for letter in place.dead()}
    finally:
        place.close()
        producer.close()
    # A claim granted just before may begin its handler just after.
    unclaimed = [
        line
        for line in lines
        if line["handler"] != "end" and any(began + 0.5 < line["at"] < ended for began, ended in away)
    ]
    print(
        f"F8 {kind} {pool} seed={seed} away {dict(ways)} drained p50={percentile(drained, 0.5):.1f} s "
        f"max={max(drained):.1f} s begun meanwhile={len(unclaimed)}: {tally}"
    )
    assert exits == []
    assert unclaimed == []
    assert set(reasons.values()) == {Reason.DISCARDED, Reason.EXHAUSTED, Reason.MALFORMED}
    again = Counter(line["id"] for line in lines if line["handler"] == "again")
    assert again == Counter(id for id, reason in reasons.items() if reason is Reason.EXHAUSTED)
    assert not tally.complaints, tally.complaints[:10]
