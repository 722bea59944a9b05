"""Celery's own queues on Redis or Valkey, read and written through kombu: what Celery workers send and handle, a
Watcher can handle and send, and the other way round.
"""

from __future__ import annotations

import base64
import heapq
import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any, ClassVar, Final, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from weakref import WeakValueDictionary

import kombu
import kombu.exceptions
import redis

from ..errors import QueueClosedError, QueueUnavailableError, SendFailedError, SendUnknownError
from ..message import Message
from ..schema import load
from .base import Delivery, Queue, Unreadable
from .broker import ANSWER, CONNECT, TROUBLE, broker_url, check_url, send_error, transport_options
from .envelope import MAX_PAYLOAD, Envelope, pack, unpack

__all__ = ["RedisQueue", "broker_url", "open_url", "send_error", "transport_options"]

logger = logging.getLogger(__name__)

#: kombu's classes have no types.
_kombu: Final[Any] = kombu

#: Seconds between two renewals of what is held here, and between two looks for what others dropped; at most a fifth
#: of the visibility timeout.
_RENEWAL: Final = 3.0
#: Seconds that one wait at the server takes at most: how soon `close` is noticed.
_SLICE: Final = 0.2


class _Received:
    """What lay in the queue, as kombu wants a message to look. Unlike kombu's own class it reads nothing, so that
    nothing in it can raise, be inflated or be unpickled."""

    def __init__(self, payload: dict[str, Any], channel: Any = None) -> None:
        properties = payload["properties"]
        self._raw = payload
        self.channel = channel
        self.delivery_tag: str = properties["delivery_tag"]
        self.delivery_info: dict[str, Any] = properties["delivery_info"]

    def envelope(self) -> Envelope:
        """Return it with its body as bytes; what is not even base64 stays as it came."""
        payload = self._raw
        headers, body, kind = payload.get("headers"), payload.get("body"), payload.get("content-type")
        raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else repr(body).encode()
        if payload["properties"].get("body_encoding") == "base64":
            try:
                raw = base64.b64decode(raw, validate=True)
            except ValueError:
                kind = "not base64"
        return Envelope(headers if isinstance(headers, dict) else {}, raw, kind if isinstance(kind, str) else None)


def _as_envelope(queue: str, response: Any) -> Any:
    """Let only envelopes through to kombu, which loses what is none: that is put into one of its own.

    Args:
        queue: where it came from, and goes back to if it is not acked.
        response: the answer to BRPOP: the list's key and the item; nothing where none came in time.
    """
    if not response:
        return response
    key, item = response
    try:
        payload = load(item)
        properties = payload["properties"]
        info = properties["delivery_info"]
        if isinstance(properties["delivery_tag"], str) and {"exchange", "routing_key"} <= info.keys():
            return response
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    wrapped = {
        "body": base64.b64encode(item).decode(),
        "content-type": "not an envelope",
        "content-encoding": "binary",
        "headers": {},
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }
    return key, json.dumps(wrapped).encode()


class _Delivery(Delivery):
    def __init__(self, queue: RedisQueue, channel: Any, tag: str, message: Message[Any] | Unreadable) -> None:
        self.message = message
        self.tag = tag
        #: The connection it came by: once that is gone, the message is delivered again.
        self.channel = channel
        self._queue = queue
        self._is_open = True

    def ack(self) -> None:
        if self._is_open:
            self._queue._ack(self)
            self._is_open = False

    def back(self, delay: float = 0.0) -> None:
        if self._is_open:
            self._queue._hold(_Delivery(self._queue, self.channel, self.tag, self.message), delay)
            self._is_open = False


