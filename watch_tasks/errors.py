"""Every error of the package, in one tree.

    WatchTasksError
    ├── ConfigurationError        settings, URLs or options that cannot work; carries every complaint
    ├── TopicError                a topic defined, named or used wrongly in the program
    ├── MessageError              one message that cannot be sent or handled as it is
    │   ├── SchemaError           its data does not fit the topic's schema
    │   └── TooLargeError         its data is larger than a payload may be
    ├── SendError                 a send that did not end in "the broker has it"
    │   ├── QueueFullError        refused: the queue's bound is reached
    │   ├── SendFailedError       certainly not sent
    │   └── SendUnknownError      the answer was lost: perhaps sent, so send the same object again
    ├── QueueError                a queue that cannot be read or written
    │   ├── QueueClosedError      it was closed in this program
    │   └── QueueUnavailableError its server does not answer
    ├── StorageError              a storage that cannot do what was asked
    │   ├── StorageClosedError    it was closed in this program
    │   └── StorageUnavailableError  its server does not answer: try again
    │       └── TransactionLostError  and a handler's transaction was lost by it
    ├── NotFoundError             nothing is kept under that index or id
    ├── HandlerTimeoutError       a handler ran past its topic's timeout
    ├── HandlerExitError          a handler tried to end the process (`sys.exit()`)
    ├── HandlerAnswerError        a batch handler answered in a way that tells nothing of its messages
    ├── HandlerTransactionError   a handler ended its transaction, or left one that cannot be committed
    └── DeadLetterError           why a message became a dead letter, where no handler's error says it

What a handler raises on purpose (`Snooze`, `Discard`) is a verdict, not an error: see `outcome.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .message import Message

__all__ = [
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
    "did_you_mean",
]


class WatchTasksError(Exception):
    """What everything raised by this package on its own account descends from."""


class ConfigurationError(WatchTasksError):
    """Settings that cannot work. All complaints are collected before it is raised.

    Attributes:
        complaints: one sentence for each thing that is wrong, in the order found.
    """

    def __init__(self, *complaints: str) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints


class TopicError(WatchTasksError, ValueError):
    """A topic is named wrongly, defined twice, or has no such handler: a mistake in the program."""


class MessageError(WatchTasksError, ValueError):
    """A message that can be neither sent nor handled as it is; sending it again changes nothing."""


class SchemaError(MessageError):
    """Data that does not fit the schema of its topic; the text says where."""


class TooLargeError(MessageError):
    """Data that is larger than a payload may be.

    Attributes:
        size: bytes it would take on the wire.
        limit: bytes it may take.
    """

    def __init__(self, topic: str | None, size: int, limit: int) -> None:
        # Without a topic it is a body that was not inflated any further.
        what = f"topic `{topic}`: data takes {size} bytes" if topic else f"inflated, the body takes {size} bytes"
        super().__init__(
            f"{what}, at most {limit} are allowed; store it elsewhere and send its name, or raise `watch_max_payload`"
        )
        self.topic, self.size, self.limit = topic, size, limit

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.topic, self.size, self.limit)


class SendError(WatchTasksError):
    """A send that did not end in "the broker has it"."""


class QueueFullError(SendError):
    """The queue's bound is reached and did not recede in time; nothing was sent."""


class SendFailedError(SendError):
    """The broker certainly does not have the message: it could not be reached."""


class SendUnknownError(SendError):
    """The broker was asked to take the message, but its answer was lost.

    Attributes:
        message: what was being sent. It keeps its id, so `topic.send(error.message)` is safe:
            should the first attempt have arrived after all, the second is recognised.
    """

    def __init__(self, text: str, message: Message[Any]) -> None:
        super().__init__(text)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.message)


class QueueError(WatchTasksError):
    """A queue that cannot be read or written."""


class QueueClosedError(QueueError):
    """The queue was closed in this program."""


class QueueUnavailableError(QueueError):
    """The queue's server does not answer; nothing is lost, try again later."""


class StorageError(WatchTasksError):
    """A storage that cannot do what was asked."""


class StorageClosedError(StorageError):
    """The storage was closed in this program."""


class StorageUnavailableError(StorageError):
    """The storage's server does not answer, or refuses to write; try again later."""


class TransactionLostError(StorageUnavailableError):
    """A handler's transaction was lost: what it wrote was stored with what became of its message, or neither was."""


class NotFoundError(WatchTasksError, LookupError):
    """Nothing is kept under that index or id."""


class HandlerTimeoutError(WatchTasksError, TimeoutError):
    """A handler ran past the timeout of its topic."""


class HandlerExitError(WatchTasksError):
    """A handler tried to end the process it runs in; it was counted as a failure instead."""


class HandlerAnswerError(WatchTasksError, TypeError):
    """A batch handler returned what is no answer for the messages it was given; it counts as failed."""


class HandlerTransactionError(WatchTasksError):
    """A handler ended the transaction of `message.connection`, or left one that cannot be committed."""


class DeadLetterError(WatchTasksError):
    """Why a message became a dead letter, where no error of a handler says it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean `x`?" for the nearest known name, or an empty string."""
    from difflib import get_close_matches  # only a mistake should pay for it

    near = get_close_matches(name, list(known), n=1)
    return f", did you mean `{near[0]}`?" if near else ""
