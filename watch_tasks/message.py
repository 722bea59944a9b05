"""The message: one unit to handle."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from types import BuiltinMethodType
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, runtime_checkable

import msgspec
from msgspec.structs import force_setattr, replace

from .errors import MessageError

__all__ = ["MAX_INDEX", "Indexer", "Message", "Once", "check_index", "index_of", "new_id"]

T = TypeVar("T")

#: When a message counts as handled already: see the once-rules in the README.
Once = Literal["message", "index", "none"]

#: Characters an index may have at most.
MAX_INDEX: Final = 512

#: What a message may count to, its copies and its retries: storages keep them as numbers of 32 bits, or as floats.
_MOST_COUNT: Final = 1_000_000_000


@runtime_checkable
class Indexer(Protocol):
    """Data that knows the name of the business thing it is about."""

    def index(self) -> str:
        """Return that name: 1 to 512 printable characters."""


def new_id() -> str:
    """Return a fresh message id, in the form of a Celery task id."""
    return str(uuid.uuid4())


def check_index(index: object) -> str:
    """Return the index unchanged.

    Raises:
        MessageError: it is not 1 to 512 printable characters.
    """
    if isinstance(index, str) and 0 < len(index) <= MAX_INDEX and index.isprintable():
        return index
    if isinstance(index, str) and len(index) > MAX_INDEX:
        came = f"{len(index)} characters"
    else:
        came = f"{index!r} ({type(index).__name__})"
    raise MessageError(f"an index must be 1 to {MAX_INDEX} printable characters, got {came}")


def index_of(data: object) -> str | None:
    """Return what an Indexer says, or None for data that is none.

    Builtins are never asked, nor what inherits their `index`: a list has one too, and so has a named tuple.
    """
    index = getattr(data, "index", None)
    return check_index(index()) if callable(index) and not isinstance(index, BuiltinMethodType) else None


class _Positional(msgspec.Struct, Generic[T], frozen=True):
    #: What the handlers work on; its shape is the topic's schema.
    data: T
    #: The kind of message: the name of a `Topic`.
    topic: str = ""


class Message(_Positional[T], frozen=True, kw_only=True):
    """One unit to handle. Immutable, so that threads may share it.

    Raises:
        MessageError: the index, the once-rule or a number is out of its range.
    """

    #: The business thing it is about. Unset: what the data says as an Indexer, else the id.
    index: str = ""
    #: Its own name, the same over all retries: the Celery task id. Unset: a fresh one.
    id: str = ""
    #: Retries so far.
    retries: int = 0
    #: This message's own limit; None: the topic's policy.
    max_retries: int | None = None
    #: This message's own once-rule; None: the topic's.
    once: Once | None = None
    #: Names of the handlers that finished; a retry resumes after them.
    handled: tuple[str, ...] = ()
    #: When it was made, by the sender's clock.
    sent_at: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))
    #: Number of this copy: a retry, a snooze and a replay travel as the next one.
    copy: int = 0
    #: End of this attempt, while it is handled. Not on the wire.
    deadline: datetime | None = None
    #: While it is handled: a number that grows with each takeover, to fence writes elsewhere. Not on the wire.
    token: int | None = None
    #: While it is handled: names the message and the handler, the same over retries. Not on the wire.
    idempotency_key: str = ""
    #: While a handler of a topic with `transactional=True` runs: the `sqlalchemy.Connection` in whose transaction its
    #: message is recorded. Not on the wire.
    connection: Any = None

    def __post_init__(self) -> None:
        if not self.id:
            force_setattr(self, "id", new_id())
        index = self.index
        if not index:
            index = index_of(self.data) or self.id
            force_setattr(self, "index", index)
        check_index(index)
        if self.retries != 0:
            _check_count("retries", self.retries)
        if self.copy != 0:
            _check_count("copy", self.copy)
        if self.max_retries is not None:
            _check_count("max_retries", self.max_retries)
        if self.once is not None and self.once not in ("message", "index", "none"):
            raise MessageError(f'`once` must be "message", "index" or "none", got {self.once!r}')

    def for_attempt(
        self,
        data: T,
        retries: int,
        handled: tuple[str, ...],
        deadline: datetime | None,
        token: int | None,
        idempotency_key: str,
        connection: Any,
    ) -> Message[T]:
        """Return the message with these fields set, unchecked: for what a worker knows of an attempt."""
        untyped: Any = self  # structs copy themselves, which their types do not say
        made: Message[T] = untyped.__copy__()
        force_setattr(made, "data", data)
        force_setattr(made, "token", token)
        force_setattr(made, "idempotency_key", idempotency_key)
        # The others mostly say already what they should.
        if retries != self.retries:
            force_setattr(made, "retries", retries)
        if handled != self.handled:
            force_setattr(made, "handled", handled)
        if deadline is not self.deadline:
            force_setattr(made, "deadline", deadline)
        if connection is not self.connection:
            force_setattr(made, "connection", connection)
        return made

    def next_copy(self, *, retries: int, handled: tuple[str, ...]) -> Message[T]:
        """Return the copy by which a retry, a snooze or a replay travels on."""
        return replace(
            self,
            copy=self.copy + 1,
            retries=retries,
            handled=handled,
            deadline=None,
            token=None,
            idempotency_key="",
            connection=None,
        )


def _check_count(name: str, value: object) -> None:
    if value.__class__ is not int or not 0 <= value <= _MOST_COUNT:
        raise MessageError(f"`{name}` must be a whole number, 0 to {_MOST_COUNT}, got {value!r}"[:500])
