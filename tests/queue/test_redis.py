from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kombu.exceptions
import kombu.pools
import pytest
import redis
from celery import Celery

from watch_tasks import (
    ConfigurationError,
    Message,
    QueueUnavailableError,
    Reason,
    SendFailedError,
    SendUnknownError,
    TooLargeError,
    open_queue,
)
from watch_tasks.queue import Delivery, Queue, Unreadable
from watch_tasks.queue.redis import RedisQueue, broker_url, send_error
from watch_tasks.testing.queue import QueueSuite

from ..servers import RedisServer, free_port
from ..workers import until

pytestmark = pytest.mark.integration

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def queue(valkey: RedisServer) -> Iterator[RedisQueue]:
    with RedisQueue(valkey.url) as queue:
        yield queue


@pytest.fixture
def app(valkey: RedisServer) -> Iterator[Celery]:
    """A Celery app that has never heard of this package."""
    with Celery(broker=valkey.url, set_as_current=False) as app:
        yield app
    kombu.pools.reset()


class TestRedisQueue(QueueSuite):
    takes_packets = True

    @pytest.fixture
    def queue(self, valkey: RedisServer) -> Iterator[RedisQueue]:
        with RedisQueue(valkey.url) as queue:
            yield queue

    @pytest.fixture
    def reopen(self, valkey: RedisServer) -> Callable[[], Queue]:
        return lambda: RedisQueue(valkey.url)


class TestRedisQueueOnRedis(QueueSuite):
    takes_packets = True

    @pytest.fixture
    def queue(self, redis_server: RedisServer) -> Iterator[RedisQueue]:
        with RedisQueue(redis_server.url) as queue:
            yield queue

    @pytest.fixture
    def reopen(self, redis_server: RedisServer) -> Callable[[], Queue]:
        return lambda: RedisQueue(redis_server.url)


def take(queue: Queue) -> Message[Any] | Unreadable:
    delivery = take_delivery(queue)
    delivery.ack()
    return delivery.message


def take_delivery(queue: Queue) -> Delivery:
    delivery = queue.next(timeout=10)
    assert delivery is not None
    return delivery