class RedisQueue(Queue):
    """One of Celery's queues on a Redis or Valkey server.

    A message that is not due yet, or that was handed back, is held by this process, unacknowledged; the server gives
    it to another reader when this one closes, dies, or loses its connection. For as long as a delivery is referred
    to, it is kept from other readers, however long its handling takes.

    Args:
        url: the broker's URL, as Celery takes it.
        queue: the name of Celery's queue.
        options: kombu's transport options beside those of `transport_options`; Celery workers on the same database
            need the same `visibility_timeout`, since the smallest one wins.
        max_payload: bytes of JSON that the data of a message may have.

    Raises:
        ConfigurationError: the URL is none that kombu's Redis transport takes.
    """

    survives_restart: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        queue: str = "celery",
        *,
        options: dict[str, Any] | None = None,
        max_payload: int = MAX_PAYLOAD,
    ) -> None:
        self.name = queue
        self._url = broker_url(url)
        # kombu would wait 2 s before its only further try to connect.
        self._options = {"max_retries": 1, "interval_start": 0, **transport_options(), **(options or {})}
        self._every = min(_RENEWAL, self._options["visibility_timeout"] / 5)
        self._max_payload = max_payload
        self._closed = threading.Event()
        #: Who reads: `next`, or whoever drops the connection it reads from.
        self._reading = threading.RLock()
        self._reader: Any = None
        self._channel: Any = None
        self._arrived: list[_Received] = []
        self._next_restore = 0.0
        #: What waits here; its lock is never held while a server is asked.
        self._held_lock = threading.Lock()
        self._held: list[tuple[float, int, _Delivery]] = []
        self._count = 0
        self._kept: WeakValueDictionary[str, _Delivery] = WeakValueDictionary()
        self._renewer: threading.Thread | None = None
        #: kombu's producers are not for several threads.
        self._sending = threading.Lock()
        self._sender: Any = None
        check_url(self._url)

    def __repr__(self) -> str:
        return f"<RedisQueue {self.name} on {self._connection().as_uri()}>"

    # -- sending

    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
        envelope = pack(message, delay=delay, limit=self._max_payload if bounded else None)
        self._check_open()
        with self._sending:
            try:
                self._publish(envelope, message)
            except SendUnknownError as unknown:
                # Most likely a connection that broke while it idled. Twice is safe: the id is the same.
                try:
                    self._publish(envelope, message)
                except SendFailedError:
                    raise unknown from unknown.__cause__

    def len(self) -> int:
        with self._asking() as channel:
            waiting = _count(channel, self.name)
        with self._held_lock:
            return waiting + len(self._held)

    def clear(self) -> int:
        with self._asking() as channel:
            count = cast(int, channel.queue_purge(self.name))
        with self._held_lock:
            held, self._held = self._held, []
        for _, _, delivery in held:
            delivery.ack()
        return count + len(held)

    def _publish(self, envelope: Envelope, message: Message[Any]) -> None:
        try:
            channel = self._sending_channel()
        except TROUBLE as exc:
            raise SendFailedError(
                f"message {message.id} of topic `{message.topic}` was not sent: "
                f"cannot connect to {self._connection().as_uri()}: {exc}"
            ) from exc
        try:
            _kombu.Producer(channel, auto_declare=False).publish(
                envelope.body,
                exchange="",
                routing_key=self.name,
                content_type=envelope.content_type,
                content_encoding="utf-8",
                headers=dict(envelope.headers),
                correlation_id=message.id,
            )
        except TROUBLE as exc:
            self._drop_sender()
            raise send_error(exc, message) from exc

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        """Give the channel that sends and asks, alone."""
        self._check_open()
        with self._sending:
            try:
                yield self._sending_channel()
            except TROUBLE as exc:
                self._drop_sender()
                raise self._unavailable(exc) from exc

    def _sending_channel(self) -> Any:
        self._sender = self._sender or self._connection()
        return self._sender.default_channel

    def _drop_sender(self) -> None:
        sender, self._sender = self._sender, None
        _close(sender)

    # -- receiving

    def next(self, timeout: float | None = None) -> Delivery | None:
        end = None if timeout is None else time.monotonic() + timeout
        with self._reading:
            self._check_open()
            while True:
                left = _SLICE if end is None else end - time.monotonic()
                delivery = self._due() or self._receive(min(max(left, 0.01), _SLICE)) or self._due()
                if delivery or self._closed.is_set() or (end is not None and time.monotonic() >= end):
                    return delivery

    def _receive(self, seconds: float) -> _Delivery | None:
        """Wait once at the server; return what came, unless it has to wait here."""
        try:
            channel = self._reading_channel()
            now = time.monotonic()
            if now >= self._next_restore:
                self._next_restore = now + self._every
                channel.qos.restore_visible(num=channel.unacked_restore_limit, interval=1)
            # The wait always ends with the server's answer: a message must not lie in our socket, unrecorded.
            channel.brpop_timeout = seconds
            try:
                channel.connection.cycle.get(None, timeout=seconds + ANSWER)
            except Empty:
                if channel._in_poll:
                    raise redis.TimeoutError(f"no answer within {ANSWER:.3g} s") from None
        except Exception as exc:
            # A connection that breaks under kombu's transport shows as an AttributeError or a KeyError as well.
            self._drop_reader()
            raise self._unavailable(exc) from exc
        if not self._arrived:
            return None
        received = self._arrived.pop()
        message, wait = unpack(received.envelope(), limit=self._max_payload)
        delivery = _Delivery(self, channel, received.delivery_tag, message)
        self._kept[delivery.tag] = delivery
        if wait <= 0:
            return delivery
        self._hold(delivery, wait)
        return None

    def _due(self) -> _Delivery | None:
        with self._held_lock:
            if self._held and self._held[0][0] <= time.monotonic():
                return heapq.heappop(self._held)[2]
        return None

    def _hold(self, delivery: _Delivery, delay: float) -> None:
        with self._held_lock:
            if delivery.channel is self._channel:
                self._count += 1
                self._kept[delivery.tag] = delivery
                heapq.heappush(self._held, (time.monotonic() + delay, self._count, delivery))

    def _ack(self, delivery: _Delivery) -> None:
        channel = delivery.channel
        if channel is not self._channel:
            # It goes, or went, to another reader under the same tag: an ack would take it from there.
            logger.debug("message %s is delivered again: its connection was lost", delivery.message.id)
            return
        try:
            channel.basic_ack(delivery.tag)
        except TROUBLE as exc:
            raise self._unavailable(exc) from exc
        self._kept.pop(delivery.tag, None)

    def _reading_channel(self) -> Any:
        if self._channel is None:
            self._reader = self._connection()
            channel = self._reader.default_channel
            channel.Message = _Received
            channel.client.set_response_callback("BRPOP", lambda response, **_: _as_envelope(self.name, response))
            channel.basic_consume(self.name, no_ack=False, callback=self._arrived.append, consumer_tag=self.name)
            self._channel = channel
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew_all, name="watch-renewals", daemon=True)
                self._renewer.start()
        return self._channel

    def _drop_reader(self) -> None:
        """Let go of the connection; what came by it and is not acked goes back to the server, as far as it answers."""
        with self._held_lock:
            self._channel = None
            self._held.clear()
        self._kept.clear()
        self._arrived.clear()
        reader, self._reader = self._reader, None
        _close(reader)

    def _renew_all(self) -> None:
        while not self._closed.wait(self._every):
            try:
                self.renew()
            except QueueUnavailableError as exc:
                logger.warning("could not renew what is in hand, trying again in %.3g s: %s", self._every, exc)

    def renew(self) -> None:
        """Keep what is in hand from being delivered to others; done every few seconds by a thread of this queue."""
        channel, tags = self._channel, list(self._kept.keys())
        if channel is None or not tags:
            return
        try:
            with channel.conn_or_acquire() as client:
                client.zadd(channel.unacked_index_key, dict.fromkeys(tags, time.time()), xx=True)
        except TROUBLE as exc:
            raise self._unavailable(exc) from exc

    # -- life

    def close(self) -> None:
        self._closed.set()
        with self._reading:
            self._drop_reader()
        with self._sending:
            self._drop_sender()
        if self._renewer:
            self._renewer.join(timeout=ANSWER)

    def _connection(self) -> Any:
        return _kombu.Connection(self._url, transport_options=self._options, connect_timeout=CONNECT)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise QueueClosedError("the queue was closed")

    def _unavailable(self, error: BaseException) -> QueueUnavailableError:
        return QueueUnavailableError(f"queue `{self.name}` on {self._connection().as_uri()} does not answer: {error}")


def _count(channel: Any, queue: str) -> int:
    try:
        return cast(int, channel.queue_declare(queue, passive=True).message_count)
    except kombu.exceptions.ChannelError:  # kombu's word for an empty list
        return 0


def _close(connection: Any) -> None:
    if connection is None:
        return
    try:
        connection.close()
    except Exception as exc:  # noqa: BLE001 - whatever a broken connection raises, it is let go of
        logger.warning("messages in hand come back when their time is over, closing failed: %s", exc)


def open_url(url: str) -> RedisQueue:
    """Open `redis://host:port/db`, `rediss://…`, `redis+socket:///path`, `unix:///path` or
    `sentinel://host:port;sentinel://host:port?master_name=…`.

    `?queue=name` names Celery's queue; what else stands there is kombu's.

    Raises:
        ConfigurationError: the URL is none that kombu takes.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    name = query.pop("queue", "celery")
    options = {"master_name": query.pop("master_name")} if "master_name" in query else {}
    plain = urlunsplit(parts._replace(query=urlencode(query)))
    return RedisQueue(plain if parts.netloc else plain.replace(":/", ":///", 1), name, options=options)
