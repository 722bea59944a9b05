"""Bad networks (F7), between workers and their server, and between a sender and it.

CHAOS_F7 says how many faults a run has; CHAOS_SEED repeats one.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from watch_tasks import Message, SendUnknownError
from watch_tasks.topics import Topic
from watch_tasks.worker import install, outlet_of

from ..servers import RedisServer
from ..workers import until
from .harness import QUEUE, Place, Producer, Tally, check, leftovers, pass_time, percentile, seed_of_run, settle
from .proxy import FAULTS, Proxy, inflict

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(3600)]

#: Seconds from the end of a fault until messages are handled again, and from the death of a connection of which
#: nobody is told.
RECOVERED = 10.0
NOTICED = 20.0


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_bad_network_between_workers_and_their_server(tmp_path: Path, own_valkey: RedisServer, pool: str) -> None:
    seed = seed_of_run()
    chance = random.Random(f"{seed}:{pool}")
    count = int(os.environ.get("CHAOS_F7", str(len(FAULTS))))
    order = itertools.islice(
        itertools.chain.from_iterable(chance.sample(sorted(FAULTS), len(FAULTS)) for _ in itertools.count()), count
    )
    tally = Tally()
    recovered: list[tuple[float, str]] = []
    with Proxy(own_valkey.port, chance).closing() as proxy:
        place = Place(tmp_path / "site", own_valkey.url, CELERY_BROKER_URL=proxy.url)
        producer = Producer(place, tmp_path / "sent.jsonl")
        try:
            workers = [place.spawn(pool=pool, concurrency=2) for _ in range(2)]
            until(lambda: all("ready." in worker.text() for worker in workers), "the workers are ready", 40)
            with producer.flowing(own_valkey, 0.03, lambda: chance.choice((0.0, 0.01, 0.05))):
                for fault in order:
                    begun = len(place.lines())
                    until(lambda: len(place.lines()) > begun + 10, f"work before {fault}", 30, place.report)  # noqa: B023
                    inflict(proxy, fault)
                    pass_time(chance.uniform(*FAULTS[fault]))
                    proxy.heal()
                    healed = time.monotonic()
                    begun = sum(line["handler"] == "begin" for line in place.lines())
                    patience = NOTICED if fault == "forget" else RECOVERED
                    # More than what was in hand already, which needs no server to begin.
                    until(
                        lambda: sum(line["handler"] == "begin" for line in place.lines()) > begun + 8,  # noqa: B023
                        f"work after {fault}",
                        patience,
                        place.report,
                    )
                    recovered.append((time.monotonic() - healed, fault))
            settle(place, own_valkey, producer, tally)
            exits = [worker.process.returncode for worker in workers if not worker.is_running()]
            check(place, producer, tally, in_flight=0)
        finally:
            place.close()
            producer.close()
    for seconds, fault in recovered:
        print(f"F7 {pool} {fault}: {seconds:.2f} s")
    times = [seconds for seconds, _ in recovered]
    print(
        f"F7 {pool} seed={seed} faults={len(times)} recovery p50={percentile(times, 0.5):.2f} s "
        f"max={max(times):.2f} s: {tally}"
    )
    assert exits == []
    assert not tally.complaints, tally.complaints[:10]


@pytest.fixture
def proxy(own_valkey: RedisServer) -> Iterator[Proxy]:
    with Proxy(own_valkey.port).closing() as proxy:
        yield proxy


@pytest.fixture
def job(proxy: Proxy) -> Iterator[Topic[float]]:
    """The topic, sent through the proxy from this process."""
    with Celery("sender", broker=proxy.url, set_as_current=False) as app:
        install(app)
        job: Topic[float] = Topic("job")
        job.bind(outlet_of(app))
        yield job


def test_a_send_whose_answer_is_lost_may_be_repeated(
    tmp_path: Path, own_valkey: RedisServer, proxy: Proxy, job: Topic[float]
) -> None:
    seed = seed_of_run()
    chance = random.Random(seed)
    place = Place(tmp_path / "site", own_valkey.url)
    sent, unknown, count = set(), 0, int(os.environ.get("CHAOS_F7_SENDS", "100"))
    try:
        for number in range(count):
            # A send is tried again within itself: only the loss of every answer is told.
            proxy.swallow_replies(b"LPUSH", chance.choice((0, 1, 2, 9)))
            message: float | Message[float] = 0.0
            options = {"index": f"i{number}"}
            while f"i{number}" not in sent:
                try:
                    job.send(message, **options)
                    sent.add(f"i{number}")
                except SendUnknownError as exc:
                    unknown += 1
                    message, options = exc.message, {}
        hits = proxy.hits
        with own_valkey.client() as client:
            waiting = leftovers(client)[QUEUE]
        place.worker()
        until(lambda: place.handled() == count, "all are handled", 30, place.report)
        with own_valkey.client() as client:
            until(lambda: not leftovers(client), "the duplicates are gone too", 30)
        duplicates = place.storage.counters("job").duplicates
        calls = place.calls("index")
        dead = place.dead()
    finally:
        place.close()
    print(
        f"F7 sends seed={seed}: sent={count} answers lost={hits} sent_unknown={unknown} copies at the broker={waiting} "
        f"handled={count} duplicates_skipped={duplicates} dead={len(dead)}"
    )
    assert hits > count / 2
    assert unknown > 0
    assert dead == []
    assert set(calls.values()) == {2}, "each begins and ends once"
    assert duplicates == waiting - count
