"""A topic with a bound holds back its senders, and nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from watch_tasks import QueueFullError, RetryPolicy, SendFailedError, SendReport, Topic, topic
from watch_tasks.worker import install, outlet_of

from ..servers import RedisServer, free_port

pytestmark = pytest.mark.worker


@pytest.fixture
def app(valkey: RedisServer) -> Iterator[Celery]:
    with install(Celery("bounded", broker=valkey.url, set_as_current=False)) as app:
        app.conf.watch_send_wait = 0.5
        yield app


@pytest.fixture
def bounded(app: Celery) -> Topic[Any]:
    made: Topic[Any] = topic("bounded", max_waiting=3, retry=RetryPolicy(max_retries=1))
    made.bind(outlet_of(app))
    return made


def test_a_full_queue_refuses_after_a_while(bounded: Topic[Any], valkey: RedisServer) -> None:
    for number in range(3):
        bounded.send(number)
    began = time.monotonic()
    with pytest.raises(QueueFullError, match="3 messages wait in queue `celery`, its bound is 3"):
        bounded.send(3)
    assert 0.4 < time.monotonic() - began < 5
    with valkey.client() as client:
        assert client.llen("celery") == 3


def test_a_send_goes_on_when_there_is_room(bounded: Topic[Any], valkey: RedisServer, app: Celery) -> None:
    app.conf.watch_send_wait = 10
    for number in range(3):
        bounded.send(number)
    with valkey.client() as client:
        timer = threading.Timer(0.3, lambda: client.rpop("celery"))
        timer.start()
        bounded.send(3)
        timer.join()
        assert client.llen("celery") == 3


def test_what_is_not_due_yet_counts(bounded: Topic[Any]) -> None:
    for number in range(3):
        bounded.send(number, delay=60)
    with pytest.raises(QueueFullError):
        bounded.send(3)


def test_each_message_of_a_packet_counts(bounded: Topic[Any], app: Celery) -> None:
    other: Topic[Any] = topic("other")
    other.bind(outlet_of(app))
    other.send_many([1, 2])
    bounded.send(3)
    with pytest.raises(QueueFullError, match="3 messages wait"):
        bounded.send(4)


def test_a_bounded_topic_is_sent_one_by_one(bounded: Topic[Any], valkey: RedisServer) -> None:
    assert bounded.send_many(range(4)) == SendReport(sent=3, refused=1)
    with valkey.client() as client:
        assert client.llen("celery") == 3


def test_a_retry_is_never_refused(bounded: Topic[Any], app: Celery) -> None:
    sent = [bounded.send(number) for number in range(3)]

    class Request:
        delivery_info: dict[str, Any] = {}

        def as_execution_options(self) -> dict[str, Any]:
            return {}

        def __getattr__(self, name: str) -> None:
            return None

        def get(self, name: str, default: Any = None) -> Any:
            return default

    outlet: Any = outlet_of(app)
    outlet.push_copy(sent[0], 0.0, Request())


def test_a_topic_without_a_bound_is_not_held_back(bounded: Topic[Any], app: Celery) -> None:
    for number in range(3):
        bounded.send(number)
    free: Topic[Any] = topic("free")
    free.bind(outlet_of(app))
    free.send(1)


def test_a_broker_that_is_away_is_a_failed_send() -> None:
    with install(Celery("away", broker=f"redis://127.0.0.1:{free_port()}/0", set_as_current=False)) as app:
        made: Topic[Any] = topic("away", max_waiting=3)
        made.bind(outlet_of(app))
        with pytest.raises(SendFailedError):
            made.send(1)


@pytest.mark.parametrize("bound", [0, -1, True])
def test_a_bound_must_be_a_number_above_0(bound: Any) -> None:
    with pytest.raises(ValueError, match="`max_waiting` must be at least 1"):
        topic("wrong", max_waiting=bound)