class TestCelery:
    def test_what_a_celery_app_sends_is_read(self, app: Celery, queue: RedisQueue) -> None:
        sent = app.send_task("watch.alarm", [{"host": "web-1"}])

        message = take(queue)

        assert isinstance(message, Message)
        assert (message.id, message.topic, message.data) == (sent.id, "alarm", {"host": "web-1"})
        assert (message.index, message.retries, message.max_retries, message.once) == (sent.id, 0, None, None)

    def test_its_optional_keywords_are_read(self, app: Celery, queue: RedisQueue) -> None:
        app.send_task("watch.alarm", [1], {"index": "web-1", "max_retries": 7, "once": "index"})
        message = take(queue)
        assert isinstance(message, Message)
        assert (message.index, message.max_retries, message.once) == ("web-1", 7, "index")

    @pytest.mark.parametrize("compression", ["zlib", "gzip", "bzip2"])
    def test_what_it_compresses_is_read(self, app: Celery, queue: RedisQueue, compression: str) -> None:
        app.send_task("watch.alarm", ["x" * 1000], compression=compression)
        message = take(queue)
        assert isinstance(message, Message)
        assert message.data == "x" * 1000

    def test_its_countdown_is_kept(self, app: Celery, queue: RedisQueue) -> None:
        started = time.monotonic()
        app.send_task("watch.alarm", [1], countdown=0.3)
        take(queue)
        assert time.monotonic() - started > 0.25

    def test_what_expired_is_unreadable(self, app: Celery, queue: RedisQueue) -> None:
        app.send_task("watch.alarm", [1], expires=datetime.now(UTC) - timedelta(seconds=1))
        message = take(queue)
        assert isinstance(message, Unreadable)
        assert (message.reason, message.topic) == (Reason.EXPIRED, "alarm")

    def test_it_reads_what_the_queue_sends(self, app: Celery, queue: RedisQueue) -> None:
        sent = Message({"host": "web-1"}, "alarm", index="i", max_retries=2)
        queue.push(sent)

        with app.connection_for_read() as connection:
            simple = connection.SimpleQueue("celery")
            received = simple.get(timeout=10)
            received.ack()
            simple.close()

        args, keywords, embed = received.payload
        assert (args, keywords) == ([{"host": "web-1"}], {"index": "i", "max_retries": 2})
        assert embed == {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        assert received.headers["task"] == "watch.alarm"
        assert received.headers["id"] == received.properties["correlation_id"] == sent.id
        assert received.headers["kwargsrepr"] == "{'index': 'i'}"

    def test_what_it_sends_with_a_delay_is_no_matter_of_clocks(self, queue: RedisQueue, valkey: RedisServer) -> None:
        queue.push(Message(1, "alarm"), delay=3600)
        with valkey.client() as client:
            assert client.llen("celery") == 0
            ((_, due),) = client.zrange("celery\x06\x16later", 0, -1, withscores=True)
            seconds, micros = client.time()
        assert due / 1000 - seconds - micros / 1e6 == pytest.approx(3600, abs=5)
        assert queue.len() == 1

    def test_its_headers_are_those_of_celery(self, app: Celery, queue: RedisQueue, valkey: RedisServer) -> None:
        app.send_task("watch.alarm", [1], ignore_result=True)
        queue.push(Message(1, "alarm"))

        with valkey.client() as client:
            ours, theirs = (json.loads(item) for item in client.lrange("celery", 0, -1))

        assert ours.keys() == theirs.keys()
        assert ours["content-type"] == theirs["content-type"]
        assert ours["headers"].keys() == {*theirs["headers"], "watch"}


def malformed() -> Iterator[Any]:
    path = DATA / "malformed.jsonl"
    if not path.exists():
        yield pytest.param({}, marks=pytest.mark.skip(reason=f"no {path.name} beside this checkout"))
        return
    with path.open() as lines:
        for line in lines:
            case = json.loads(line)
            yield pytest.param(case, id=case["name"])


class TestWhatIsNoMessage:
    @pytest.mark.parametrize("case", list(malformed()))
    def test_it_comes_out_and_what_follows_too(
        self, valkey: RedisServer, queue: RedisQueue, case: dict[str, Any]
    ) -> None:
        with valkey.client() as client:
            client.lpush("celery", case["item"])
        queue.push(Message("good", "probe"))

        first, second = take(queue), take(queue)

        readable = isinstance(first, Message) and first.topic == "probe"
        assert ("handled" if readable else "dead") in case["expect"]
        assert isinstance(second, Message)
        assert second.data == "good"
        with valkey.client() as client:
            until(lambda: not list(client.scan_iter("watch.held:*")), "nothing is in hand")

    @pytest.mark.parametrize("item", [b"", b"\xff\xfe", b"null", b"[]", b'{"properties": 1}', b"[" * 5000])
    def test_an_item_that_is_no_envelope_comes_out_with_its_bytes(
        self, valkey: RedisServer, queue: RedisQueue, item: bytes
    ) -> None:
        with valkey.client() as client:
            client.lpush("celery", item)
        unreadable = take(queue)
        assert isinstance(unreadable, Unreadable)
        assert (unreadable.reason, unreadable.raw) == (Reason.UNDECODABLE, item)

    def test_an_item_that_is_no_envelope_is_delivered_again(self, valkey: RedisServer) -> None:
        with valkey.client() as client:
            client.lpush("celery", b"garbage{{{")
        with RedisQueue(valkey.url) as queue:
            first = take_delivery(queue).message
        with RedisQueue(valkey.url) as queue:
            assert take(queue) == first

    def test_another_programs_task_is_malformed(self, app: Celery, queue: RedisQueue) -> None:
        sent = app.send_task("shop.send_invoice", [1])
        unreadable = take(queue)
        assert isinstance(unreadable, Unreadable)
        assert (unreadable.reason, unreadable.id, unreadable.topic) == (Reason.MALFORMED, sent.id, None)
        assert "'shop.send_invoice': another program's task" in unreadable.error

    def test_a_pickle_is_never_opened(self, app: Celery, queue: RedisQueue) -> None:
        app.send_task("watch.alarm", [1], serializer="pickle")
        unreadable = take(queue)
        assert isinstance(unreadable, Unreadable)
        assert (unreadable.reason, unreadable.topic) == (Reason.UNDECODABLE, "alarm")
        assert unreadable.content_type == "application/x-python-serialize"
        assert unreadable.raw.startswith(b"\x80")

    def test_what_is_too_large_is_said_so(self, app: Celery, queue: RedisQueue) -> None:
        app.send_task("watch.alarm", ["x" * 1_100_000])
        unreadable = take(queue)
        assert isinstance(unreadable, Unreadable)
        assert (unreadable.reason, len(unreadable.raw) > 1_100_000) == (Reason.TOO_LARGE, True)


class TestRedelivery:
    def test_what_a_dead_process_held_comes_again(self, valkey: RedisServer) -> None:
        options = {"lease": 0.6, "renew_every": 0.2}
        with RedisQueue(valkey.url, options=options) as other:
            assert other.next(timeout=0.1) is None  # looks after the others from now on
            dead = RedisQueue(valkey.url, options=options)
            dead.push(Message(1, "alarm"))
            held = dead.next(timeout=5)
            assert dead._flight
            dead._flight._is_closed.set()  # nobody renews it any more
            assert take(other).data == 1  # type: ignore[union-attr]

            assert held
            held.ack()
            assert other.len() == 0
        dead.close()

    def test_a_late_ack_takes_nothing_from_its_new_holder(self, valkey: RedisServer) -> None:
        options = {"lease": 0.6, "renew_every": 0.2}
        with RedisQueue(valkey.url, options=options) as other, RedisQueue(valkey.url, options=options) as frozen:
            assert other.next(timeout=0.1) is None
            frozen.push(Message(1, "alarm"))
            held = frozen.next(timeout=5)
            assert held
            assert frozen._flight
            frozen._flight._is_closed.set()
            again = take_delivery(other)
            held.ack()
            frozen._flight._tell()
            assert other._flight
            with valkey.client() as client:
                assert client.hlen(other._flight._held_key) == 1
            again.back()
            take_delivery(other).ack()

    def test_what_is_held_is_renewed(self, valkey: RedisServer) -> None:
        options = {"lease": 0.6, "renew_every": 0.1}
        with RedisQueue(valkey.url, options=options) as queue, RedisQueue(valkey.url, options=options) as other:
            queue.push(Message(1, "alarm"))
            delivery = take_delivery(queue)
            assert other.next(timeout=2.0) is None
            delivery.ack()

    def test_what_nobody_refers_to_goes_back(self, queue: RedisQueue) -> None:
        queue.push(Message(1, "alarm"))
        assert queue.next(timeout=10)
        assert take(queue).data == 1  # type: ignore[union-attr]

    def test_when_nobody_looked_for_a_while_every_lease_begins_anew(self, valkey: RedisServer) -> None:
        options = {"lease": 0.6, "renew_every": 0.2}
        with RedisQueue(valkey.url, options=options) as dead:
            dead.push(Message(1, "alarm"))
            held = dead.next(timeout=5)
            assert held
            assert dead._flight
            dead._flight._is_closed.set()
            dead._flight._thread.join()
            time.sleep(0.8)  # the lease is over, and so is half of one since anybody looked
            began = time.monotonic()
            with RedisQueue(valkey.url, options=options) as other:
                take(other)
                assert time.monotonic() - began > 0.5

    def test_a_lost_connection_leaves_what_is_in_hand(self, own_valkey: RedisServer) -> None:
        with RedisQueue(own_valkey.url) as queue:
            queue.push(Message("in hand", "alarm"))
            held = take_delivery(queue)
            with own_valkey.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(QueueUnavailableError):
                queue.next(timeout=10)
            assert queue.next(timeout=0.7) is None

            held.ack()

            assert queue.next(timeout=0.7) is None
            with own_valkey.client() as client:
                assert not list(client.scan_iter("watch.held:*"))

    def test_an_answer_that_is_lost_loses_nothing(self, queue: RedisQueue) -> None:
        assert queue.next(timeout=0.1) is None
        queue.push(Message(1, "alarm"))
        assert queue._flight
        assert queue._reader
        # The server moves the message, and nobody hears of it.
        command = queue._flight.ask(1, queue._lists, [queue._later])
        queue._client.execute_command("EVALSHA", *command[1:])
        queue._drop_reader()
        assert take(queue).data == 1  # type: ignore[union-attr]


class TestTrouble:
    def test_a_server_that_is_not_there_is_a_failed_send(self) -> None:
        with RedisQueue(f"redis://127.0.0.1:{free_port()}/0") as queue, pytest.raises(SendFailedError, match="refused"):
            queue.push(Message(1, "alarm"))

    def test_a_server_that_is_not_there_is_unavailable(self) -> None:
        with RedisQueue(f"redis://127.0.0.1:{free_port()}/0") as queue:
            with pytest.raises(QueueUnavailableError):
                queue.next(timeout=1)
            with pytest.raises(QueueUnavailableError):
                queue.len()

    def test_a_server_that_hangs_makes_a_send_unknown_in_bounded_time(self, own_valkey: RedisServer) -> None:
        message = Message(1, "alarm")
        with RedisQueue(own_valkey.url, options={"socket_timeout": 0.3, "socket_connect_timeout": 0.3}) as queue:
            queue.push(Message(0, "alarm"))
            own_valkey.signal(signal.SIGSTOP)
            started = time.monotonic()

            with pytest.raises(SendUnknownError) as caught:
                queue.push(message)

            assert time.monotonic() - started < 5
            assert caught.value.message is message
            own_valkey.signal(signal.SIGCONT)

    def test_a_restart_of_the_server_is_survived(self, lasting_valkey: RedisServer) -> None:
        with RedisQueue(lasting_valkey.url) as queue:
            queue.push(Message("before", "alarm"))
            lasting_valkey.stop(signal.SIGKILL)
            lasting_valkey.start()
            queue.push(Message("after", "alarm"))
            assert [take(queue).data for _ in range(2)] == ["before", "after"]  # type: ignore[union-attr]

    def test_a_full_server_is_a_failed_send(self, own_valkey: RedisServer) -> None:
        with own_valkey.client() as client:
            client.config_set("maxmemory", "1")
        with RedisQueue(own_valkey.url) as queue, pytest.raises(SendFailedError, match="maxmemory"):
            queue.push(Message(1, "alarm"))

    def test_too_much_data_is_refused(self, queue: RedisQueue) -> None:
        with pytest.raises(TooLargeError):
            queue.push(Message("x" * 1_048_577, "alarm"))

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (ConnectionRefusedError(), SendFailedError),
            (redis.ConnectionError("Error 111 connecting to h:1. Connection refused."), SendFailedError),
            (redis.TimeoutError("Timeout connecting to server"), SendFailedError),
            (redis.AuthenticationError("WRONGPASS"), SendFailedError),
            (redis.exceptions.OutOfMemoryError("used memory > 'maxmemory'"), SendFailedError),
            (redis.exceptions.BusyLoadingError("loading"), SendFailedError),
            (redis.exceptions.ReadOnlyError("replica"), SendFailedError),
            (redis.ConnectionError("Connection closed by server."), SendUnknownError),
            (redis.TimeoutError("Timeout reading from socket"), SendUnknownError),
            (ConnectionResetError(), SendUnknownError),
        ],
    )
    def test_a_failed_publish_is_told_from_an_unknown_one(self, error: Exception, kind: type[Exception]) -> None:
        outer = kombu.exceptions.OperationalError(str(error))
        outer.__cause__ = error
        assert type(send_error(outer, Message(1, "alarm"))) is kind
        assert type(send_error(error, Message(1, "alarm"))) is kind


