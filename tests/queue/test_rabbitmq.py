from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import kombu.pools
import pytest
from celery import Celery

from watch_tasks import (
    ConfigurationError,
    Message,
    QueueUnavailableError,
    Reason,
    SendError,
    SendFailedError,
    Topic,
    open_queue,
)
from watch_tasks import topic as define
from watch_tasks.packets import MOST_MEMBERS
from watch_tasks.queue import Queue, Unreadable
from watch_tasks.queue.amqp import AmqpQueue, quorum_arguments
from watch_tasks.testing.queue import QueueSuite
from watch_tasks.worker import install, outlet_of

from ..rabbit import RabbitServer, find_rabbit
from ..servers import free_port

pytestmark = pytest.mark.integration


@pytest.fixture
def reopen(rabbit: RabbitServer) -> Callable[[], Queue]:
    name = uuid4().hex
    return lambda: AmqpQueue(rabbit.url, name, arguments=quorum_arguments())


@pytest.fixture
def queue(reopen: Callable[[], Queue]) -> Iterator[Queue]:
    with reopen() as queue:
        yield queue


class TestAmqpQueue(QueueSuite):
    takes_packets = True
    counts_in_packets = False

    @pytest.fixture
    def reopen(self, rabbit: RabbitServer) -> Callable[[], Queue]:
        name = uuid4().hex
        return lambda: AmqpQueue(rabbit.url, name, arguments=quorum_arguments())

    @pytest.fixture
    def queue(self, reopen: Callable[[], Queue]) -> Iterator[Queue]:
        with reopen() as queue:
            yield queue


def test_what_a_celery_app_sends_is_read(rabbit: RabbitServer) -> None:
    name = uuid4().hex
    with (
        Celery(broker=rabbit.url, set_as_current=False) as app,
        open_queue(f"{rabbit.url}?queue={name}") as queue,
    ):
        sent = app.send_task("watch.alarm", [{"host": "web-1"}], {"index": "i"}, queue=name)
        delivery = queue.next(timeout=10)
        assert delivery
        delivery.ack()
    kombu.pools.reset()
    assert isinstance(delivery.message, Message)
    assert (delivery.message.id, delivery.message.index, delivery.message.data) == (sent.id, "i", {"host": "web-1"})


def test_packets_that_a_celery_app_sends_are_read(rabbit: RabbitServer) -> None:
    name = uuid4().hex
    topic: Topic[int] = define("alarm", queue=name)
    with (
        install(Celery("packets", broker=rabbit.url, set_as_current=False)) as app,
        open_queue(f"{rabbit.url}?queue={name}") as queue,
    ):
        app.conf.watch_storage_backend = "memory://"
        topic.bind(outlet_of(app))
        count = MOST_MEMBERS + 50
        assert topic.send_many(range(count)).sent == count
        assert queue.len() == 2
        got = []
        for _ in range(count):
            delivery = queue.next(timeout=10)
            assert delivery
            assert isinstance(delivery.message, Message)
            got.append(delivery.message.data)
            delivery.ack()
        assert got == list(range(count))
        assert queue.next(timeout=0.05) is None
    kombu.pools.reset()


def test_what_is_no_message_comes_out_with_its_bytes(rabbit: RabbitServer, queue: AmqpQueue) -> None:
    queue.len()
    with kombu.Connection(rabbit.url) as connection:
        connection.default_channel.basic_publish(
            connection.default_channel.prepare_message(b"\xff{", content_type="application/json"),
            exchange="",
            routing_key=queue.name,
        )
    delivery = queue.next(timeout=10)
    assert delivery
    assert isinstance(delivery.message, Unreadable)
    assert (delivery.message.reason, delivery.message.raw) == (Reason.UNDECODABLE, b"\xff{")


@pytest.mark.chaos
def test_a_kill_of_the_server_is_survived(tmp_path: Path) -> None:
    server = RabbitServer(tmp_path / "rabbit", find_rabbit()).start()
    try:
        with AmqpQueue(server.url, arguments=quorum_arguments()) as queue:
            queue.push(Message("before", "alarm"))
            server.stop(signal.SIGKILL)
            with pytest.raises(SendFailedError):
                AmqpQueue(server.url).push(Message("never", "alarm"))
            server.start()
            after = Message("after", "alarm")
            while True:  # the queue's leader needs a moment; sending again is safe
                with suppress(SendError):
                    queue.push(after)
                    break
            got: list[Any] = []
            deadline = time.monotonic() + 20
            while len(set(got)) < 2 and time.monotonic() < deadline:
                with suppress(QueueUnavailableError):
                    delivery = queue.next(timeout=1)
                    if delivery:
                        delivery.ack()
                        got.append(delivery.message.data)  # type: ignore[union-attr]
            assert list(dict.fromkeys(got)) == ["before", "after"]
    finally:
        server.stop(signal.SIGKILL)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with AmqpQueue(f"amqp://127.0.0.1:{free_port()}//") as queue:
        with pytest.raises(QueueUnavailableError):
            queue.next(timeout=1)
        with pytest.raises(QueueUnavailableError):
            queue.len()


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(AmqpQueue("amqp://me:secret@h//"))


def test_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="quorum"):
        open_queue("amqp://h//?type=fast")
