"""The contract of a queue: what carries messages from senders to a Watcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..message import Message
from ..outcome import Reason

__all__ = ["Delivery", "Queue", "Unreadable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Something that lay in a queue and is no message; it becomes a dead letter."""

    reason: Reason
    error: str
    #: The message id where there is one, else a hash of the bytes.
    id: str
    topic: str | None = None
    index: str | None = None
    raw: bytes = b""
    content_type: str | None = None


class Delivery(ABC):
    """One hand-over of one message. What is not acked is delivered again, as far as the queue survives."""

    #: What came.
    message: Message[Any] | Unreadable

    @abstractmethod
    def ack(self) -> None:
        """It is settled: the queue may forget it. Twice is safe."""

    @abstractmethod
    def back(self, delay: float = 0.0) -> None:
        """Hand the same copy over again, in `delay` seconds at the earliest; never refused by a bound."""


class Queue(ABC):
    """Carries messages. `push`, `len` and `close` may be called from any thread while another runs `next`.

    Raises:
        QueueUnavailableError: from every verb but `push`: the server does not answer; try again.
        QueueClosedError: from every verb but `close`: the queue was closed in this program.
    """

    #: Whether messages outlive the process that pushed them.
    survives_restart: ClassVar[bool] = True

    @abstractmethod
    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
        """Add a message at the tail; return when the queue has it. Makes a queue an `Outlet`.

        Args:
            message: its data in plain form, or anything that has one (see `schema.py`).
            delay: seconds until it may be delivered.
            bounded: whether the queue's bound holds. Retries are pushed without: a full queue would block them
                for ever.

        Raises:
            QueueFullError: the bound is reached and did not recede in time. Nothing was added.
            SendFailedError: the server cannot be reached. Nothing was added.
            SendUnknownError: the answer was lost; pushing the same message again is safe.
            MessageError: it cannot be sent as it is: its data has no JSON form, or is too large.
            TopicError: its topic is no name of one.
        """

    @abstractmethod
    def next(self, timeout: float | None = None) -> Delivery | None:
        """Wait for the next message that is due.

        Args:
            timeout: seconds to wait at most; None: until one comes or the queue is closed.

        Returns:
            None if none came in time.
        """

    @abstractmethod
    def len(self) -> int:
        """Return how many messages wait, those with a delay included, those delivered and not yet acked not."""

    @abstractmethod
    def clear(self) -> int:
        """Throw away what waits; return how many messages that were."""

    def release(self) -> None:
        """Let other readers have what was fetched together and not handed out yet; here, nothing is.

        For whoever stops reading and does not close the queue.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of connections; a `next` that waits returns None. Twice is safe.

        What waits is kept where `survives_restart`, and what was delivered and not acked is delivered to others.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
