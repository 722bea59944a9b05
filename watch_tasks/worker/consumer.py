"""The worker's consumer: turns what Celery would drop, or die of, into dead letters.

Every message is read here, in the main process, before it is handed on: only here are its original bytes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec
from celery.app.trace import build_tracer
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.prefork import _run_ready_callbacks as run_ready_callbacks
from celery.concurrency.solo import TaskPool as SoloPool
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport.virtual import Channel as VirtualChannel

from .. import heartbeat, points
from ..errors import MessageError, StorageError, TooLargeError
from ..outcome import Busy, Dead, Outcome, Reason
from ..queue import bulk, wire
from ..queue.item import NO_ENVELOPE, TYPED
from ..registry import registry
from ..transport.bounded import bound_decoders
from ..transport.codec import ForgivingBase64
from .appetite import Appetite
from .bulk import register_packets
from .checks import check_start
from .cold import ColdStop
from .collecting import Collector
from .gathering import Gatherer, Gathering
from .groups import Groups
from .hand import HAND, IDS, Hand
from .handed import count_as_accepted
from .monitoring import install_monitoring
from .request import TopicRequest
from .runtime import runtime_of
from .settings import transport_leases
from .threads import ThreadsGathering

__all__ = ["WatchConsumer"]

logger = logging.getLogger(__name__)

#: Errors of a message that Celery's own code trips over. Some are connection errors to kombu's Redis transport, which
#: is why they must not get past us.
_GARBAGE: Final = (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError, OverflowError)

#: Seconds until burying is tried again while the storage is away; the message stays unacked.
_AGAIN: Final = 2.0

#: Seconds between two looks whether there are more children than before: nobody tells.
_LOOK_AGAIN: Final = 1.0

#: Seconds that a Redis may take to take an event; a try by a new connection may take three times that.
_EVENT_ANSWER: Final = 1.0

#: Schemes of RabbitMQ.
_AMQP: Final = ("amqp", "amqps", "pyamqp")
#: The content type of what kombu decodes as JSON.
_JSON: Final = "application/json"

#: Bytes that a message may have besides its data.
_ENVELOPE: Final = 65_536


class WatchConsumer(Consumer):
    """Celery's consumer, with nothing dropped. Set by `worker_consumer`."""

    def __init__(self, *args: Any, app: Any = None, pool: Any = None, hostname: str = "", **options: Any) -> None:
        self.runtime = runtime_of(app)
        self.runtime.name_worker(hostname)
        check_start(app, pool, self.runtime)
        topics = list(registry)
        # Also where no topic is loaded: a packet that nobody can read would be dead as one, and could not be replayed.
        register_packets(app)
        if not topics:
            logger.warning(
                "no topics are loaded: name their modules in `imports` of the configuration, or with -I MODULE"
            )
        bound_decoders(bulk.most_bytes(self.runtime.settings.max_payload))
        install_monitoring(app)
        leases = transport_leases(app.conf, self.runtime.settings)
        if leases is not None:
            app.conf.broker_transport_options = leases
        queues = app.amqp.queues
        if queues._consume_from is None:  # nobody chose by -Q
            for name in {topic.queue for topic in topics if topic.queue}:
                queues.select_add(queues[name])
        #: Whether tasks run in this process, and can be handed what is found out here.
        self._is_here = isinstance(pool, (SoloPool, ThreadPool))
        #: Whether the broker says of each message that somebody had it before; and takes acks from any thread.
        self._tells_again = self._takes_acks = False
        super().__init__(*args, app=app, pool=pool, hostname=hostname, **options)
        #: Room for what is collected, in addition to what Celery's settings say.
        self._collected = 0
        if self.runtime.settings.broker_url.partition("://")[0] in _AMQP and self.initial_prefetch_count:
            # Quorum queues read the limit once, when a consumer begins.
            sizes = [topic.batch.size for topic in topics if topic.batch]
            self._collected = max(sizes, default=0) * ((pool.limit or 1) + 1)
            self.initial_prefetch_count += self._collected
        self.collector = Collector(self, self.runtime, raises_limit=not self._collected)
        self._process: Callable[[Any], object] = self.__dict__["on_task_request"]
        self.on_task_request = self._begin
        self._gathering = self._gather(pool) if self.hub is not None else None
        self._cold = ColdStop(self.runtime.shared.stop, self._begin_to_stop) if self.hub is not None else None

    def _gather(self, pool: Any) -> Gatherer | None:
        if isinstance(pool, SoloPool):
            return Gathering(self.runtime, pool)
        if isinstance(pool, ThreadPool):
            return ThreadsGathering(self.runtime, pool)
        if isinstance(pool, PreforkPool) and not pool.options.get("maxtasksperchild"):
            return Groups(self.runtime, pool, Appetite(self._flexible_qos))
        return None

    def _flexible_qos(self) -> Any:
        """Return the prefetch limit, where it may follow the pace: with our transport, which asks nobody for it."""
        return None if self.app.conf.worker_disable_prefetch or not self._takes_acks else self.qos

    @property
    def max_prefetch_count(self) -> int:
        return int(super().max_prefetch_count) + self._collected

    def start(self) -> None:
        self.runtime.shared.go_on()
        self.runtime.keeper.start()
        self.timer.call_repeatedly(heartbeat.EVERY, heartbeat.beat)
        if self._gathering:
            self.timer.call_repeatedly(_LOOK_AGAIN, self._gathering.look_again)
        super().start()

    def _begin_to_stop(self) -> None:
        # A child that waits for a storage learns from this that it must not wait any longer.
        self.runtime.shared.stop()
        if isinstance(self.pool, PreforkPool) and self.hub is not None:
            count_as_accepted(self.pool)

    def stop(self) -> None:
        if self._cold:
            self._cold.let_go()
        self._begin_to_stop()
        self.collector.let_go()
        if self._gathering:
            self._gathering.let_go()
        super().stop()

    def shutdown(self) -> None:
        if self._gathering:
            self._gathering.close()  # before the connection, which takes the last acks along
        if self.hub is not None and self.connection is not None:
            run_ready_callbacks(self.hub)  # some of them: Celery hands them to the loop, which has ended
        super().shutdown()
        self.runtime.keeper.stop()

    def connect(self) -> Any:
        connection = super().connect()
        channel = connection.default_channel
        if isinstance(channel, VirtualChannel):
            channel.codecs = {**channel.codecs, "base64": ForgivingBase64()}
        self._takes_acks = bool(getattr(channel, "tags_are_unique", False))
        self._tells_again = self._takes_acks or connection.transport.driver_type == "amqp"
        return connection

    def register_with_event_loop(self, hub: Any) -> None:
        super().register_with_event_loop(hub)
        if self._cold:
            self._cold.register_with_event_loop(hub)
        if self._gathering:
            self._gathering.register_with_event_loop(hub)

    def on_close(self) -> None:
        if self._cold:
            self._cold.let_go()
        # The connection was lost: Celery forgets what was not started.
        self.collector.let_go()
        if self._gathering:
            self._gathering.let_go()
        super().on_close()

    def call_soon_ack(self, p: Any, *args: Any, **kwargs: Any) -> Any:
        # Our transport only writes down what is settled, and tells it with its next fetch: no need to wait for a turn
        # of the event loop.
        return p(*args, **kwargs) if self._takes_acks else super().call_soon_ack(p, *args, **kwargs)

    def _begin(self, request: Any) -> None:
        """Have a task run that is due."""
        if self._gathering:
            if self._tells_again and self._gathering.takes(request):
                self._gathering.add(request)
                return
            self._gathering.make_way()
        if isinstance(request, TopicRequest) and request.hand:
            request.start(self.pool, request.on_success)
        else:
            self._process(request)

    def connection_for_write(self, url: Any = None, heartbeat: Any = None) -> Any:
        connection = self.app.connection_for_write(url=url, heartbeat=heartbeat)
        options = connection.transport_options or {}
        # By it go the events, from the main loop: what a silent server is waited for, this process stands still.
        if "confirm_publish" in options:
            connection.transport_options = {**options, "confirm_publish": False}
        elif connection.transport.driver_type == "redis":
            answer = min(options.get("socket_timeout") or _EVENT_ANSWER, _EVENT_ANSWER)
            connection.transport_options = {**options, "socket_timeout": answer}
        return self.ensure_connected(connection)

    def ensure_connected(self, conn: Any) -> Any:
        # A worker that waits for its broker is well: to restart it would cut off what its pool is doing.
        ensure = conn.ensure_connection

        def beating(errback: Any, max_retries: Any, callback: Callable[[], None]) -> Any:
            def each_second() -> None:
                heartbeat.beat()
                callback()

            return ensure(errback, max_retries, callback=each_second)

        conn.ensure_connection = beating
        try:
            return super().ensure_connected(conn)
        finally:
            del conn.ensure_connection

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        with warnings.catch_warnings():
            # Of what a later Celery may do with what is running, in six lines: to us it makes no difference.
            warnings.simplefilter("ignore", CPendingDeprecationWarning)
            super().on_connection_error_after_connected(exc)

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        handle = super().create_task_handler(*args, **options)

        def receive(message: Any) -> Any:
            points.reach("after_fetch")
            try:
                if not self._refuse(message):
                    return handle(message)
            except _GARBAGE as exc:
                if self.runtime.is_stopping():
                    return None  # by what a stop has ended already, perhaps; it goes back with the connection
                self._bury(message, Reason.MALFORMED, exc)
            return None

        return receive

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._bury(message, Reason.TOO_LARGE if isinstance(exc, TooLargeError) else Reason.UNDECODABLE, exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._bury(message, Reason.MALFORMED, "the header `task` is missing: it is no task message")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        reason = Reason.UNDECODABLE if isinstance(exc, (ContentDisallowed, DecodeError)) else Reason.MALFORMED
        self._bury(message, reason, exc)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        name = message.headers.get("task")
        task = self.app.tasks.get(name)
        if task is not None:
            # Defined after the worker started, which gives every task these two.
            self.strategies[name] = task.start_strategy(self.app, self)
            task.__trace__ = build_tracer(name, task, self.app.loader, self.hostname, app=self.app)
            self._put_back(message)
            return
        self._wait_or_bury(message)

    def _refuse(self, message: Any) -> bool:
        """Bury a message of ours that cannot become one; say whether that was so."""
        if message.content_type == NO_ENVELOPE:
            self._bury(message, Reason.UNDECODABLE, "the item in the queue must be an envelope of kombu's, in JSON")
            return True
        headers = message.headers
        if isinstance(headers, dict) and "task" in headers:
            try:
                wire.check_headers(headers)
            except MessageError as exc:
                self._bury(message, Reason.MALFORMED, exc)
                return True
        task = headers.get("task") if isinstance(headers, dict) else None
        topic = wire.topic_of(task)
        if topic is None or f"{wire.PREFIX}{topic}" not in self.app.tasks:
            return False
        size, limit = len(message.body), self.runtime.settings.max_payload
        try:
            if size > (bulk.most_bytes(limit) if bulk.is_bulk(task) else limit + _ENVELOPE):
                raise TooLargeError(topic, size, limit)
            if bulk.is_bulk(task):
                _read_packet(message)
                return False
            body = _body_of(message)
            if not isinstance(body, (list, tuple)) or len(body) != 3:
                raise MessageError(
                    f"the body must be [args, kwargs, embed], got {type(body).__name__}"
                    + (f" of {len(body)}" if isinstance(body, (list, tuple)) else "")
                )
            read = wire.read(headers, body[0], body[1])
        except TooLargeError as exc:
            self._bury(message, Reason.TOO_LARGE, exc)
        except MessageError as exc:
            self._bury(message, Reason.MALFORMED, exc)
        except Exception as exc:  # noqa: BLE001 - decoders raise what they like; a message must not end the worker
            self._bury(message, Reason.UNDECODABLE, exc)
        else:
            if self._is_here:
                setattr(message, HAND, Hand(read))
            return False
        return True

    def _bury(self, message: Any, reason: Reason, error: BaseException | str) -> None:
        """Make a dead letter and ack; while the storage is away, try again later and ack nothing."""
        outcome = self._buried(message, reason, error)
        if isinstance(outcome, Dead):
            message.ack_log_error(logger, self.connection_errors)
        else:
            self.timer.call_after(_AGAIN, self._bury, (message, reason, error))

    def _buried(self, message: Any, reason: Reason, error: BaseException | str) -> Outcome:
        headers = message.headers if isinstance(message.headers, dict) else {}
        raw = message.body if isinstance(message.body, bytes) else str(message.body).encode("utf-8", "replace")
        id = headers.get("id")
        try:
            return self.runtime.clerk.bury(
                reason,
                error,
                id=id if wire.is_id(id) else _name(headers, raw),
                topic=None if bulk.is_bulk(headers.get("task")) else wire.topic_of(headers.get("task")),
                index=_index(headers),
                raw=raw,
                content_type=str(message.content_type),
            )
        except StorageError as exc:
            logger.error("could not bury a message: %s", exc)
            return Busy(_AGAIN)

    def _wait_or_bury(self, message: Any) -> None:
        """Put a message of an unknown topic back for a while: another worker may know it, or this one soon."""
        headers = message.headers
        id = headers["id"] if wire.is_id(headers.get("id")) else _name(headers, message.body)
        name = str(headers.get("task"))
        outcome = self.runtime.clerk.unknown(
            wire.topic_of(name) or name, id, lambda error: self._buried(message, Reason.UNKNOWN_TOPIC, error)
        )
        if isinstance(outcome, Dead):
            message.ack_log_error(logger, self.connection_errors)
        elif isinstance(outcome, Busy):
            logger.info("nobody here knows %s, putting message %s back in %.2g s", name, id, outcome.until)
            # Held, so that it does not come back at once; meanwhile it must not take the place of others.
            self.qos.increment_eventually()
            self.timer.call_after(max(outcome.until, 0.1), self._let_go, (message, self.qos))

    def _let_go(self, message: Any, qos: Any) -> None:
        # That of the connection it came by: a later one has never heard of it.
        qos.decrement_eventually()
        self._put_back(message)

    def _put_back(self, message: Any) -> None:
        message.reject_log_error(logger, self.connection_errors, requeue=True)


def _read_packet(message: Any) -> None:
    """See that a message is a packet, note its members' ids, and spare Celery the decoding of the rest.

    Raises:
        MessageError: it is none.
    """
    if message.content_type != "application/json":
        raise MessageError(f"the content type of a packet must be `application/json`, got {message.content_type!r}")
    raw = message.body if isinstance(message.body, bytes) else message.body.encode()
    bulk.check_headers(message.headers)
    setattr(message, IDS, bulk.names(raw))
    message._decoded_cache = [[raw], {}, None]


def _body_of(message: Any) -> Any:
    """Return what the body stands for. The message keeps it, so that Celery does not decode it again."""
    raw, accept = message.body, message.accept
    is_plain = message.content_type == _JSON and message.content_encoding == "utf-8" and isinstance(raw, bytes)
    if is_plain and TYPED not in raw and (accept is None or _JSON in accept):
        with suppress(msgspec.DecodeError, RecursionError):  # kombu's decoder knows more, or says what is wrong
            message._decoded_cache = msgspec.json.decode(raw)
    return message.payload


def _name(headers: dict[str, Any], raw: bytes) -> str:
    """Return the same id for the same message without one, each time it is delivered."""
    lasting = sorted((str(name), repr(value)) for name, value in headers.items() if name != "redelivered")
    return wire.bytes_id(repr(lasting).encode() + raw)


def _index(headers: dict[str, Any]) -> str | None:
    """Return the index that our own header names, if it names one that can be shown."""
    header = headers.get(wire.HEADER)
    index = header.get("index") if isinstance(header, dict) else None
    return index if isinstance(index, str) and 0 < len(index) <= 512 and index.isprintable() else None
