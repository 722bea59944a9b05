"""Sends a message to Redis as `app.send_task` would, past the layers of Celery and kombu that have no say in it.

Those take three times as long to send a message as the server and its answer. They are passed only where nobody can
tell: what goes out is the same, and who wants to see it on its way still does, by Celery's signals and events, by a
route, or by wrapping the functions that are left out here.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import celery.app.amqp
import celery.app.base
import kombu.messaging
import kombu.serialization
import redis
from amqp.exceptions import AMQPError
from celery import Celery, signals
from celery.app.routes import MapRoute
from kombu.common import maybe_declare
from kombu.entity import Queue
from kombu.messaging import Producer

from ..errors import SendUnknownError
from ..message import Message
from ..queue import wire
from ..queue.broker import TROUBLE, send_error
from ..queue.envelope import Envelope
from ..queue.item import make_item
from ..transport.sending import SendingChannel
from ..transport.unwrapped import is_unwrapped

__all__ = ["Shortcut"]

#: What a task may say of its messages without having any other sent than ours are.
_USUAL: Final = {"serializer": "json", "immediate": False, "mandatory": False}
#: kombu's number for messages that outlive the broker's end.
_PERSISTENT: Final = 2
#: Celery's form of messages that ours is.
_PROTOCOL: Final = 2

#: kombu's modules have no types.
_serialization: Final[Any] = kombu.serialization


class Shortcut:
    """The way of one app's messages.

    Args:
        app: whose routes and connections they go by.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        #: Names of queues that were declared.
        self._declared: set[str] = set()
        #: Where no route says otherwise: the queues by their names, None for the default one.
        self._queues: dict[str | None, Queue] = {}

    def send(self, message: Message[Any], options: dict[str, Any]) -> bool:
        """Send a message; return whether it was. If not, `app.send_task` must, which also finds out what is wrong.

        Args:
            message: the message.
            options: of `app.send_task`.

        Raises:
            SendUnknownError: the broker's answer did not come in time.
        """
        name = wire.task_name(message.topic)
        queue = self._queue(message, name, options) if self._is_free(name) else None
        if queue is None:
            return False
        try:
            with self._app.pool.acquire(block=True, timeout=self._patience) as connection:
                # How often to try is for Celery to know.
                channel = connection.default_channel if connection.connected else None
                if not isinstance(channel, SendingChannel):
                    return False
                if queue.name not in self._declared:
                    maybe_declare(queue, channel)
                    self._declared.add(queue.name)
                channel.push_item(queue.name, self._item(message, name, queue.name))
        except (*TROUBLE, AMQPError) as exc:
            error = send_error(exc, message)
            if isinstance(error, SendUnknownError) and isinstance(exc, redis.TimeoutError):
                raise error from exc  # to try again would take as long again
            return False
        return True

    def _is_free(self, name: str) -> bool:
        """Whether nobody has a say in the messages of a task, beside its routes."""
        if signals.before_task_publish.receivers or signals.after_task_publish.receivers or signals.task_sent.receivers:
            return False
        app = self._app
        if not (
            is_unwrapped(celery.app.base, app.send_task)
            and is_unwrapped(celery.app.amqp, app.amqp.send_task_message)
            and is_unwrapped(kombu.messaging, Producer.publish)
        ):
            return False
        task = app.tasks.get(name)
        options = task._get_exec_options() if task else {}
        if any(value is not None and _USUAL.get(key) != value for key, value in options.items()):
            return False
        return self._is_usual and not app.conf.task_send_sent_event

    @cached_property
    def _is_usual(self) -> bool:
        """Whether the app's messages are of the usual kind. Celery asks for most of this only once as well."""
        conf = self._app.conf
        is_kept = conf.task_default_delivery_mode in (_PERSISTENT, "persistent")
        is_other = conf.task_inherit_parent_priority or conf.task_compression or conf.task_always_eager
        return bool(conf.task_protocol == _PROTOCOL and is_kept and not is_other)

    @cached_property
    def _patience(self) -> float | None:
        """Seconds to wait for a connection of the pool."""
        seconds: float | None = self._app.conf.broker_pool_acquire_timeout
        return seconds

    def _queue(self, message: Message[Any], name: str, options: dict[str, Any]) -> Queue | None:
        """Return the queue that a message goes to, if all that its route says is which."""
        router = self._app.amqp.router
        if not all(type(route) is MapRoute for route in router.routes):
            return None  # a function may count how often it is asked, and `app.send_task` would ask it again
        chosen = options.get("queue")
        # Without routes it does not depend on the message.
        queue = None if router.routes else self._queues.get(chosen)
        if queue is None:
            found = router.route({**options}, name, *wire.arguments(message), self._app.tasks.get(name))
            queue = found.pop("queue", None)
            if found or not isinstance(queue, Queue) or not _is_plain(queue):
                return None
            if not router.routes:
                self._queues[chosen] = queue
        return queue

    def _item(self, message: Message[Any], name: str, queue: str) -> bytes:
        """Return what is sent, as Celery makes it."""
        app = self._app
        args, keywords = wire.arguments(message)
        parent = app.current_worker_task
        reprs = wire.reprs(message)
        made = app.amqp.create_task_message(
            message.id,
            name,
            args,
            keywords,
            retries=message.retries,
            reply_to=app.thread_oid,
            root_id=parent and (parent.request.root_id or parent.request.id),
            parent_id=parent and parent.request.id,
            ignore_result=True,
            **reprs,
        )
        _, _, body = _serialization.dumps(made.body, serializer="json")
        envelope = Envelope({**made.headers, **wire.headers(message)}, body.encode())
        # Celery's sender puts what it has no other use for into the properties as well.
        return make_item(envelope, queue, **made.properties, **reprs)


def _is_plain(queue: Any) -> bool:
    """Whether what is sent to a queue goes into its list, as any message would, and nothing else is to be done."""
    is_kept = queue.expires is None and "x-expires" not in (queue.queue_arguments or {})
    return is_kept and queue.exchange.type == "direct" and queue.exchange.delivery_mode in (None, _PERSISTENT)
