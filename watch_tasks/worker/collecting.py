"""Collects the messages of topics with a batch handler in the worker's main process, until a batch is due.

A batch is due when it has as many messages as one call gets, when its first has waited for long enough, or when its
bodies are as large as one fetch. Meanwhile, and until it is over, its messages take no room from others: the worker's
prefetch limit is raised by its size, for one batch more than the pool handles at a time.
"""

from __future__ import annotations

import threading
from typing import Any, Final

from celery.worker.state import task_reserved
from celery.worker.strategy import default

from .batches import Batch
from .request import TopicRequest
from .runtime import Runtime

__all__ = ["Collector", "strategy"]

#: Bytes of bodies that a batch may have: it crosses a pipe, and is in two processes at once.
_MOST_BYTES: Final = 8 * 1024 * 1024


class Collector:
    """The batches of one consumer.

    Args:
        consumer: what receives the messages.
        runtime: of this process.
        raises_limit: whether the prefetch limit follows; not where a broker reads it once, when a consumer begins.
    """

    def __init__(self, consumer: Any, runtime: Runtime, *, raises_limit: bool = True) -> None:
        self._consumer, self._runtime, self._raises_limit = consumer, runtime, raises_limit
        #: Task → its batch that is not due yet, and the bytes that has.
        self._open: dict[str, Batch] = {}
        self._bytes: dict[str, int] = {}
        #: Batches that are not over, in the order they began in, and the size of each.
        self._sizes: dict[Batch, int] = {}
        self._raised = 0
        # Timers and pools may have threads.
        self._lock = threading.RLock()

    def add(self, request: TopicRequest) -> None:
        """Take a request into the batch of its task; begin one if there is none."""
        handler = request.task.topic.batch
        if self._must_be_alone(request):
            self._consumer.on_task_request(request)
            return
        name = request.type
        with self._lock:
            batch = self._open.get(name)
            if batch is None:
                batch = self._open[name] = Batch(name, self._runtime, self._over)
                self._bytes[name] = 0
                self._sizes[batch] = handler.size
                self._fit_limit()
                self._consumer.timer.call_after(handler.seconds, self._on_time, (batch,))
            batch.requests.append(request)
            self._bytes[name] += len(request.body)
            is_due = len(batch.requests) >= handler.size or self._bytes[name] >= _MOST_BYTES
        if is_due:
            self._hand_over(batch)

    def let_go(self) -> None:
        """Forget what is collected: it goes back with its connection. What runs is not touched."""
        with self._lock:
            for batch in [batch for batch in self._sizes if not batch.is_accepted]:
                batch.forget()
            self._open.clear()
            self._sizes.clear()
            self._raised = 0

    def _must_be_alone(self, request: TopicRequest) -> bool:
        # Where one crash is one too many, none can be shared. And what is not claimed has nothing to tell by that it
        # took its process down before.
        has_been = request.delivery_info["redelivered"]
        return self._runtime.settings.max_crashes == 1 or (has_been and request.is_unclaimed)

    def _on_time(self, batch: Batch) -> None:
        self._consumer.call_soon(self._hand_over, batch)

    def _hand_over(self, batch: Batch) -> None:
        with self._lock:
            if self._open.get(batch.name) is not batch:
                return
            del self._open[batch.name]
        self._consumer.on_task_request(batch)

    def _over(self, batch: Batch) -> None:
        with self._lock:
            if self._sizes.pop(batch, None):
                self._fit_limit()

    def _fit_limit(self) -> None:
        qos = self._consumer.qos
        if not self._raises_limit or qos is None:
            return
        most = (self._consumer.pool.num_processes or 1) + 1
        wanted = sum(list(self._sizes.values())[:most])
        before = qos.value
        if wanted > self._raised:
            # A limit of Celery's may keep it lower.
            self._raised += qos.increment_eventually(wanted - self._raised) - before
        elif wanted < self._raised:
            qos.decrement_eventually(self._raised - wanted)
            self._raised = wanted


class _Collecting:
    """A consumer as Celery's own strategy sees it, whose requests are collected when they are due."""

    def __init__(self, consumer: Any, collector: Collector) -> None:
        self._consumer = consumer
        self.on_task_request = collector.add

    def apply_eta_task(self, request: TopicRequest) -> None:
        task_reserved(request)
        self.on_task_request(request)
        self._consumer.qos.decrement_eventually()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)


def strategy(task: Any, app: Any, consumer: Any, **options: Any) -> Any:
    """Return what receives the messages of a task: Celery's own, and before the pool our collector."""
    collector: Collector | None = getattr(consumer, "collector", None)
    topic = getattr(task, "topic", None)
    if collector is not None and topic is not None and topic.batch is not None:
        consumer = _Collecting(consumer, collector)
    return default(task, app, consumer, **options)
