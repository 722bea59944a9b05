"""The Redis transport as kombu's users see it, beside kombu's own, on real servers."""

from __future__ import annotations

import bz2
import gc
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import kombu
import kombu.transport
import pytest
import redis
from kombu.transport.redis import Transport as StockTransport

from watch_tasks.errors import TooLargeError
from watch_tasks.queue.item import NO_ENVELOPE
from watch_tasks.transport import install
from watch_tasks.transport.redis import SentinelTransport, Transport

from ..servers import RedisServer, free_port
from ..workers import until

pytestmark = pytest.mark.integration

#: Leases that end soon.
SHORT = {"lease": 0.8, "renew_every": 0.2}


#: An envelope whose body is a number, which is no length of bytes to allocate.
NUMBER = json.dumps(
    {"body": 10**30, "properties": {"delivery_tag": "x", "delivery_info": {"exchange": "", "routing_key": "q"}}}
).encode()


class Reader:
    """A consumer of one queue or several, with everything it was given."""

    def __init__(self, connection: kombu.Connection, *queues: str, prefetch: int = 0, **options: Any) -> None:
        self.connection = connection
        self.channel: Any = connection.channel()
        self.messages: list[Any] = []
        self.errors: list[tuple[Any, BaseException]] = []
        if prefetch:
            self.channel.basic_qos(0, prefetch, False)
        self.consumer = kombu.Consumer(
            self.channel,
            [kombu.Queue(name) for name in queues or ("q",)],
            on_message=self.messages.append,
            on_decode_error=lambda message, error: self.errors.append((message, error)),
            **options,
        )
        self.consumer.consume()

    def drain(self, seconds: float = 0.3) -> list[Any]:
        """Let come what comes within some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(socket.timeout):
                self.connection.drain_events(timeout=max(end - time.monotonic(), 0.01))
        return self.messages

    def take(self, count: int = 1) -> list[Any]:
        """Wait until so many have come."""
        until(lambda: bool(self.drain(0.02)) and len(self.messages) >= count, f"{count} messages")
        return self.messages

    def bodies(self) -> list[Any]:
        return [message.payload for message in self.messages]


@pytest.fixture(params=["valkey", "redis_server"])
def server(request: pytest.FixtureRequest) -> RedisServer:
    found: RedisServer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def connect(server: RedisServer) -> Iterator[Callable[..., kombu.Connection]]:
    made: list[kombu.Connection] = []

    def make(transport: Any = Transport, url: str = "", **options: Any) -> kombu.Connection:
        made.append(kombu.Connection(url or server.url, transport=transport, transport_options=options))
        return made[-1]

    yield make
    for connection in made:
        connection.release()


def send(connection: kombu.Connection, *bodies: Any, queue: str = "q", **options: Any) -> None:
    for body in bodies:
        connection.default_channel  # noqa: B018 - connects
        kombu.Producer(connection.default_channel).publish(
            body, routing_key=queue, declare=[kombu.Queue(queue)], **options
        )


def in_hand(server: RedisServer) -> int:
    with server.client() as client:
        return sum(client.hlen(key) for key in client.scan_iter("watch.held:*"))


class TestMessages:
    def test_they_come_in_order_and_are_gone_when_acked(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        send(connection, *range(250))
        reader = Reader(connection)
        assert [message.payload for message in reader.take(250)] == list(range(250))
        assert in_hand(server) == 250
        for message in reader.messages:
            message.ack()
        until(lambda: in_hand(server) == 0, "all are told")

    @pytest.mark.parametrize(("sender", "receiver"), [(StockTransport, Transport), (Transport, StockTransport)])
    def test_what_one_transport_writes_the_other_reads(self, connect: Any, sender: Any, receiver: Any) -> None:
        send(connect(sender), {"a": [1, "ü"]}, headers={"x": 1}, priority=0)
        reader = Reader(connect(receiver))
        (message,) = reader.take()
        assert (message.payload, message.headers["x"]) == ({"a": [1, "ü"]}, 1)
        message.ack()

    def test_one_that_is_put_back_while_the_server_hangs_holds_up_nobody_and_comes_again(
        self, connect: Any, own_valkey: RedisServer
    ) -> None:
        connection = connect(url=own_valkey.url)
        send(connection, "x")
        reader = Reader(connection, prefetch=1)
        (message,) = reader.take()
        own_valkey.signal(signal.SIGSTOP)
        began = time.monotonic()
        message.reject(requeue=True)
        took = time.monotonic() - began
        own_valkey.signal(signal.SIGCONT)
        assert took < 2, "an answer is waited for 5 s"
        # The message itself is kept here, as by the traceback of an error.
        assert [one.payload for one in reader.take(2)] == ["x", "x"]

    def test_a_channel_keeps_its_clients(self, connect: Any) -> None:
        channel = connect().default_channel
        kept = channel._create_client(), channel._plain()
        assert (channel._create_client(), channel._plain()) == kept

    def test_its_clients_are_those_of_the_connections_it_has(self, connect: Any) -> None:
        connection = connect()
        send(connection, "first", "x" * 100_000)
        connection.default_channel._disconnect_pools()
        send(connection, "then", "y" * 100_000)
        bodies = [message.payload for message in Reader(connect(StockTransport)).take(4)]
        assert bodies == ["first", "x" * 100_000, "then", "y" * 100_000]

    def test_what_one_gives_back_the_other_reads(self, connect: Any) -> None:
        ours = connect()
        send(ours, "back")
        Reader(ours).take()
        ours.release()
        reader = Reader(connect(StockTransport))
        assert reader.take()[0].payload == "back"
        reader.messages[0].ack()

    def test_no_more_are_taken_than_the_prefetch_limit(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        send(connection, *range(10))
        reader = Reader(connection, prefetch=3)
        assert len(reader.drain()) == 3
        with server.client() as client:
            assert (client.llen("q"), in_hand(server)) == (7, 3)
        reader.messages[1].ack()
        assert len(reader.drain()) == 4

    def test_the_most_urgent_come_first_over_all_queues(self, connect: Any) -> None:
        connection = connect()
        for queue in ("one", "two"):
            for priority in (9, 0, 5):
                send(connection, [priority, queue], queue=queue, priority=priority)
        reader = Reader(connection, "one", "two", prefetch=1)
        for count in range(1, 7):
            reader.take(count)[count - 1].ack()
        assert [body[0] for body in reader.bodies()] == [0, 0, 5, 5, 9, 9]

    def test_a_busy_queue_does_not_starve_another(self, connect: Any) -> None:
        connection = connect()
        send(connection, *["busy"] * 20, queue="one")
        send(connection, *["quiet"] * 2, queue="two")
        reader = Reader(connection, "one", "two", prefetch=1)
        for count in range(1, 7):
            reader.take(count)[count - 1].ack()
        assert reader.bodies().count("quiet") == 2

    def test_what_needs_no_ack_is_not_kept(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        send(connection, 1, 2)
        Reader(connection, no_ack=True).take(2)
        until(lambda: in_hand(server) == 0, "none is in hand")

    def test_nor_does_it_say_anything_of_the_next_consumer(self, connect: Any) -> None:
        connection = connect()
        reader = Reader(connection, no_ack=True)
        reader.consumer.cancel()
        reader.consumer.consume(no_ack=False)
        send(connection, 1)
        reader.take()
        assert reader.channel.flight.count == 1

    def test_two_channels_of_a_connection_may_read_one_queue(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        one, other = Reader(connection, prefetch=1), Reader(connection, prefetch=1)
        send(connection, 1, 2)
        until(lambda: bool(one.drain(0.1)) and bool(other.messages), "each has one")
        (first,), (second,) = one.messages, other.messages
        first.ack()
        one.channel.flight.tend()
        assert in_hand(server) == 1, "what the other has in hand under the same number"
        one.consumer.cancel()
        second.requeue()
        assert other.take(2)[1].payload == second.payload

    def test_one_can_be_fetched_by_itself(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        send(connection, 1, 2)
        queue = kombu.Queue("q")(connection.channel())
        first, second = queue.get(), queue.get(no_ack=True)
        assert (first.payload, second.payload, queue.get()) == (1, 2, None)
        until(lambda: in_hand(server) == 1, "only the first is in hand")
        first.ack()
        until(lambda: in_hand(server) == 0, "both are settled")

    def test_a_purge_takes_what_is_due_later_as_well(self, connect: Any) -> None:
        connection = connect()
        send(connection, 1)
        send(connection, 2, headers={"eta": (datetime.now(UTC) + timedelta(hours=1)).isoformat()})
        queue = kombu.Queue("q")(connection.channel())
        assert queue.purge() == 2
        assert queue.get() is None

    def test_a_prefix_of_keys_is_kept_to(self, connect: Any, own_valkey: RedisServer) -> None:
        """On a server of its own: what other tests have left in hand has keys too."""
        connection = connect(url=own_valkey.url, global_keyprefix="mine:")
        send(connection, 1)
        send(connection, 2, headers={"eta": (datetime.now(UTC) + timedelta(seconds=0.3)).isoformat()})
        reader = Reader(connection)
        assert sorted(message.payload for message in reader.take(2)) == [1, 2]
        with own_valkey.client() as client:
            assert all(key.startswith(b"mine:") for key in client.scan_iter())

    def test_a_batch_is_published_whole(self, connect: Any) -> None:
        connection = connect()
        producer = kombu.Producer(connection.default_channel)
        with producer.batch(50):
            for number in range(120):
                producer.publish(number, routing_key="q", declare=[kombu.Queue("q")])
        assert sorted(message.payload for message in Reader(connection).take(120)) == list(range(120))


class TestCounting:
    """Messages wait, not envelopes: a packet says in its header how many it holds."""

    @staticmethod
    def send(connection: kombu.Connection, count: int, **more: Any) -> None:
        headers = {"task": "watch._bulk", "watch": {"version": 1, "messages": count}, **more}
        send(connection, ["x" * 1000], headers=headers)

    def test_what_waits_is_counted(self, connect: Any) -> None:
        connection = connect()
        channel = connection.channel()
        assert channel.count_waiting("q") == 0
        send(connection, 1, 2)
        self.send(connection, 250)
        self.send(connection, 7)
        assert channel.count_waiting("q") == 259
        assert channel.count_waiting("other") == 0

    def test_what_is_not_due_yet_is_counted_too(self, connect: Any) -> None:
        connection = connect()
        self.send(connection, 7, eta=(datetime.now(UTC) + timedelta(seconds=0.5)).isoformat())
        channel = connection.channel()
        assert channel.count_waiting("q") == 7
        Reader(connection).take()
        assert channel.count_waiting("q") == 0

    def test_what_is_in_hand_is_not_and_what_comes_back_is(self, connect: Any) -> None:
        connection = connect()
        self.send(connection, 7)
        self.send(connection, 3)
        send(connection, 1)
        reader = Reader(connection, prefetch=1)
        (message,) = reader.take()
        channel = connect().channel()
        assert channel.count_waiting("q") == 4
        reader.consumer.cancel()
        message.reject(requeue=True)
        until(lambda: channel.count_waiting("q") == 11, "it is put back")
        reader.channel.close()
        assert channel.count_waiting("q") == 11

    def test_what_a_dead_reader_held_is_counted_again(self, connect: Any) -> None:
        connection = connect(**SHORT)
        self.send(connection, 7)
        dead = Reader(connection)
        dead.take()
        channel = connect().channel()
        dead.channel.flight._is_closed.set()  # its thread ends: nobody renews
        other = connect(**SHORT).channel()
        until(lambda: other.flight.tend() or channel.count_waiting("q") == 7, "it was put back")

    def test_each_priority_counts_and_each_is_counted_out(self, connect: Any) -> None:
        connection = connect()
        headers = {"task": "watch._bulk", "watch": {"messages": 5}}
        for priority in (0, 3, 9):
            send(connection, [1], headers=headers, priority=priority)
        channel = connection.channel()
        assert channel.count_waiting("q") == 15
        Reader(connection).take(3)
        assert channel.count_waiting("q") == 0

    def test_a_batch_is_counted(self, connect: Any) -> None:
        connection = connect()
        producer = kombu.Producer(connection.default_channel)
        with producer.batch(50):
            for _ in range(3):
                headers = {"task": "watch._bulk", "watch": {"messages": 5}}
                producer.publish([1], routing_key="q", declare=[kombu.Queue("q")], headers=headers)
        assert connection.channel().count_waiting("q") == 15

    def test_a_purge_says_how_many_messages_it_threw_away(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        self.send(connection, 7)
        self.send(connection, 5, eta=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
        send(connection, 1)
        assert kombu.Queue("q")(connection.channel()).purge() == 13
        with server.client() as client:
            assert not [key for key in client.scan_iter() if key.startswith(b"q")]

    def test_a_prefix_is_kept_to(self, connect: Any, server: RedisServer) -> None:
        connection = connect(global_keyprefix="mine:")
        self.send(connection, 7)
        assert connection.channel().count_waiting("q") == 7
        with server.client() as client:
            assert all(key.startswith(b"mine:") for key in client.scan_iter())

    def test_what_others_took_away_is_not_counted_for_ever(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        self.send(connection, 250)
        with server.client() as client:
            client.delete("q")
        channel = connection.channel()
        assert channel.count_waiting("q") == 0
        reader = Reader(connection)
        reader.drain(0.1)
        send(connection, 1)
        reader.take()
        send(connection, 2, queue="q")
        with server.client() as client:
            assert not client.exists("q\x06\x16besides")

    @pytest.mark.parametrize("count", [-5, 0, 1, "7", None, 1.5, 10**30])
    def test_a_number_that_is_none_does_no_harm(self, connect: Any, count: Any) -> None:
        connection = connect()
        self.send(connection, count)
        channel = connection.channel()
        assert channel.count_waiting("q") >= 0
        send(connection, 1)
        assert Reader(connection).take()
        assert channel.count_waiting("q") == 0

    def test_what_stands_in_a_body_is_no_number(self, connect: Any) -> None:
        connection = connect(body_encoding=None)
        send(connection, '"watch._bulk" "messages": 1000', headers={"task": "watch.alarm"})
        assert connection.channel().count_waiting("q") == 1


class TestHandingBack:
    def test_a_rejected_message_comes_again_and_says_so(self, connect: Any) -> None:
        connection = connect()
        send(connection, "again", "other")
        reader = Reader(connection, prefetch=1)
        reader.take()[0].requeue()
        assert [message.payload for message in reader.take(2)] == ["again", "other"]
        reader.messages[1].ack()
        last = reader.take(3)[2]
        assert (last.payload, last.headers["redelivered"], last.delivery_info["redelivered"]) == ("again", True, True)

    def test_a_closed_channel_gives_back_at_once_and_in_order(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        send(connection, *range(5))
        reader = Reader(connection)
        reader.take(5)[2].ack()
        reader.channel.close()
        with server.client() as client:
            assert client.llen("q") == 4
        assert [message.payload for message in Reader(connect()).take(4)] == [0, 1, 3, 4]

    def test_what_is_forgotten_goes_back(self, connect: Any) -> None:
        connection = connect(**SHORT)
        send(connection, 1)
        reader = Reader(connection)
        reader.take()
        reader.messages.clear()
        gc.collect()
        assert reader.take()[0].headers["redelivered"]

    def test_what_a_dead_reader_held_goes_to_others_and_its_late_ack_does_nothing(
        self, connect: Any, server: RedisServer
    ) -> None:
        connection = connect(**SHORT)
        send(connection, 1)
        dead = Reader(connection)
        dead.take()
        dead.channel.flight._is_closed.set()  # its thread ends: nobody renews
        other = Reader(connect(**SHORT))
        other.take()

        dead.messages[0].ack()
        dead.channel.flight._tell()

        assert in_hand(server) == 1
        other.messages[0].ack()
        until(lambda: in_hand(server) == 0, "the new holder settles it")

    def test_a_lost_connection_keeps_what_is_handled_meanwhile(self, connect: Any, server: RedisServer) -> None:
        connection = connect(**SHORT)
        send(connection, 1)
        reader = Reader(connection)
        (message,) = reader.take()
        with server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(connection.connection_errors):
            reader.drain(3)
        connection.release()
        other = Reader(connect(**SHORT))
        assert other.drain(2.0) == []

        message.ack()

        until(lambda: in_hand(server) == 0, "the ack of the old connection counts")

    def test_so_does_one_that_is_given_up_for_an_error_of_another_socket(
        self, connect: Any, server: RedisServer
    ) -> None:
        connection = connect(**SHORT)
        send(connection, 1)
        reader = Reader(connection)
        (message,) = reader.take()
        connection.collect()  # as a worker does after an error, whoever told of it
        connection.release()
        assert Reader(connect(**SHORT)).drain(2.0) == []

        message.ack()

        until(lambda: in_hand(server) == 0, "the ack of the old connection counts")

    def test_what_is_acked_while_the_server_is_told_of_others_does_not_come_again(
        self, connect: Any, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connection = connect()
        send(connection, 1, 2, 3)
        reader = Reader(connection)
        first, second, _ = reader.take(3)
        flight = reader.channel.flight
        flight._is_closed.set()  # its thread ends
        flight._thread.join(10)
        flight.retire()
        tell = flight._tell

        def tell_slowly() -> None:
            tell()
            second.ack()

        first.ack()
        with monkeypatch.context() as patch:
            patch.setattr(flight, "_tell", tell_slowly)
            flight.tend()

        with server.client() as client:
            assert client.llen("q") == 0
        flight.tend()
        assert in_hand(server) == 1

    def test_an_answer_that_was_lost_loses_nothing(self, connect: Any) -> None:
        connection = connect(**SHORT)
        reader = Reader(connection)
        reader.drain(0.1)
        send(connect(), 1)
        reader.channel.look()
        reader.channel._ask(1)  # the server moves it, and the connection breaks
        reader.channel._fail()
        connection.release()
        assert Reader(connect(**SHORT)).take()[0].payload == 1


class TestDelays:
    def eta(self, seconds: float) -> str:
        return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()

    def test_it_waits_at_the_server_however_it_was_sent(self, connect: Any, server: RedisServer) -> None:
        for transport in (Transport, StockTransport):
            send(connect(transport), 1, headers={"eta": self.eta(3600)})
        reader = Reader(connect())
        assert reader.drain() == []
        with server.client() as client:
            assert (client.zcard("q\x06\x16later"), client.llen("q"), in_hand(server)) == (2, 0, 0)

    def test_it_comes_when_it_is_due_and_asks_no_other_clock(self, connect: Any) -> None:
        connection = connect()
        began = time.monotonic()
        send(connection, 1, headers={"eta": self.eta(0.6), "id": "x"})
        (message,) = Reader(connection).take()
        assert 0.5 < time.monotonic() - began < 5
        assert (message.headers["eta"], message.headers["id"]) == (None, "x")

    def test_equal_ones_are_two(self, connect: Any) -> None:
        connection = connect()
        payload = {"headers": {"eta": self.eta(0.2)}, "properties": {"priority": 0}, "body": "1"}
        for _ in range(2):
            connection.default_channel._put("q", payload)
        with connection.default_channel.conn_or_acquire() as client:
            assert client.zcard("q\x06\x16later") == 2


class TestGarbage:
    @pytest.mark.parametrize(
        "item", [b"", b"\xff\xfe", b"null", b"[]", b'{"properties": 1}', b"[" * 5000, b"} ", NUMBER]
    )
    def test_what_is_no_envelope_comes_with_its_bytes(self, connect: Any, server: RedisServer, item: bytes) -> None:
        with server.client() as client:
            client.lpush("q", item)
        (message,) = Reader(connect()).take()
        assert (message.content_type, message.body) == (NO_ENVELOPE, item.rstrip(b" ") if item == b"} " else item)

    def test_a_body_that_is_no_base64_ends_nothing(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        send(connection, 1)
        with server.client() as client:
            payload = json.loads(client.rpop("q"))
            client.lpush("q", json.dumps({**payload, "body": "§"}))
        (message,) = Reader(connection).take()
        assert message.body == "§".encode()

    def test_a_bomb_stays_as_it_came(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        bomb = bz2.compress(b"0" * 50_000_000)
        send(connection, bomb, serializer=None, content_type="application/json", content_encoding="binary")
        with server.client() as client:
            payload = json.loads(client.rpop("q"))
            payload["headers"]["compression"] = "application/x-bz2"
            client.lpush("q", json.dumps(payload))
        reader = Reader(connection)
        reader.drain()
        ((message, error),) = reader.errors
        assert isinstance(error, TooLargeError)
        assert message.body == bomb


class TestServers:
    def test_a_server_that_forgets_its_scripts_is_told_them(self, connect: Any, server: RedisServer) -> None:
        connection = connect()
        reader = Reader(connection)
        reader.drain(0.1)
        with server.client() as client:
            client.script_flush()
        send(connection, 1)
        assert reader.take()[0].payload == 1

    def test_where_the_server_tells_nothing_it_is_asked(self, connect: Any, server: RedisServer) -> None:
        with server.client() as client:
            client.acl_setuser(
                "mute", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-client|tracking"]
            )
        connection = connect(url=server.url.replace("redis://", "redis://mute:x@"))
        reader = Reader(connection)
        reader.drain(0.2)
        assert not reader.channel._is_told
        send(connection, 1)
        assert reader.take()[0].payload == 1
        with server.client() as client:
            client.acl_deluser("mute")

    def test_a_new_message_is_told_of(self, connect: Any) -> None:
        connection = connect()
        reader = Reader(connection, "one", "two")
        reader.drain(0.1)
        assert reader.channel._is_told
        reader.channel._ask_at = time.monotonic() + 60  # nothing but a push makes it ask
        send(connect(), 1, queue="two", priority=5)
        assert reader.take()[0].payload == 1

    def test_a_full_server_can_be_emptied(self, own_valkey: RedisServer, connect: Any) -> None:
        connection = connect(url=own_valkey.url, **SHORT)
        send(connection, *range(100))
        with own_valkey.client() as client:
            client.config_set("maxmemory", "1")
        reader = Reader(connection, prefetch=10)
        for count in range(1, 101):
            reader.take(count)[count - 1].ack()
        assert len(reader.drain(1.5)) == 100
        until(lambda: in_hand(own_valkey) == 0, "the acks went through")

    def test_a_full_server_still_gives_a_dead_readers_messages_to_others(
        self, own_valkey: RedisServer, connect: Any
    ) -> None:
        connection = connect(url=own_valkey.url, **SHORT)
        send(connection, 1)
        dead = Reader(connection)
        dead.take()
        other = Reader(connect(url=own_valkey.url, **SHORT))
        other.drain(0.3)
        with own_valkey.client() as client:
            client.config_set("maxmemory", "1")
        dead.channel.flight._is_closed.set()
        other.take()[0].ack()

    def test_a_socket_in_the_file_system_works(self, tmp_path: Path, connect: Any) -> None:
        path = tmp_path / "v.sock"
        server = RedisServer(tmp_path / "own", unixsocket=str(path)).start()
        try:
            connection = kombu.Connection(f"redis+socket://{path}", transport=None)
            with connection:
                send(connection, 1)
                (message,) = Reader(connection).take()
                message.ack()
        finally:
            server.stop()

    def test_tls_works_and_certificates_are_checked(self, tmp_path: Path, redis_server: RedisServer) -> None:
        """Valkey's wheel has no TLS, Debian's Redis has."""
        port = free_port()
        _make_certificate(tmp_path)
        tls = {"cert-file": "cert.pem", "key-file": "key.pem", "ca-cert-file": "cert.pem"}
        config = {"tls-port": str(port), "tls-auth-clients": "no"}
        config |= {f"tls-{name}": str(tmp_path / file) for name, file in tls.items()}
        server = RedisServer(tmp_path / "own", redis_server.binary, **config).start()
        address = f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=CERT_REQUIRED"
        try:
            trusting = f"{address}&ssl_ca_certs={tmp_path / 'cert.pem'}"
            with kombu.Connection(trusting, transport=Transport) as connection:
                send(connection, *range(20))
                reader = Reader(connection)
                for message in reader.take(20):
                    message.ack()
                until(lambda: in_hand(server) == 0, "the acks went through")
            at_once = {"max_retries": 1, "interval_start": 0}
            with (
                kombu.Connection(address, transport=Transport, transport_options=at_once) as connection,
                pytest.raises(kombu.exceptions.OperationalError, match="CERTIFICATE_VERIFY_FAILED"),
            ):
                send(connection, 1)
        finally:
            server.stop()


def _make_certificate(folder: Path) -> None:
    """Make `cert.pem`, which nobody signed, and its `key.pem`, for this machine."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *made, *names]
    subprocess.run(command, check=True, capture_output=True)


class TestInstall:
    @pytest.fixture(autouse=True)
    def _table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(kombu.transport.TRANSPORT_ALIASES))
        monkeypatch.setattr(kombu.transport, "_transport_cache", {})

    @pytest.mark.parametrize(
        ("url", "kind"),
        [
            ("redis://h/0", Transport),
            ("rediss://h/0", Transport),
            ("redis+socket:///s", Transport),
            ("sentinel://h", SentinelTransport),
        ],
    )
    def test_urls_stay_and_mean_it(self, url: str, kind: type) -> None:
        before = kombu.Connection(url).as_uri()
        install()
        install()
        connection = kombu.Connection(url)
        assert connection.get_transport_cls() is kind
        assert connection.as_uri() == before

    def test_it_looks_like_kombus_own(self, valkey: RedisServer) -> None:
        with kombu.Connection(valkey.url, transport=Transport) as connection:
            assert (connection.transport.driver_type, connection.transport.driver_name) == ("redis", "redis")
            assert isinstance(connection.default_channel.client, redis.Redis)
