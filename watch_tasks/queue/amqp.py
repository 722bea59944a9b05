"""Celery's own queues on RabbitMQ, read and written through kombu: what Celery workers send and handle, a Watcher can
handle and send, and the other way round.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import amqp
import kombu
import kombu.exceptions

from ..errors import ConfigurationError, QueueClosedError, QueueUnavailableError, SendFailedError, SendUnknownError
from ..message import Message
from ..packets import Packet
from .base import Delivery, Queue, Unreadable
from .broker import ANSWER, CONNECT, name_of, send_error
from .envelope import MAX_PAYLOAD, Envelope, pack, pack_packet, unpack
from .opened import OpenPacket

__all__ = ["DEAD_LETTERS", "AmqpQueue", "open_url", "quorum_arguments"]

#: kombu's and amqp's classes have no types.
_kombu: Final[Any] = kombu
#: Where the server puts what it would throw away otherwise.
DEAD_LETTERS: Final = "watch.dead"
#: Deliveries after which a quorum queue gives a message up. Far above what we cause: a crash of a handler counts one,
#: and so does each look at a message of an unknown topic, or of one that cannot be buried just now.
DELIVERY_LIMIT: Final = 1000
#: Seconds between two looks into an empty queue: the first, doubled up to the last.
_LOOKS: Final = (0.005, 0.05)
#: What the client raises when the server does not answer. A connection that broke under it shows as the last two.
_TROUBLE: Final = (amqp.exceptions.AMQPError, kombu.exceptions.KombuError, OSError, AttributeError, KeyError)


def quorum_arguments(delivery_limit: int = DELIVERY_LIMIT, dead_letters: str = DEAD_LETTERS) -> dict[str, Any]:
    """Return the arguments of a quorum queue that loses nothing: what it gives up goes to the queue `dead_letters`.

    Dead-lettered at least once, which needs that a full queue refuses instead of dropping.
    """
    return {
        "x-queue-type": "quorum",
        "x-delivery-limit": delivery_limit,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead_letters,
        "x-dead-letter-strategy": "at-least-once",
    }


class _Delivery(Delivery):
    def __init__(self, queue: AmqpQueue, channel: Any, tag: int, content: Message[Any] | Packet | Unreadable) -> None:
        if not isinstance(content, Packet):  # of which its members alone are told
            self.message = content
        self.content = content
        self.tag = tag
        #: By what it came: once that is gone, the message is delivered again.
        self.channel = channel
        self._queue = queue
        self._is_open = True

    def ack(self) -> None:
        if self._is_open:
            self._queue._ack(self)
            self._is_open = False

    def back(self, delay: float = 0.0) -> None:
        if self._is_open:
            self._queue._hold(_Delivery(self._queue, self.channel, self.tag, self.content), delay)
            self._is_open = False


class AmqpQueue(Queue):
    """One of Celery's queues on RabbitMQ. Sends are confirmed by the server.

    A message that is not due yet, or that was handed back, is held by this process, unacknowledged; the server gives
    it to another reader when this one closes, dies, or loses its connection. A queue that does not exist is declared
    as Celery does by default, unless `arguments` say otherwise; one that exists is taken as it is.

    Args:
        url: the broker's URL, as Celery takes it.
        queue: the name of Celery's queue.
        arguments: how to declare the queue, `quorum_arguments()` for instance.
        max_payload: bytes of JSON that the data of a message may have.
        answer: seconds that the server may take for one answer.

    Raises:
        ConfigurationError: the URL is none that kombu takes.
    """

    survives_restart: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        queue: str = "celery",
        *,
        arguments: dict[str, Any] | None = None,
        max_payload: int = MAX_PAYLOAD,
        answer: float = ANSWER,
    ) -> None:
        self.name = queue
        self._url = url
        self._arguments = arguments
        self.max_payload = max_payload
        self._answer = answer
        self._closed = threading.Event()
        #: The client is not for several threads: each lock is held for one question and its answer.
        self._reading = threading.RLock()
        self._reader: Any = None
        self._channel: Any = None
        self._sending = threading.RLock()
        self._sender: Any = None
        #: Another connection must not find a quorum queue that is declared and whose leader has not started yet.
        self._connecting = threading.Lock()
        self._held_lock = threading.Lock()
        self._held: list[tuple[float, int, _Delivery]] = []
        self._count = 0
        #: The packet whose members are handed out now.
        self._opened: OpenPacket | None = None
        try:
            self._shown = str(self._connection().as_uri())
        except (ValueError, LookupError) as exc:
            shown = f"{url.partition('://')[0]}://{url.rpartition('@')[2]}"
            raise ConfigurationError(
                f"a queue's URL must be like `amqp://user:password@host:5672/vhost`, got `{shown}`"
            ) from exc

    def __repr__(self) -> str:
        return f"<AmqpQueue {self.name} on {self._shown}>"

    # -- sending

    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
        self._send(pack(message, delay=delay, limit=self.max_payload if bounded else None), message)

    def push_packet(self, packet: Packet, *, delay: float = 0.0) -> None:
        self._send(pack_packet(packet, delay=delay), packet)

    def _send(self, envelope: Envelope, sent: Message[Any] | Packet) -> None:
        with self._sending:
            self._check_open()
            try:
                self._publish(envelope, sent)
            except SendUnknownError as unknown:
                # Most likely a connection that broke while it idled. Twice is safe: the id is the same.
                try:
                    self._publish(envelope, sent)
                except SendFailedError:
                    raise unknown from unknown.__cause__

    def len(self) -> int:
        with self._asking() as channel:
            waiting = int(channel.queue_declare(self.name, passive=True).message_count)
        opened = self._opened
        with self._held_lock:
            return waiting + len(self._held) + (len(opened) if opened else 0)

    def clear(self) -> int:
        with self._asking() as channel:
            count = int(channel.queue_purge(self.name))
        with self._held_lock:
            held, self._held = self._held, []
        for _, _, delivery in held:
            delivery.ack()
        opened = self._opened
        return count + len(held) + (opened.clear() if opened else 0)

    def _publish(self, envelope: Envelope, message: Message[Any] | Packet) -> None:
        try:
            channel = self._sending_channel()
        except _TROUBLE as exc:
            self._drop_sender()
            raise SendFailedError(f"{name_of(message)} was not sent: cannot connect to {self._shown}: {exc}") from exc
        try:
            _kombu.Producer(channel, auto_declare=False).publish(
                envelope.body,
                exchange="",
                routing_key=self.name,
                content_type=envelope.content_type,
                content_encoding="utf-8",
                headers=dict(envelope.headers),
                correlation_id=message.id,
                delivery_mode=2,
                confirm_timeout=self._answer,
            )
        except _TROUBLE as exc:
            self._drop_sender()
            raise send_error(exc, message) from exc

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        with self._sending:
            self._check_open()
            try:
                yield self._sending_channel()
            except _TROUBLE as exc:
                self._drop_sender()
                raise self._unavailable(exc) from exc

    def _sending_channel(self) -> Any:
        if self._sender is None:
            self._sender = self._connect()
        return self._sender.default_channel

    def _drop_sender(self) -> None:
        sender, self._sender = self._sender, None
        _close(sender)

    # -- receiving

    def next(self, timeout: float | None = None) -> Delivery | None:
        end = None if timeout is None else time.monotonic() + timeout
        pause, longest = _LOOKS
        self._check_open()
        while True:
            delivery = self._next_opened() or self._due() or self._receive() or self._due()
            if delivery or self._closed.is_set() or (end is not None and time.monotonic() >= end):
                return delivery
            self._closed.wait(pause if end is None else max(min(pause, end - time.monotonic()), 0.0))
            pause = min(pause * 2, longest)

    def _next_opened(self) -> Delivery | None:
        delivery = self._opened.next() if self._opened else None
        if not self._opened:
            self._opened = None  # it is kept by its members that are in hand, and by nothing else
        return delivery

    def _receive(self) -> Delivery | None:
        """Take what is next, unless it has to wait here; it may be followed by one that need not."""
        while True:
            with self._reading:
                if self._closed.is_set():
                    return None
                try:
                    channel = self._reading_channel()
                    raw = channel.basic_get(self.name)
                except _TROUBLE as exc:
                    self._drop_reader()
                    raise self._unavailable(exc) from exc
            if raw is None:
                return None
            found, wait = unpack(_envelope(raw), limit=self.max_payload)
            delivery = _Delivery(self, channel, raw.delivery_tag, found)
            if wait <= 0:
                return self._open(delivery)
            self._hold(delivery, wait)

    def _open(self, delivery: _Delivery) -> Delivery | None:
        """Return what is handed out of a delivery: itself, or the first member of a packet."""
        if not isinstance(delivery.content, Packet):
            return delivery
        self._opened = OpenPacket(delivery.content, delivery, self, self.max_payload)
        return self._next_opened()

    def _due(self) -> Delivery | None:
        with self._held_lock:
            if not self._held or self._held[0][0] > time.monotonic():
                return None
            delivery = heapq.heappop(self._held)[2]
        return self._open(delivery)

    def _hold(self, delivery: _Delivery, delay: float) -> None:
        with self._held_lock:
            if delivery.channel is self._channel:
                self._count += 1
                heapq.heappush(self._held, (time.monotonic() + delay, self._count, delivery))

    def _ack(self, delivery: _Delivery) -> None:
        with self._reading:
            if delivery.channel is not self._channel:
                return  # its connection is gone: the server hands it over again
            try:
                delivery.channel.basic_ack(delivery.tag)
            except _TROUBLE as exc:
                self._drop_reader()
                raise self._unavailable(exc) from exc

    def _reading_channel(self) -> Any:
        if self._channel is None:
            self._reader = self._connect()
            self._channel = self._reader.default_channel
        return self._channel

    def _drop_reader(self) -> None:
        with self._held_lock:
            self._channel = None
            self._held.clear()
        if self._opened:
            self._opened.forget()  # the server hands it over again
        reader, self._reader = self._reader, None
        _close(reader)

    # -- life

    def release(self) -> None:
        self._check_open()
        if self._opened:
            self._opened.release()

    def close(self) -> None:
        self._closed.set()
        with self._reading:
            self._drop_reader()
        with self._sending:
            self._drop_sender()

    def _connection(self) -> Any:
        return _kombu.Connection(self._url, transport_options={"confirm_publish": True}, connect_timeout=CONNECT)

    def _connect(self) -> Any:
        """Return a connection on which no answer is waited for without end, with the queue declared."""
        connection = self._connection()
        try:
            connection.connect()
            connection.connection.transport.sock.settimeout(self._answer)
            with self._connecting:
                try:
                    connection.channel().queue_declare(self.name, passive=True)
                except amqp.exceptions.NotFound:
                    target = (self._arguments or {}).get("x-dead-letter-routing-key")
                    if target:
                        _declare(connection.default_channel, target, {"x-queue-type": "quorum"})
                    _declare(connection.default_channel, self.name, self._arguments)
            return connection
        except BaseException:
            _close(connection)
            raise

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise QueueClosedError("the queue was closed")

    def _unavailable(self, error: BaseException) -> QueueUnavailableError:
        return QueueUnavailableError(f"the queue on {self._shown} does not answer: {type(error).__name__}: {error}")


def _declare(channel: Any, name: str, arguments: dict[str, Any] | None) -> None:
    channel.queue_declare(name, durable=True, auto_delete=False, arguments=arguments)


def _envelope(raw: Any) -> Envelope:
    """Return what came with its body as bytes."""
    properties, body = raw.properties, raw.body
    headers = properties.get("application_headers")
    return Envelope(
        headers if isinstance(headers, dict) else {},
        body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body),
        properties.get("content_type"),
    )


def _close(connection: Any) -> None:
    """Let go of a connection, in whatever state it is."""
    if connection is not None:
        with suppress(Exception):
            connection.release()


def open_url(url: str) -> AmqpQueue:
    """Open `amqp://user:password@host:5672/vhost` or `amqps://…`.

    `?queue=name` names Celery's queue; `?type=quorum` declares it as `presets.rabbitmq` does, if it does not exist.

    Raises:
        ConfigurationError: the URL is none that kombu takes, or the type is none of these.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    name, kind = query.pop("queue", "celery"), query.pop("type", "classic")
    if kind not in ("classic", "quorum"):
        raise ConfigurationError(f"`type` of a queue's URL must be `classic` or `quorum`, got {kind!r}")
    plain = urlunsplit(parts._replace(query=urlencode(query)))
    return AmqpQueue(plain, name, arguments=quorum_arguments() if kind == "quorum" else None)
