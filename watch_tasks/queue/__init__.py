"""Queues, opened by URL. The table of schemes is `_SCHEMES`; others come by the entry point `watch_tasks.queues`."""

from __future__ import annotations

from ..schemes import open_by_scheme
from .base import Delivery, Queue, Unreadable

__all__ = ["Delivery", "Queue", "Unreadable", "open_queue"]

#: Scheme → module:function that opens such a URL.
_SCHEMES = {
    "memory": "watch_tasks.queue.memory:open_url",
    "redis": "watch_tasks.queue.redis:open_url",
    "rediss": "watch_tasks.queue.redis:open_url",
    "redis+socket": "watch_tasks.queue.redis:open_url",
    "unix": "watch_tasks.queue.redis:open_url",
    "sentinel": "watch_tasks.queue.redis:open_url",
    "amqp": "watch_tasks.queue.amqp:open_url",
    "amqps": "watch_tasks.queue.amqp:open_url",
}


def open_queue(url: str) -> Queue:
    """Open a queue by URL, like a broker. It connects at its first use.

    `memory://` · `redis://` and `rediss://` (also Valkey) · `redis+socket:///path` or `unix:///path` ·
    `sentinel://` · `amqp://` and `amqps://`.

    `?queue=name` names the Celery queue; default: Celery's own default, `celery`.

    Raises:
        ConfigurationError: no such scheme, or the URL lacks something.
    """
    queue: Queue = open_by_scheme("queue", url, _SCHEMES, "watch_tasks.queues")
    return queue
