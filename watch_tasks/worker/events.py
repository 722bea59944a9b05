"""A worker's events, as Flower sees them: what cannot be sent of them holds up nothing."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final

from celery.app.events import Events
from celery.events import EventDispatcher

__all__ = ["Dispatcher", "install_events"]

#: One try by a new connection, which is what mends a broken one; then the event waits.
_ONCE: Final = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

#: Seconds for which nothing is tried after that; as often as workers tell that they are there.
_PAUSE: Final = 2.0

#: Events, or bundles of 24 at most, that wait; of more, the oldest are dropped.
_WAITING: Final = 1_000


class Dispatcher(EventDispatcher):
    """Celery's dispatcher of events, which sends from a worker's main loop, and would retry without end there.

    For as long as only the way of the events is down, nothing would be acked, no time limit kept, no signal heard.
    """

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


def install_events(app: Any) -> None:
    """Have the workers of an app send their events so, unless it brings a dispatcher of its own."""
    if app.events.dispatcher_cls == Events.dispatcher_cls:
        app.events.dispatcher_cls = Dispatcher
        app.events.__dict__.pop("Dispatcher", None)  # what Celery made of the other
