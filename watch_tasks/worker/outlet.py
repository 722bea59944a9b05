"""Sends messages through a Celery app, so that its routes, signals and instrumentation hold for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from amqp.exceptions import AMQPError
from celery import Celery
from celery.app.task import get_actual_ignore_result
from celery.utils.quorum_queues import detect_quorum_queues
from kombu.entity import Queue
from kombu.exceptions import KombuError
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from ..errors import SendError, SendFailedError, TooLargeError
from ..message import Message
from ..packets import Packet
from ..queue import bulk, wire
from ..queue.broker import name_of, send_error
from ..registry import registry
from ..schema import dump
from .hand import HAND
from .shortcut import Shortcut
from .waiting import wait_for_room

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["AGAIN_HEADER", "WORKER_HEADER", "CeleryOutlet"]

#: Seconds that RabbitMQ may take to confirm a message: Celery waits without end.
_CONFIRM: Final = 5.0

#: The header by which a worker's main process tells its children its name and process id; never sent on.
WORKER_HEADER: Final = "watch_worker"
#: The header that says of a copy that it stands for a delivery, which somebody had in hand.
AGAIN_HEADER: Final = "watch_again"


class CeleryOutlet:
    """An `Outlet` that ends in `app.send_task`."""

    def __init__(self, app: Celery, settings: Callable[[], Settings]) -> None:
        self._app = app
        self._settings = settings
        self._shortcut = Shortcut(app)
        #: Queues that what the broker delays is known to come to.
        self._awaiting: set[str] = set()

    @property
    def max_payload(self) -> int:
        """Bytes of JSON that the data of one message may have."""
        return self._settings().max_payload

    def push(self, message: Message[Any], *, delay: float = 0.0) -> None:
        """Send a message; see `Outlet`."""
        size, limit = len(dump(message.data)), self.max_payload
        if size > limit:
            raise TooLargeError(message.topic, size, limit)
        topic = registry.get(message.topic)
        options: dict[str, Any] = {"queue": topic.queue} if topic and topic.queue else {}
        if topic:
            wait_for_room(self._app, topic, message, self._settings().send_wait, self._error)
        if delay > 0 or not self._shortcut.send(message, options):
            self._send(message, delay, {}, options)

    def push_copy(self, message: Message[Any], delay: float, request: Any) -> None:
        """Send a further copy of what a worker has in hand, with the options and headers it came with.

        Args:
            message: the copy.
            delay: seconds until it is due.
            request: the request of the Celery task that has it in hand.
        """
        options = {name: value for name, value in request.as_execution_options().items() if value is not None}
        headers = dict(options.pop("headers", None) or {})
        for name in (wire.HEADER, WORKER_HEADER, HAND, "redelivered"):
            headers.pop(name, None)
        headers[AGAIN_HEADER] = True
        for name in ("task_id", "retries", "time_limit", "soft_time_limit"):
            options.pop(name, None)
        options |= _way(request)
        # Whoever waits for a result waits for that of the copy.
        task = self._app.tasks.get(wire.task_name(message.topic))
        options["ignore_result"] = task is None or get_actual_ignore_result(task, request)
        self._send(message, delay, headers, options)

    def push_replay(self, message: Message[Any], raw: bytes | None = None) -> None:
        """Send the next copy of a dead letter. As a retry, it goes past the bound of its queue.

        Args:
            message: the copy.
            raw: the JSON body it first came in, sent as it is: it may hold what Celery embeds, such as a chain.
        """
        topic = registry.get(message.topic)
        options: dict[str, Any] = {"queue": topic.queue} if topic and topic.queue else {}
        if raw is None:
            self._send(message, 0.0, {}, options)
            return
        name = wire.task_name(message.topic)
        args, keywords = wire.arguments(message)
        made = self._app.amqp.create_task_message(
            message.id, name, args, keywords, ignore_result=True, **wire.reprs(message)
        )
        options = self._app.amqp.router.route(options, name, args, keywords)
        self._send_raw(message, made, raw, wire.headers(message), options)

    def push_packet(self, packet: Packet, request: Any = None) -> None:
        """Send a packet, by the way that a message of its topic takes; see `PacketOutlet`.

        Args:
            packet: the packet.
            request: the request of the Celery task that has its members in hand: it goes the same way as that came.
        """
        topic = registry.get(packet.topic)
        options: dict[str, Any] = {"queue": topic.queue} if topic and topic.queue else {}
        if request is not None:
            options = _way(request)
        options = self._app.amqp.router.route(options, wire.task_name(packet.topic))
        made = self._app.amqp.create_task_message(packet.id, bulk.TASK, ignore_result=True, **bulk.reprs(packet))
        self._send_raw(packet, made, bulk.body(packet), bulk.headers(packet), options)

    def _send_raw(
        self, sent: Message[Any] | Packet, made: Any, body: bytes, headers: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Send a body that is JSON already, in what Celery made around it."""
        amqp = self._app.amqp
        kind = {"content_type": "application/json", "content_encoding": "utf-8"}
        made = made._replace(headers={**made.headers, **headers}, properties={**made.properties, **kind}, body=body)
        try:
            with self._publishing() as producer, producer.connection._reraise_as_library_errors():
                amqp.send_task_message(producer, made.headers["task"], made, confirm_timeout=_CONFIRM, **options)
        except (KombuError, AMQPError, OSError, TimeoutError) as exc:
            raise self._error(exc, sent) from exc

    def _send(self, message: Message[Any], delay: float, headers: dict[str, Any], options: dict[str, Any]) -> None:
        args, keywords = wire.arguments(message)
        expires = options.pop("expires", None)
        if expires is not None:
            # In the header only, where a worker reads it and buries: Celery's option becomes the broker's own time to
            # live as well, and RabbitMQ would let the message vanish.
            headers["expires"] = expires.isoformat() if isinstance(expires, datetime) else expires
        try:
            if delay > 0 and self._delays_in_broker:
                # RabbitMQ's native delay counts in whole seconds; Celery cuts off, and fails below one.
                delay = float(math.ceil(delay))
                self._have_awaited(message, options)
            with self._publishing() as producer:
                self._app.send_task(
                    wire.task_name(message.topic),
                    args,
                    keywords,
                    task_id=message.id,
                    headers={**headers, **wire.headers(message)},
                    retries=message.retries,
                    countdown=delay or None,
                    add_to_parent=False,
                    serializer="json",
                    producer=producer,
                    **wire.reprs(message),
                    **{"ignore_result": True, "confirm_timeout": _CONFIRM, **options},
                )
        except (KombuError, AMQPError, OSError, TimeoutError) as exc:
            raise self._error(exc, message) from exc

    @contextmanager
    def _publishing(self) -> Iterator[Any]:
        with self._app.producer_or_acquire() as producer:
            try:
                yield producer
            except (SystemExit, KeyboardInterrupt):
                # Perhaps in the midst of a frame: to take leave of the broker would be to wait for the rest of it.
                producer.connection.collect()
                raise

    def _have_awaited(self, message: Message[Any], options: dict[str, Any]) -> None:
        """See to it that a message comes to its queue when the broker has delayed it.

        Workers do that for their queues when they start. A message for a queue that no worker has had yet would vanish,
        and be confirmed: RabbitMQ confirms as well what it cannot route.

        Raises:
            SendFailedError: that could not be done, and the message was not sent.
        """
        if "exchange" in options:
            return  # the way by which it came here
        args, keywords = wire.arguments(message)
        queue = self._app.amqp.router.route(dict(options), wire.task_name(message.topic), args, keywords).get("queue")
        if not isinstance(queue, Queue) or queue.name in self._awaiting or queue.exchange.type == "direct":
            return
        try:
            with self._app.connection_for_write() as connection:
                kind = self._app.conf.broker_native_delayed_delivery_queue_type
                declare_native_delayed_delivery_exchanges_and_queues(connection, kind)
                queue(connection.default_channel).declare()
                bind_queue_to_native_delayed_delivery_exchange(connection, queue)
        except (KombuError, AMQPError, OSError, TimeoutError) as exc:
            raise SendFailedError(f"{name_of(message)} was not sent: {exc}") from exc
        self._awaiting.add(queue.name)

    def _error(self, error: BaseException, sent: Message[Any] | Packet) -> SendError:
        """Return what a failed publish means; where the embedded server does not run, what to do."""
        found = send_error(error, sent)
        missing = self._settings().missing_server() if isinstance(found, SendFailedError) else None
        return SendFailedError(f"{name_of(sent)} was not sent: {missing}") if missing else found

    @property
    def _delays_in_broker(self) -> bool:
        """Whether Celery hands delays to the broker: RabbitMQ with a quorum queue."""
        transport = self._app.connection_for_write().get_transport_cls()  # nothing is connected by this
        return bool(detect_quorum_queues(self._app, transport.driver_type)[0])


def _way(request: Any) -> dict[str, Any]:
    """Return the options that send by the way that a request came."""
    info = request.delivery_info or {}
    return {name: info[name] for name in ("exchange", "routing_key", "priority") if info.get(name) is not None}
