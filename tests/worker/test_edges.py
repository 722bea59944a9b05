"""What handlers, producers and operators do that nobody should, and a worker must bear."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from celery import Celery
from kombu.common import QoS

from watch_tasks import MemoryStorage, Reason
from watch_tasks.pipeline import Pipeline
from watch_tasks.worker.consumer import WatchConsumer

from ..servers import RedisServer
from ..workers import Site, until
from .test_garbage import envelope

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

#: One handler that does what its data says, and may try again once.
ODD = """
import importlib

class Mute(Exception):
    def __str__(self): raise RuntimeError("no words")

class Bound(Exception):
    def __init__(self, text, lock):
        super().__init__(text)
        self.lock = lock

odd = topic("odd", retry=RetryPolicy(max_retries=1))

@odd.handler
def act(message):
    note("act", message)
    match message.data:
        case "exit": sys.exit(-1)
        case "mute": raise Mute()
        case "bound": raise Bound("held", __import__("threading").Lock())
        case "huge": raise ValueError("x" * 3_000_000)
        case "generate": return (number for number in range(3))
        case "fork":
            if (child := os.fork()) == 0:
                return  # as if it was the worker
            os.waitpid(child, 0)
            raise ValueError("no")
        case "late":
            import late
            late.late.send(1, index="of a topic defined at work")
"""

LATE = """
from topics_here import note, topic
late = topic("late")

@late.handler
def look(message): note("look", message)
"""

ODDITIES = ("exit", "mute", "bound", "huge", "generate", "fork")


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_a_handler_does_is_one_failure_a_try(make_site: MakeSite, pool: str) -> None:
    site = make_site(ODD)
    worker = site.worker(pool=pool, concurrency=1)

    ids = {kind: site.send("odd", kind) for kind in ODDITIES}

    site.until_dead(len(ODDITIES), 15)
    assert {letter.id: letter.reason for letter in site.dead()} == dict.fromkeys(ids.values(), Reason.EXHAUSTED)
    assert site.calls("id") == dict.fromkeys(ids.values(), 2)
    assert worker.is_running()
    assert "malformed" not in worker.text()
    assert len(worker.text()) < 200_000


class _Timer:
    """Calls when it is told to, not when it is time."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def call_after(self, seconds: float, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.calls.append(lambda: function(*args))


def test_what_is_put_back_on_a_new_connection_leaves_its_limit_alone() -> None:
    clerk = Pipeline(MemoryStorage(), lambda name: None, worker="w")
    consumer: Any = object.__new__(WatchConsumer)
    consumer.runtime, consumer.timer, consumer.connection_errors = SimpleNamespace(clerk=clerk), _Timer(), ()
    message = SimpleNamespace(headers={"task": "watch.nosuch", "id": "m"}, body=b"", reject_log_error=Mock())
    consumer.qos = QoS(Mock(), 2)
    consumer._wait_or_bury(message)

    consumer.qos = QoS(Mock(), 2)
    for call in consumer.timer.calls:
        call()

    message.reject_log_error.assert_called_once()
    assert consumer.qos.value == 2


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_topic_defined_at_work_is_handled(make_site: MakeSite, pool: str) -> None:
    site = make_site(ODD)
    (site.folder / "late.py").write_text(LATE)
    site.worker(pool=pool, concurrency=1)

    site.send("odd", "late", index="early")

    site.until_handled(2, 10)
    assert site.dead() == []


GATE = """
gate = topic("gate", retry=RetryPolicy(max_retries=0))

@gate.handler
def enter(message):
    note("enter", message)
    if message.data == "suicide":
        os.kill(os.getpid(), signal.SIGTERM)
    wait_for("open")
    note("leave", message)
"""


def test_a_handler_that_ends_its_process_politely_is_dead_too(make_site: MakeSite) -> None:
    site = make_site(GATE, WATCH_MAX_CRASHES="1")
    site.worker(concurrency=1)

    id = site.send("gate", "suicide")

    site.until_dead(1, 10)
    assert [(letter.reason, letter.crashes) for letter in site.dead()] == [(Reason.KILLED_WORKER, 1)]
    assert site.calls("id") == {id: 1}


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_cold_stop_costs_nothing(make_site: MakeSite, pool: str) -> None:
    site = make_site(GATE, WATCH_MAX_CRASHES="1")
    worker = site.worker(concurrency=1, pool=pool)
    site.send("gate", 1)
    until(lambda: site.calls()["enter"] == 1, "the handler runs")

    worker.signal(signal.SIGQUIT)
    if pool == "prefork":
        worker.process.wait(15)
    site.touch("open")
    worker.process.wait(15)
    site.worker(concurrency=1)

    site.until_handled(1, 15)
    assert site.dead() == []


