"""What a storage gives back: records, dead letters, and the events of an index's story."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from .message import Once
from .outcome import Reason

__all__ = ["NOT_STORED", "Attempt", "Counters", "DeadLetter", "Event", "Record"]

#: Stands where the storage's clock has not yet put its time.
NOT_STORED = datetime.fromtimestamp(0, UTC)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """That an index was handled."""

    topic: str
    index: str
    #: Id of the message that was handled.
    id: str
    #: Retries it took.
    retries: int = 0
    #: The limit that held for it; None: for ever.
    max_retries: int | None = None
    sent_at: datetime | None = None
    #: By the storage's clock, which sets it.
    handled_at: datetime = NOT_STORED
    #: When it is forgotten, by the same clock, which sets it; None: never.
    expires_at: datetime | None = None
    #: Seconds its handlers took, in the delivery that succeeded.
    seconds: float = 0.0
    #: Name of the worker that handled it.
    worker: str = ""
    #: Hex digest (BLAKE2b, 16 bytes) of the data's canonical JSON.
    digest: str = ""
    #: The data as plain JSON values; None for a topic with `keep_data=False`.
    data: Any = None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One failed try."""

    #: By the storage's clock.
    at: datetime
    handler: str | None
    #: As `Type: text`.
    error: str
    #: Seconds the handler ran.
    seconds: float = 0.0


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that will not be tried again by itself, kept whole."""

    #: The message id, or a hash of the bytes where there is none.
    id: str
    topic: str | None
    index: str | None
    reason: Reason
    #: The last error, as `Type: text`.
    error: str
    #: Name of the handler that failed last.
    handler: str | None = None
    retries: int = 0
    max_retries: int | None = None
    #: How often its handler took the worker down.
    crashes: int = 0
    #: The failed tries, oldest first; at most the newest 100.
    attempts: tuple[Attempt, ...] = ()
    #: Names of the handlers that had finished.
    handled: tuple[str, ...] = ()
    #: The data as plain JSON values, where it could be read.
    data: Any = None
    #: The original bytes, where it could not.
    raw: bytes | None = None
    content_type: str | None = None
    once: Once | None = None
    sent_at: datetime | None = None
    #: By the storage's clock, which sets it.
    dead_at: datetime = NOT_STORED
    #: The copy that died.
    copy: int = 0


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step in the story of an index, as `explain` tells it."""

    #: By the storage's clock.
    at: datetime
    #: sent, suppressed, attempt, handler, retry, snoozed, busy, fenced, handled, dead, replayed, removed.
    event: str
    topic: str
    index: str
    id: str | None = None
    copy: int | None = None
    retries: int | None = None
    handler: str | None = None
    worker: str | None = None
    seconds: float | None = None
    error: str | None = None
    #: Who did it, where no worker did: a command, another message's id.
    by: str | None = None


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a topic's messages came to so far, as `watch-tasks topics` shows."""

    handled: int = 0
    duplicates: int = 0
    retries: int = 0
    #: Dead letters there are now.
    dead: int = 0
