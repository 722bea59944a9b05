"""Workers on a real RabbitMQ, with the preset and without."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import kombu.pools
import pytest

from watch_tasks import Reason, presets
from watch_tasks.queue.amqp import DEAD_LETTERS

from ..rabbit import RabbitServer
from ..servers import RedisServer
from ..workers import Site, until

pytestmark = pytest.mark.worker

TOPICS = """
job = topic("job", retry=RetryPolicy(max_retries=1, backoff=1.2, jitter=False))
later = topic("later", retry=RetryPolicy(backoff=40, jitter=False))
slow = topic("slow", queue="slow", retry=RetryPolicy(max_retries=2, backoff=0.3, jitter=False))

@job.handler
def work(message):
    note("work", message)
    if message.data == "fails":
        raise ValueError("not today")
    if message.data == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(message.data, (int, float)):
        time.sleep(message.data)

@later.handler
def fail(message):
    raise ValueError("not today")

rows = topic("rows")

@rows.batch_handler(size=10, seconds=60)
def store(messages):
    note("store", messages[0], data=[message.data for message in messages])

@slow.handler
def crawl(message):
    note("crawl", message)
    if message.retries < 2:
        raise ValueError("again")
"""
CONFIG = 'from watch_tasks import presets\nglobals().update(presets.rabbitmq("slow"))\n'


class RabbitSite(Site):
    """A site whose producer has the same preset as its workers, and whose storage is a Valkey."""

    def __init__(self, folder: Path, url: str, storage: str) -> None:
        super().__init__(folder, url, TOPICS, CONFIG, WATCH_STORAGE_BACKEND=storage, WATCH_UNKNOWN_GRACE="4")
        self.bare.conf.update(presets.rabbitmq("slow"))


@pytest.fixture
def site(tmp_path: Path, rabbit: RabbitServer, valkey: RedisServer) -> Iterator[RabbitSite]:
    with kombu.Connection(rabbit.url) as connection:
        for name in ("celery", "slow", DEAD_LETTERS):  # a worker that is killed at the end of a test acks nothing
            connection.channel().queue_delete(name)
    site = RabbitSite(tmp_path / "site", rabbit.url, valkey.url)
    yield site
    site.close()
    kombu.pools.reset()


def count(rabbit: RabbitServer, queue: str) -> int:
    with kombu.Connection(rabbit.url) as connection:
        return int(connection.default_channel.queue_declare(queue, passive=True).message_count)


@pytest.mark.chaos
def test_kills_under_load_lose_nothing(site: RabbitSite, rabbit: RabbitServer) -> None:
    sent = {f"job-{number}" for number in range(150)}
    worker = site.worker()
    for number, index in enumerate(sorted(sent)):
        site.send("job", 0.02, index=index)
        if number % 40 == 39:
            worker.kill()
            worker = site.worker()

    site.until_handled(len(sent), 60)
    assert set(site.calls("index")) == sent
    assert not site.dead()
    assert count(rabbit, DEAD_LETTERS) == 0


def test_what_is_tried_again_waits_in_the_broker(site: RabbitSite) -> None:
    site.worker()
    site.send("job", "fails", index="fails", expires=3600)
    site.send("slow", 1, index="slow", queue="slow")

    site.until_dead(1)
    site.until_handled(1)
    at = {name: [line["at"] for line in site.lines() if line["handler"] == name] for name in ("work", "crawl")}
    assert [len(at["work"]), len(at["crawl"])] == [2, 3]
    assert at["work"][1] - at["work"][0] > 1.2
    # Two retries after 0.3 s each; where publishing them fails, only the end of a lease brings the next one.
    assert at["crawl"][2] - at["crawl"][0] < 8
    assert [letter.reason for letter in site.dead()] == [Reason.EXHAUSTED]


def test_what_cannot_be_handled_is_a_dead_letter_of_ours(site: RabbitSite, rabbit: RabbitServer) -> None:
    worker = site.worker()
    site.send("job", "poison", index="poison")
    site.send("nobody", 1)
    with kombu.Connection(rabbit.url) as connection:
        message = connection.default_channel.prepare_message(b"\xff{", content_type="application/json")
        connection.default_channel.basic_publish(message, exchange="", routing_key="celery")

    site.until_dead(3, 60)

    reasons = Counter(letter.reason for letter in site.dead())
    assert reasons[Reason.KILLED_WORKER] == 1
    assert reasons[Reason.UNKNOWN_TOPIC] == 1
    assert worker.is_running()
    assert count(rabbit, DEAD_LETTERS) == 0


def test_a_copy_that_expires_while_it_waits_is_buried(site: RabbitSite) -> None:
    site.worker()
    site.send("job", "fails", index="short", expires=2.0)

    # Its retry is due in 2 s, after it expired: as the broker's own time to live that would be the end of it.
    site.until_dead(1)

    assert [letter.reason for letter in site.dead()] == [Reason.EXPIRED]
    assert site.calls() == {"work": 1}


def test_a_copy_never_carries_a_time_to_live_of_the_broker(site: RabbitSite, rabbit: RabbitServer) -> None:
    site.worker()
    site.send("later", 1, expires=3600)

    with kombu.Connection(rabbit.url) as connection:
        channel = connection.default_channel
        until(lambda: channel.queue_declare("celery_delayed_5", passive=True).message_count > 0, "it waits", 20)
        waiting = channel.basic_get("celery_delayed_5", no_ack=True)

    assert "expiration" not in waiting.properties
    assert waiting.headers["expires"]


def test_queues_of_another_kind_are_said_so(site: RabbitSite, rabbit: RabbitServer) -> None:
    with kombu.Connection(rabbit.url) as connection:
        connection.default_channel.queue_declare("celery", durable=True, auto_delete=False)

    done = site.run("-m", "celery", "-A", "watch_tasks", "worker", "-P", "solo")

    assert done.returncode != 0
    assert "drain and delete both" in done.stderr


@pytest.mark.chaos  # it waits for 25 s; on Redis the same is in every run
def test_a_send_to_a_server_that_hangs_ends_and_sending_again_is_safe(site: RabbitSite, rabbit: RabbitServer) -> None:
    program = site.folder / "send_twice.py"
    program.write_text(
        "import json, sys, time\n"
        "from topics_here import job\n"
        "from watch_tasks import SendError, SendUnknownError\n"
        "import watch_tasks; watch_tasks.app\n"
        "job.send(0, index='before')\n"
        "print('sent', flush=True)\n"
        "sys.stdin.readline()\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    job.send(0, index='a')\n"
        "except SendUnknownError as exc:\n"
        "    message = exc.message\n"
        "print(time.monotonic() - began, flush=True)\n"
        "sys.stdin.readline()\n"
        "job.send(message)\n"
    )
    sender: Any = subprocess.Popen(
        [sys.executable, program.name],
        cwd=site.folder,
        env=site.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert sender.stdout.readline() == "sent\n"
        rabbit.signal(signal.SIGSTOP)
        try:
            sender.stdin.write("\n")
            sender.stdin.flush()
            is_over, _, _ = select.select([sender.stdout], [], [], 60)
        finally:
            rabbit.signal(signal.SIGCONT)
        assert is_over, "the send hangs"
        assert float(sender.stdout.readline()) < 40
        sender.communicate("\n", timeout=60)
    finally:
        sender.kill()
        sender.wait(20)

    site.worker()
    site.until_handled(2)
    assert sender.returncode == 0
    assert site.calls("index") == {"before": 1, "a": 1}


def test_what_is_delayed_before_a_worker_was_ever_there_is_not_lost(site: RabbitSite, rabbit: RabbitServer) -> None:
    """The broker confirms what it cannot route, and only workers told it where delayed messages go."""
    done = site.run(
        "-c", "import topics_here, watch_tasks; watch_tasks.app; topics_here.slow.send(1, index='a', delay=1)"
    )

    assert done.returncode == 0, done.stderr
    until(lambda: count(rabbit, "slow") == 1, "it is due", 10)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_is_handled_while_the_worker_stops_is_acked(site: RabbitSite, rabbit: RabbitServer, pool: str) -> None:
    worker = site.worker(pool=pool)
    for number in range(2):
        site.send("job", 1.5, index=str(number))
    until(lambda: len(site.lines()) == 2, "the handlers run")

    assert worker.stop() == 0

    assert site.handled("job") == 2
    assert count(rabbit, "celery") == 0


def test_batches_have_their_room_from_the_start(site: RabbitSite) -> None:
    """Quorum queues read the prefetch limit once, so it cannot follow what is collected."""
    site.worker(concurrency=2)

    for number in range(30):
        site.send("rows", number)

    site.until_handled(30, topic="rows")
    assert sorted(len(line["data"]) for line in site.lines()) == [10, 10, 10]
