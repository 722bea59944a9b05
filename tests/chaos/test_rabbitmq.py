"""Kills under load on RabbitMQ, counted by a ledger outside the system. `make chaos` runs them; KILLS asks for more."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kombu
import kombu.pools
import pytest

from watch_tasks import presets
from watch_tasks.queue.amqp import DEAD_LETTERS

from ..rabbit import RabbitServer, find_rabbit
from ..servers import RedisServer
from ..workers import Site, until
from .harness import pass_time, percentile, seed_of_run
from .proxy import FAULTS, Proxy, inflict

pytestmark = [pytest.mark.chaos, pytest.mark.worker]

KILLS = int(os.environ.get("KILLS", "50"))
TOPICS = """
job = topic("job", retry=RetryPolicy(max_retries=1))

@job.handler
def work(message):
    note("work", message)
    time.sleep(message.data)
"""
CONFIG = "from watch_tasks import presets\nglobals().update(presets.rabbitmq())\n"


@pytest.fixture
def rabbit(tmp_path: Path) -> Iterator[RabbitServer]:
    server = RabbitServer(tmp_path / "rabbit", find_rabbit())
    try:
        yield server.start()
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture
def site(tmp_path: Path, rabbit: RabbitServer, valkey: RedisServer) -> Iterator[Site]:
    site = Site(tmp_path / "site", rabbit.url, TOPICS, CONFIG, WATCH_STORAGE_BACKEND=valkey.url)
    site.bare.conf.update(presets.rabbitmq())
    yield site
    site.close()
    kombu.pools.reset()


class Load:
    """Sends steadily from a thread, and remembers what the broker confirmed."""

    def __init__(self, site: Site) -> None:
        self.sent: set[str] = set()
        self._site = site
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.02):
            number += 1
            try:
                self._site.send("job", 0.02, index=f"job-{number}")
            except Exception:
                continue  # not confirmed, so not promised
            self.sent.add(f"job-{number}")

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(60)


def check(site: Site, rabbit: RabbitServer, load: Load, what: str) -> None:
    """Every message that the broker confirmed has a record, and the server gave nothing up."""

    def lost() -> set[str]:
        return load.sent - {record.index for record in site.storage.range("job")}

    until(lambda: not lost(), "all handled", 120, lambda: f"lost {sorted(lost())[:20]}\n{site.report()}")
    print(f"{what}: {len(load.sent)} sent, {len(site.lines())} calls, 0 lost")
    assert not site.dead()
    with kombu.Connection(rabbit.url) as connection:
        assert connection.default_channel.queue_declare(DEAD_LETTERS, passive=True).message_count == 0


def test_kills_of_workers_lose_nothing(site: Site, rabbit: RabbitServer) -> None:
    seed = int(os.environ.get("SEED", str(random.randrange(10**6))))
    chance = random.Random(seed)
    with Load(site) as load:
        for _ in range(KILLS):
            worker = site.worker()
            time.sleep(chance.uniform(0.1, 1.0))
            worker.kill()
        site.worker()
    check(site, rabbit, load, f"{KILLS} kills, seed {seed}")


def test_kills_of_the_server_lose_nothing(site: Site, rabbit: RabbitServer) -> None:
    site.worker()
    with Load(site) as load:
        for _ in range(3):
            time.sleep(2)
            rabbit.stop(signal.SIGKILL)
            rabbit.start()
            time.sleep(5)
    check(site, rabbit, load, "3 kills of the server")


def test_stops_of_workers_lose_nothing(site: Site, rabbit: RabbitServer) -> None:
    with Load(site) as load:
        for _ in range(10):
            worker = site.worker()
            time.sleep(0.5)
            assert worker.stop() == 0
        site.worker()
    check(site, rabbit, load, "10 stops")


def test_a_delay_of_90_s_is_handled_once_and_on_time(site: Site) -> None:
    worker = site.worker()
    started = time.time()
    site.send("job", 0, index="late", countdown=90)
    worker.kill()
    site.worker()

    site.until_handled(1, 120)

    assert site.calls("index") == {"late": 1}
    assert site.lines()[0]["at"] - started >= 90


#: Seconds from the end of a fault until messages are handled again, and from the death of a connection of which nobody
#: is told. Celery waits up to 6 s between two tries to connect.
RECOVERED = 15.0
NOTICED = 20.0 + RECOVERED


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_bad_network_between_workers_and_the_server(
    tmp_path: Path, rabbit: RabbitServer, valkey: RedisServer, pool: str
) -> None:
    """F7."""
    seed = seed_of_run()
    chance = random.Random(f"{seed}:{pool}")
    recovered: list[tuple[float, str]] = []
    with Proxy(rabbit.port, chance).closing() as proxy:
        through = f"amqp://guest:guest@127.0.0.1:{proxy.port}//"
        storage = {"WATCH_STORAGE_BACKEND": valkey.url}
        site = Site(tmp_path / "site", rabbit.url, TOPICS, CONFIG, CELERY_BROKER_URL=through, **storage)
        site.bare.conf.update(presets.rabbitmq())
        try:
            worker = site.worker(pool=pool, concurrency=2)
            with Load(site) as load:
                for fault in chance.sample([name for name in FAULTS if name != "swallow a fetch"], len(FAULTS) - 1):
                    begun = len(site.lines())
                    until(lambda: len(site.lines()) > begun + 10, f"work before {fault}", 30, site.report)  # noqa: B023
                    inflict(proxy, fault)
                    pass_time(chance.uniform(*FAULTS[fault]))
                    proxy.heal()
                    healed, begun = time.monotonic(), len(site.lines())
                    patience = NOTICED if fault == "forget" else RECOVERED
                    until(lambda: len(site.lines()) > begun + 8, f"work after {fault}", patience, site.report)  # noqa: B023
                    recovered.append((time.monotonic() - healed, fault))
            check(site, rabbit, load, f"F7 {pool} seed={seed}")
            assert worker.is_running()
        finally:
            site.close()
            kombu.pools.reset()
    for seconds, fault in recovered:
        print(f"F7 {pool} {fault}: {seconds:.2f} s")
    times = [seconds for seconds, _ in recovered]
    print(f"F7 {pool} faults={len(times)} recovery p50={percentile(times, 0.5):.2f} s max={max(times):.2f} s")


def test_a_connection_that_is_dead_without_a_word_is_noticed_within_20_s(
    tmp_path: Path, rabbit: RabbitServer, valkey: RedisServer
) -> None:
    with Proxy(rabbit.port).closing() as proxy:
        through = f"amqp://guest:guest@127.0.0.1:{proxy.port}//"
        storage = {"WATCH_STORAGE_BACKEND": valkey.url}
        site = Site(tmp_path / "site", rabbit.url, TOPICS, CONFIG, CELERY_BROKER_URL=through, **storage)
        try:
            worker = site.worker()
            began = time.monotonic()
            proxy.forget_all()
            until(lambda: "Connection to broker lost" in worker.text(), "it is noticed", 20, worker.text)
            print(f"noticed after {time.monotonic() - began:.1f} s")
        finally:
            site.close()
