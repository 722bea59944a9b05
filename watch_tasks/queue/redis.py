"""Celery's own queues on Redis or Valkey: what Celery workers send and handle, a Watcher can handle and send, and the
other way round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from weakref import WeakSet

import redis
from redis.exceptions import NoScriptError

from ..errors import QueueClosedError, QueueUnavailableError, SendFailedError, SendUnknownError
from ..message import Message
from ..packets import Packet
from ..storage.redis_client import mask, open_client
from .base import Delivery, Queue, Unreadable
from .broker import TROUBLE, broker_url, check_url, send_error, transport_options
from .counting import clear_waiting, count_waiting
from .envelope import MAX_PAYLOAD, pack, pack_packet, unpack
from .flight import EVERY, LEASE, Fetched, Flight, Item, later_key, later_words, push_words
from .item import due_at, envelope_of, make_item, open_item, without_eta
from .opened import OpenPacket

__all__ = ["RedisQueue", "broker_url", "open_url", "send_error", "transport_options"]

logger = logging.getLogger(__name__)

#: kombu's lists of one queue: a name, what separates it from a priority, and the priorities, the most urgent first.
_SEPARATOR: Final = "\x06\x16"
_STEPS: Final = (0, 3, 6, 9)
#: Seconds that one wait at the server takes at most: how soon `close` is noticed.
_SLICE: Final = 0.2
#: Options of kombu's that mean something here, and are the client's.
_CLIENT_OPTIONS: Final = ("socket_timeout", "socket_connect_timeout", "health_check_interval", "max_connections")


class _Delivery(Delivery):
    def __init__(
        self, flight: Flight, item: Item, message: Message[Any] | Unreadable | None, back: Callable[[float], None]
    ) -> None:
        if message is not None:  # else a packet, of which its members alone are told
            self.message = message
        self._flight, self._number, self._back = flight, item.number, back

    def ack(self) -> None:
        self._flight.ack(self._number)

    def back(self, delay: float = 0.0) -> None:
        if self._flight.has(self._number):
            self._back(delay)


class RedisQueue(Queue):
    """One of Celery's queues on a Redis or Valkey server.

    A message that is not due yet, or that was handed back, waits at the server. For as long as a delivery is referred
    to, it is kept from other readers, however long its handling takes, and while the server is away.

    Args:
        url: the broker's URL, as Celery takes it.
        queue: the name of Celery's queue.
        options: of kombu's transport options, `global_keyprefix`, `priority_steps`, `lease`, `renew_every`,
            `master_name` and those of the connection; Celery workers on the same queue need the same.
        max_payload: bytes of JSON that the data of a message may have.

    Raises:
        ConfigurationError: the URL is none of a Redis server.
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
        options = options or {}
        self.name = queue
        self._url = _with_options(broker_url(url), options)
        prefix = options.get("global_keyprefix", "")
        steps = options.get("priority_steps", _STEPS)
        self._list = f"{prefix}{queue}"
        self._lists = [f"{self._list}{_SEPARATOR}{step}" if step else self._list for step in steps]
        self._later = later_key(queue, prefix)
        self._prefix = prefix
        self._lease, self._every = float(options.get("lease", LEASE)), float(options.get("renew_every", EVERY))
        self.max_payload = max_payload
        self._closed = threading.Event()
        check_url(broker_url(url))
        self._client = open_client(self._url)
        self._reading = threading.RLock()
        self._reader: _Reader | None = None
        self._flight: Flight | None = None
        #: The packet whose members are handed out now.
        self._opened: OpenPacket | None = None
        #: Those of lost connections, until what came by them is settled.
        self._retired: WeakSet[Flight] = WeakSet()

    def __repr__(self) -> str:
        return f"<RedisQueue {self.name} on {mask(self._url)}>"

    # -- sending

    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
        envelope = pack(message, limit=self.max_payload if bounded else None)
        item = make_item(envelope, self.name, correlation_id=message.id)
        if delay > 0:
            self._publish(lambda: self._client.eval(*later_words(self._later, self._list, item, delay)), message)
        else:
            self._publish(lambda: self._client.lpush(self._list, item), message)

    def push_packet(self, packet: Packet, *, delay: float = 0.0) -> None:
        item = make_item(pack_packet(packet), self.name, correlation_id=packet.id)
        words = later_words(self._later, self._list, item, delay) if delay > 0 else push_words(self._list, item)
        self._publish(lambda: self._client.eval(*words), packet)

    def _publish(self, send: Callable[[], Any], sent: Message[Any] | Packet) -> None:
        self._check_open()

        def publish() -> None:
            try:
                send()
            except TROUBLE as exc:
                raise send_error(exc, sent) from exc

        try:
            publish()
        except SendUnknownError as unknown:
            # Most likely a connection that broke while it idled. Twice is safe: the id is the same.
            try:
                publish()
            except SendFailedError:
                raise unknown from unknown.__cause__

    def len(self) -> int:
        with self._asking() as client:
            opened = self._opened
            return count_waiting(client, self.name, self._lists, self._prefix) + (len(opened) if opened else 0)

    def clear(self) -> int:
        with self._asking() as client:
            opened = self._opened
            count = clear_waiting(client, self.name, self._lists, self._prefix)
            return count + (opened.clear() if opened else 0)

    # -- receiving

    def next(self, timeout: float | None = None) -> Delivery | None:
        end = None if timeout is None else time.monotonic() + timeout
        with self._reading:
            while True:
                self._check_open()
                left = _SLICE if end is None else end - time.monotonic()
                delivery = self._next_opened() or self._receive(min(max(left, 0.01), _SLICE))
                if delivery or self._closed.is_set() or (end is not None and time.monotonic() >= end):
                    return delivery

    def _receive(self, seconds: float) -> Delivery | None:
        """Wait once at the server; return what came, unless it has to wait there."""
        try:
            if self._flight is None:
                self._flight = Flight(
                    lambda: open_client(self._url), prefix=self._prefix, lease=self._lease, every=self._every
                )
            if self._reader is None:
                self._reader = _Reader(open_client(self._url, protocol=3), self._flight, self._lists, [self._later])
            fetched = self._reader.fetch(seconds)
            for item in fetched.items:
                payload = open_item(item.raw, self.name)
                due = due_at(payload["headers"])
                if due is not None and due > fetched.now:
                    self._flight.later(item, without_eta(payload), self._later, due=due)
                    continue
                found, _ = unpack(envelope_of(payload), limit=self.max_payload)
                # A time that is over says nothing any more, and would be waited for by another clock.
                raw = item.raw if due is None else without_eta(payload)
                back = partial(self._back, self._flight, item, raw)
                delivery = _Delivery(self._flight, item, None if isinstance(found, Packet) else found, back)
                self._flight.keep(item.number, delivery)
                if not isinstance(found, Packet):
                    return delivery
                self._opened = OpenPacket(found, delivery, self, self.max_payload)
                return self._next_opened()
        except TROUBLE as exc:
            self._drop_reader()
            raise self._unavailable(exc) from exc
        return None

    def _next_opened(self) -> Delivery | None:
        delivery = self._opened.next() if self._opened else None
        if not self._opened:
            self._opened = None  # it is kept by its members that are in hand, and by nothing else
        return delivery

    def _back(self, flight: Flight, item: Item, raw: bytes, delay: float) -> None:
        try:
            flight.later(item, raw, self._later, delay=delay)
        except TROUBLE as exc:
            raise self._unavailable(exc) from exc

    def _drop_reader(self) -> None:
        """Let go of the connection; what it may have brought and nobody saw goes back, what is in hand stays."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.retire()
            self._retired.add(flight)

    # -- life

    def release(self) -> None:
        with self._asking():
            if self._opened:
                self._opened.release()

    def close(self) -> None:
        self._closed.set()
        with self._reading:
            if self._opened:
                self._opened.forget()
            if self._reader is not None:
                self._reader.close()
                self._reader = None
            for flight in (*self._retired, *([self._flight] if self._flight else [])):
                flight.close()
        self._client.close()
        self._client.connection_pool.disconnect()

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        self._check_open()
        try:
            yield self._client
        except TROUBLE as exc:
            raise self._unavailable(exc) from exc

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise QueueClosedError("the queue was closed")

    def _unavailable(self, error: BaseException) -> QueueUnavailableError:
        return QueueUnavailableError(f"{mask(self._url)} does not answer: {error or type(error).__name__}")


class _Reader:
    """Fetches by a connection of its own, and waits there until the server tells of something new."""

    def __init__(self, client: redis.Redis, flight: Flight, lists: Sequence[str], laters: Sequence[str]) -> None:
        self._client, self._flight, self._lists, self._laters = client, flight, lists, laters
        self._connection: Any = None

    def fetch(self, seconds: float) -> Fetched:
        """Return one item, or none when none came in time."""
        connection = self._connect()
        end = time.monotonic() + seconds
        fetched = self._ask(connection)
        while not fetched.items:
            left = end - time.monotonic()
            if left <= 0:
                break
            if connection.can_read(timeout=left if fetched.due is None else max(min(left, fetched.due), 0.001)):
                connection.read_response(push_request=True)
            fetched = self._ask(connection)
        return fetched

    def close(self) -> None:
        with suppress(*TROUBLE):
            if self._connection is not None:
                self._connection.disconnect()
            self._client.connection_pool.disconnect()

    def _connect(self) -> Any:
        if self._connection is None:
            pool: Any = self._client.connection_pool
            self._connection = pool.get_connection()
            self._connection.send_command("CLIENT", "TRACKING", "ON")
            self._connection.read_response()
        return self._connection

    def _ask(self, connection: Any) -> Fetched:
        try:
            connection.send_command(*self._flight.ask(1, self._lists, self._laters))
            while True:
                answer = connection.read_response(push_request=True)
                # Anything else is a push, which comes in between.
                if isinstance(answer, list) and answer and isinstance(answer[0], int):
                    return self._flight.fetched(answer)
        except NoScriptError:
            self._flight.failed()
            self._flight.teach()
            return self._ask(connection)
        except BaseException:
            self._flight.failed()
            raise


def _with_options(url: str, options: dict[str, Any]) -> str:
    """Return the URL with what the options say of the connection."""
    names = (*_CLIENT_OPTIONS, "master_name")
    said = {name: str(options[name]) for name in names if options.get(name) is not None}
    if not said:
        return url
    return f"{url}{'&' if '?' in url else '?'}{urlencode(said)}"


def open_url(url: str) -> RedisQueue:
    """Open `redis://host:port/db`, `rediss://…`, `redis+socket:///path`, `unix:///path` or
    `sentinel://host:port;sentinel://host:port?master_name=…`.

    `?queue=name` names Celery's queue; what else stands there is the connection's.

    Raises:
        ConfigurationError: the URL is none of a Redis server.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    name = query.pop("queue", "celery")
    plain = urlunsplit(parts._replace(query=urlencode(query)))
    return RedisQueue(plain if parts.netloc else plain.replace(":/", ":///", 1), name)