def test_a_terminated_message_is_kept(make_site: MakeSite) -> None:
    site = make_site(GATE)
    worker = site.worker(concurrency=1)
    id = site.send("gate", 1, shadow="a name for people")
    until(lambda: site.calls()["enter"] == 1, "the handler runs")

    site.bare.control.revoke(id, terminate=True)

    site.until_dead(1, 10)
    assert [(letter.topic, letter.reason) for letter in site.dead()] == [("gate", Reason.REVOKED)]
    site.touch("open")
    site.send("gate", 2)
    site.until_handled(1, 10)
    assert site.calls("id")[id] == 1
    assert worker.is_running()


def test_a_thread_that_cannot_be_terminated_is_not_lost(make_site: MakeSite) -> None:
    site = make_site(GATE, "worker_prefetch_multiplier = 2\n")
    worker = site.worker(concurrency=1, pool="threads")
    site.send("gate", 1)
    waiting = site.send("gate", 2)
    until(lambda: worker.text().count("received") == 2, "both are taken up", report=site.report)

    site.bare.control.revoke(waiting, terminate=True, reply=True, timeout=2)
    site.touch("open")

    until(lambda: site.handled() + len(site.dead()) == 2, "both have ended", 10, site.report)


def test_a_time_that_is_none_here_is_no_reason_to_forget_a_message(make_site: MakeSite) -> None:
    site = make_site(GATE)
    worker = site.worker(concurrency=1)
    message = envelope(eta="0001-01-01T00:00:00+14:00", task="watch.gate")

    with site.bare.connection().channel() as channel:
        channel.client.lpush("celery", json.dumps(message))

    site.until_dead(1, 10)
    assert [(letter.id, letter.reason) for letter in site.dead()] == [(message["headers"]["id"], Reason.MALFORMED)]
    assert worker.is_running()


def test_the_result_of_a_retry_reaches_who_waits_for_it(make_site: MakeSite) -> None:
    site = make_site(
        """
again = topic("again")

@again.handler
def fail_once(message):
    if message.retries == 0:
        raise ValueError("again")
""",
        "result_backend = broker_url = __import__('os').environ['CELERY_BROKER_URL']\n",
    )
    site.worker(concurrency=1)
    asking = Celery("asking", broker=site.url, backend=site.url, set_as_current=False)

    with asking:
        result = asking.send_task("watch.again", [1], ignore_result=False, headers={"traceparent": "00-1-2-01"})

        assert result.get(timeout=10) == "handled"


def test_a_message_cancelled_for_its_connection_is_handled_again(make_site: MakeSite) -> None:
    site = make_site(GATE, "worker_cancel_long_running_tasks_on_connection_loss = True\n", WATCH_MAX_CRASHES="1")
    site.worker(concurrency=2)
    id = site.send("gate", 1)
    until(lambda: site.calls()["enter"] == 1, "the handler runs")

    with site.bare.connection().channel() as channel:
        channel.client.client_kill_filter(_type="normal", skipme=True)
    until(lambda: site.calls()["enter"] == 2, "it runs again", 15, site.report)
    site.touch("open")

    site.until_handled(1, 10)
    assert site.calls("id") == {id: 3}, "the first time it did not leave"
    assert site.dead() == []


def test_what_cannot_be_buried_now_is_no_hot_loop(make_site: MakeSite, own_valkey: RedisServer) -> None:
    site = make_site(GATE, WATCH_STORAGE_BACKEND=own_valkey.url)
    worker = site.worker(concurrency=1)

    own_valkey.stop()
    id = site.send("gate", 1, expires=-1)
    until(lambda: "handed over again" in worker.text(), "it could not be buried", 10)
    seen = worker.text().count("Discarding revoked task")
    own_valkey.start()

    site.until_dead(1, 15)
    assert [(letter.id, letter.reason) for letter in site.dead()] == [(id, Reason.EXPIRED)]
    assert seen == 1
    assert worker.text().count("Discarding revoked task") <= 3