class TestUrls:
    def test_the_queue_stands_in_the_url(self, valkey: RedisServer, app: Celery) -> None:
        app.send_task("watch.alarm", [1], queue="slow")
        with open_queue(f"{valkey.url}?queue=slow") as queue:
            assert queue.len() == 1

    def test_tls_checks_certificates_unless_told_otherwise(self) -> None:
        assert broker_url("rediss://h/0") == "rediss://h/0?ssl_cert_reqs=CERT_REQUIRED"
        assert broker_url("rediss://h/0?ssl_cert_reqs=CERT_NONE") == "rediss://h/0?ssl_cert_reqs=CERT_NONE"

    def test_a_socket_may_be_written_as_in_redis(self) -> None:
        assert broker_url("unix:///run/valkey.sock") == "redis+socket:///run/valkey.sock"

    @pytest.mark.parametrize("url", ["redis://:secret@h:port/0", "redis://:secret@h/zero"])
    def test_a_url_that_cannot_be_read_is_refused_without_its_password(self, url: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            open_queue(url)
        assert "secret" not in str(caught.value)

    def test_a_password_is_not_shown(self) -> None:
        assert "secret" not in repr(RedisQueue("redis://:secret@h/0"))


def test_closing_from_another_thread_wakes_next(queue: RedisQueue) -> None:
    timer = threading.Timer(0.1, queue.close)
    timer.start()
    assert queue.next() is None
    timer.join()


def test_a_prefix_of_keys_is_kept_to(valkey: RedisServer) -> None:
    options = {"global_keyprefix": "mine:"}
    with valkey.client() as client:
        client.lpush("mine:celery", b"garbage{{{")
    with RedisQueue(valkey.url, options=options) as queue:
        queue.push(Message(1, "alarm"))
        first = take_delivery(queue).message
    with RedisQueue(valkey.url, options=options) as queue:
        assert [message for message in (take(queue), take(queue)) if isinstance(message, Unreadable)] == [first]
    with valkey.client() as client:
        assert all(key.startswith(b"mine:") for key in client.scan_iter())
