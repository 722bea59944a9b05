"""What becomes of a delivery, and the verdicts by which a handler may choose it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from .seconds import is_seconds

if TYPE_CHECKING:
    from .message import Message

__all__ = [
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
]


class Reason(StrEnum):
    """Why a message is dead."""

    EXHAUSTED = "exhausted"  #: the last allowed try failed
    FATAL = "fatal"  #: an error that no retry can cure
    DISCARDED = "discarded"  #: a handler raised `Discard`
    UNDECODABLE = "undecodable"  #: its bytes cannot be read, or its data does not fit the schema
    MALFORMED = "malformed"  #: readable, but not a message: arguments, headers or index are wrong
    UNKNOWN_TOPIC = "unknown_topic"  #: no worker knows the topic
    TOO_LARGE = "too_large"  #: more bytes than a payload may have
    INDEX_CONFLICT = "index_conflict"  #: other data was handled under the same index
    KILLED_WORKER = "killed_worker"  #: its handler took the worker down too often
    EXPIRED = "expired"  #: its `expires` passed before it was handled
    REVOKED = "revoked"  #: revoked, in Flower for instance


class Outcome:
    """What became of one delivery; one of the classes below."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Handled(Outcome):
    """Every handler returned, and the index is recorded: ack."""

    #: Seconds the handlers of this delivery took.
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Duplicate(Outcome):
    """Done before, or overtaken by a newer copy of itself: ack, nothing was run."""


@dataclass(frozen=True, slots=True)
class Retry(Outcome):
    """A handler failed and may try again: publish `message` after `delay`, then ack."""

    #: Seconds until the next try.
    delay: float
    #: The next copy, to be published.
    message: Message[Any] = field(repr=False)
    error: BaseException = field(compare=False)


@dataclass(frozen=True, slots=True)
class Snoozed(Outcome):
    """A handler asked for a later time, at no cost in retries: publish `message` after `delay`, then ack."""

    delay: float
    message: Message[Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Dead(Outcome):
    """It will not be tried again by itself; kept as a dead letter: ack."""

    reason: Reason
    error: BaseException | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Busy(Outcome):
    """Somebody else handles it, or its index, now: hand the same copy over again later."""

    #: Seconds until the other's lease ends.
    until: float


@dataclass(frozen=True, slots=True)
class Fenced(Outcome):
    """Somebody else took it over in the meantime: publish nothing, ack nothing."""


class Snooze(Exception):
    """Raised by a handler: not now, again in `seconds`, at no cost in retries. The same handler runs again then."""

    def __init__(self, seconds: float) -> None:
        if not is_seconds(seconds):
            raise ValueError(f"`seconds` must be 0 or more, got {seconds!r}")
        super().__init__(seconds)
        self.seconds = float(seconds)


class Discard(Exception):
    """Raised by a handler: this will never work. The message is a dead letter at once, with that reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
