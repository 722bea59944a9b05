"""A watch service on Celery: each message handled once, retried by its own rule, never lost, always to be seen.

Importing it connects to nothing and loads neither celery nor redis; what needs them is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    ConfigurationError,
    DeadLetterError,
    HandlerAnswerError,
    HandlerExitError,
    HandlerTimeoutError,
    HandlerTransactionError,
    MessageError,
    NotFoundError,
    QueueClosedError,
    QueueError,
    QueueFullError,
    QueueUnavailableError,
    SchemaError,
    SendError,
    SendFailedError,
    SendUnknownError,
    StorageClosedError,
    StorageError,
    StorageUnavailableError,
    TooLargeError,
    TopicError,
    TransactionLostError,
    WatchTasksError,
)
from .message import Indexer, Message, Once
from .outcome import (
    Busy,
    Dead,
    Discard,
    Duplicate,
    Fenced,
    Handled,
    Outcome,
    Reason,
    Retry,
    Snooze,
    Snoozed,
)
from .record import Attempt, Counters, DeadLetter, Event, Record
from .registry import registry
from .retry import RetryPolicy
from .schema import Schema
from .sending import Outlet, Sender, SendReport, Verdict
from .topics import BatchAnswer, Topic, topic

if TYPE_CHECKING:
    from celery import Celery

    from .queue import Delivery, Queue, open_queue
    from .queue.memory import MemoryQueue
    from .storage import Storage, open_storage
    from .storage.memory import MemoryStorage
    from .watcher import TopicHandler, Watcher

    app: Celery

__version__ = "0.1.0"

# `app` is public as well, but a star import should not build it.
__all__ = [  # noqa: RUF022 - grouped by theme
    # messages and topics
    "BatchAnswer",
    "Indexer",
    "Message",
    "Once",
    "Outlet",
    "RetryPolicy",
    "Schema",
    "SendReport",
    "Sender",
    "Topic",
    "Verdict",
    "topic",
    # verdicts of a handler, and what becomes of a delivery
    "Busy",
    "Dead",
    "Discard",
    "Duplicate",
    "Fenced",
    "Handled",
    "Outcome",
    "Reason",
    "Retry",
    "Snooze",
    "Snoozed",
    # in one process
    "Delivery",
    "MemoryQueue",
    "Queue",
    "TopicHandler",
    "Watcher",
    "open_queue",
    # what is remembered
    "Attempt",
    "Counters",
    "DeadLetter",
    "Event",
    "MemoryStorage",
    "Record",
    "Storage",
    "open_storage",
    # errors
    "ConfigurationError",
    "DeadLetterError",
    "HandlerAnswerError",
    "HandlerExitError",
    "HandlerTimeoutError",
    "HandlerTransactionError",
    "MessageError",
    "NotFoundError",
    "QueueClosedError",
    "QueueError",
    "QueueFullError",
    "QueueUnavailableError",
    "SchemaError",
    "SendError",
    "SendFailedError",
    "SendUnknownError",
    "StorageClosedError",
    "StorageError",
    "StorageUnavailableError",
    "TooLargeError",
    "TopicError",
    "TransactionLostError",
    "WatchTasksError",
]

#: Names that cost an import worth waiting for, and the modules they wait in.
_LATE = {
    "Delivery": ".queue",
    "MemoryQueue": ".queue.memory",
    "MemoryStorage": ".storage.memory",
    "Queue": ".queue",
    "Storage": ".storage",
    "TopicHandler": ".watcher",
    "Watcher": ".watcher",
    "app": ".celery",
    "open_queue": ".queue",
    "open_storage": ".storage",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LATE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _default_outlet() -> Outlet:
    """Where a topic that nobody bound sends: the default app, built now."""
    from .worker import outlet_of

    return outlet_of(__getattr__("app"))


def _default_urls() -> tuple[str, str]:
    """Where a Watcher without settings of its own reads and remembers: where the default app's workers do."""
    from .worker import urls_of

    return urls_of(__getattr__("app"))


registry.set_default(_default_outlet, _default_urls)
