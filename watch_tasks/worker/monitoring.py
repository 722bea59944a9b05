"""What a worker tells who watches it, such as Flower: its events, and its answers to control commands.

It does so from its main loop, where Celery would try again without end: for as long as only that cannot be sent,
nothing would be acked, no time limit kept, no signal heard.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, Final

from celery.app.events import Events
from celery.events import EventDispatcher
from kombu.exceptions import OperationalError
from kombu.pidbox import Node

__all__ = ["Answering", "Dispatcher", "install_monitoring"]

logger = logging.getLogger(__name__)

#: One try by a new connection, which is what mends a broken one.
_ONCE: Final = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

#: Seconds for which nothing is tried after that; as often as workers tell that they are there.
_PAUSE: Final = 2.0

#: Events, or bundles of 24 at most, that wait; of more, the oldest are dropped.
_WAITING: Final = 1_000


class Dispatcher(EventDispatcher):
    """Celery's dispatcher of events: what cannot be sent waits, and is sent once something can be."""

    #: When to try again; until then, all that is sent waits.
    _again_at = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outbound_buffer: deque[tuple[Any, str]] = deque(maxlen=_WAITING)

    def send(self, *args: Any, **options: Any) -> None:
        super().send(*args, **options)
        if self._outbound_buffer and time.monotonic() >= self._again_at:
            self.flush(groups=False)  # Celery's waits for another event of a task

    def _publish(
        self, event: Any, producer: Any, routing_key: str, retry: bool = False, retry_policy: Any = None, **options: Any
    ) -> None:
        waiting = self._outbound_buffer
        if time.monotonic() < self._again_at:
            waiting.append((event, routing_key))
            return
        super()._publish(event, producer, routing_key, retry, retry_policy or _ONCE, **options)
        if waiting and waiting[-1][0] is event:
            self._again_at = time.monotonic() + _PAUSE


class Answering(Node):
    """What takes a worker's control commands: an answer that cannot be sent is dropped, as nobody waits for it long."""

    def reply(self, data: Any, exchange: str, routing_key: str, ticket: str, **_: Any) -> None:
        mailbox: Any = self.mailbox
        try:
            mailbox._publish_reply(
                data,
                exchange,
                routing_key,
                ticket,
                channel=self.channel,
                serializer=mailbox.serializer,
                retry_policy=_ONCE,
            )
        except OperationalError as exc:
            logger.warning("could not answer a control command: %s", exc)


def install_monitoring(app: Any) -> None:
    """Have the workers of an app tell so, but by what the app brings of its own."""
    if app.events.dispatcher_cls == Events.dispatcher_cls:
        app.events.dispatcher_cls = Dispatcher
        app.events.__dict__.pop("Dispatcher", None)  # what Celery made of the other
    if app.control.mailbox.node_cls is Node:
        app.control.mailbox.node_cls = Answering
