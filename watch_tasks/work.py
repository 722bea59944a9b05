"""A message in hand, and what is written down of it: its progress, its record, its dead letter, its events."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from .message import Message, Once
from .outcome import Busy, Outcome, Reason, Retry, Snoozed
from .record import Attempt, DeadLetter
from .schema import dump
from .storage.protocol import Claim, Commit, Granted, Step
from .storage.stored import encode_letter, encode_rest
from .topics import Topic

__all__ = ["Progress", "Settlement", "Work", "digest_of", "error_text", "shown"]

#: Failed tries that a message carries along: the newest.
_ATTEMPTS: Final = 100
#: Characters of an error's text that are kept.
_ERROR: Final = 2000


class Progress(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a message carries from try to try, kept by the storage."""

    retries: int = 0
    handled: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()

    def join(self, stored: bytes | None) -> Progress:
        """Join what a copy carries with what the storage kept; after a stop without storage the copy carries more."""
        if not stored:
            return self
        kept = msgspec.json.decode(stored, type=Progress)
        more = tuple(name for name in self.handled if name not in kept.handled)
        return Progress(max(kept.retries, self.retries), kept.handled + more, kept.attempts)


class _Note(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What the story of an index tells of an event."""

    id: str
    copy: int
    retries: int | None = None
    handler: str | None = None
    seconds: float | None = None
    error: str | None = None
    worker: str | None = None


_encode: Final = msgspec.json.Encoder().encode


class Work(msgspec.Struct, eq=False):
    """A message in hand: decoded, and claimed unless its once-rule is "none"."""

    topic: Topic[Any]
    #: As it came, with its index, and with the copy it is handled as.
    received: Message[Any]
    #: Its decoded data.
    data: Any
    #: Its data as canonical JSON, and the digest of that.
    plain: bytes
    digest: str
    #: Name of the worker that has it.
    worker: str
    progress: Progress
    #: None: unclaimed.
    token: int | None = None
    crashes: int = 0
    #: The storage's clock when it was claimed, and ours.
    claimed_at: float = msgspec.field(default_factory=time.time)
    started: float = msgspec.field(default_factory=time.monotonic)

    @classmethod
    def read(cls, topic: Topic[Any], message: Message[Any], worker: str, plain: bytes | None = None) -> Work:
        """Decode a message; find its index where nobody named it.

        Args:
            topic: its topic.
            message: the message.
            worker: name of the worker that has it.
            plain: its data as canonical JSON, where that is at hand.

        Raises:
            SchemaError: its data does not fit, or has no JSON form.
            MessageError: its index cannot be found, or its once-rule does not suit the topic.
        """
        topic.check_once(message.once)
        plain = dump(message.data) if plain is None else plain
        data = topic.decode(message.data)
        if message.index == message.id and (named := topic.index_of(data)):  # nobody named it before
            message = replace(message, index=named)
        # Taken once: the claim, the commit and the record all carry it, and a payload may be large.
        digest = digest_of(plain)
        return cls(topic, message, data, plain, digest, worker, Progress(message.retries, message.handled))

    @property
    def once(self) -> Once:
        return self.received.once or self.topic.once

    @property
    def is_claimable_ahead(self) -> bool:
        """Whether it may be claimed some time before its handlers start.

        Not what came back, by a retry or a replay: it may be what killed its worker. Nor where handlers commit by
        themselves, in their transaction; nor what a batch handler gets, whose calls are claimed as a whole.
        """
        is_plain = not self.topic.transactional and self.topic.batch is None
        return self.received.copy == 0 and self.once != "none" and is_plain

    @property
    def max_retries(self) -> int | None:
        limit = self.received.max_retries
        return self.topic.retry.max_retries if limit is None else limit

    def now(self) -> datetime:
        """The time by the storage's clock, without asking it."""
        return datetime.fromtimestamp(self.claimed_at, UTC) + timedelta(seconds=time.monotonic() - self.started)

    def claim(self, lease: float, nonce: str, started: bool = True) -> Claim:
        """Return the claim on it."""
        message = self.received
        return Claim(
            topic=message.topic,
            index=message.index,
            id=message.id,
            copy=message.copy,
            once=self.once,
            worker=self.worker,
            lease=lease,
            digest=self.digest,
            retention=self.topic.retention,
            sent_at=message.sent_at.timestamp(),
            nonce=nonce,
            started=started,
            note=self.note(retries=message.retries, worker=self.worker),
        )

    def grant(self, granted: Granted) -> None:
        """Take what the storage granted."""
        self.token, self.crashes, self.claimed_at = granted.token, granted.crashes, granted.now
        self.started = time.monotonic()
        if granted.copy != self.received.copy:
            self.received = replace(self.received, copy=granted.copy)
        self.progress = self.progress.join(granted.progress)

    def for_handler(self, name: str, deadline: datetime | None, connection: Any = None) -> Message[Any]:
        """Return the message as a handler gets it."""
        message, progress = self.received, self.progress
        return message.for_attempt(
            self.data, progress.retries, progress.handled, deadline, self.token, f"{message.id}:{name}", connection
        )

    def finished(self, handler: str) -> None:
        """Note that a handler finished."""
        before = self.progress
        self.progress = Progress(before.retries, (*before.handled, handler), before.attempts)

    def failed(self, handler: str, error: BaseException, seconds: float) -> None:
        """Note that a handler failed."""
        attempt = Attempt(at=self.now(), handler=handler, error=error_text(error), seconds=seconds)
        attempts = (*self.progress.attempts, attempt)[-_ATTEMPTS:]
        self.progress = msgspec.structs.replace(self.progress, attempts=attempts)

    def retried(self) -> None:
        """Note that it is tried again."""
        self.progress = msgspec.structs.replace(self.progress, retries=self.progress.retries + 1)

    def carrier(self) -> Message[Any]:
        """Return the next copy, which carries everything known."""
        return self.received.next_copy(retries=self.progress.retries, handled=self.progress.handled)

    def commit(self, step: Step, blob: bytes | None = None, notes: Sequence[tuple[str, bytes]] = ()) -> Commit:
        """Return the commit that makes this of it; what is kept is its progress unless other bytes are given."""
        message = self.received
        return Commit(
            step=step,
            topic=message.topic,
            index=message.index,
            id=message.id,
            copy=message.copy,
            token=self.token,
            blob=_encode(self.progress) if blob is None else blob,
            digest=self.digest if step is Step.HANDLED else "",
            retention=self.topic.retention,
            notes=tuple(notes),
        )

    def note(
        self,
        *,
        retries: int | None = None,
        handler: str | None = None,
        seconds: float | None = None,
        error: str | None = None,
        worker: str | None = None,
    ) -> bytes:
        """Return an event's details as JSON, without those that say nothing."""
        message = self.received
        return _encode(_Note(message.id, message.copy, retries, handler, seconds, error, worker))

    def record(self, seconds: float) -> bytes:
        """Return what a storage keeps of it as handled, beside what the commit says."""
        message = self.received
        data = self.plain if self.topic.keep_data else None
        return encode_rest(self.progress.retries, self.max_retries, message.sent_at, seconds, self.worker, data)

    def letter(self, reason: Reason, error: BaseException, handler: str | None) -> bytes:
        """Return its dead letter."""
        message = self.received
        return encode_letter(
            DeadLetter(
                id=message.id,
                topic=message.topic,
                index=message.index,
                reason=reason,
                error=error_text(error),
                handler=handler,
                retries=self.progress.retries,
                max_retries=self.max_retries,
                crashes=self.crashes,
                attempts=self.progress.attempts,
                handled=self.progress.handled,
                data=msgspec.Raw(self.plain),
                content_type="application/json",
                once=message.once,
                sent_at=message.sent_at,
                copy=message.copy,
            )
        )


class Settlement(msgspec.Struct, frozen=True):
    """How a message ended: what to store, the outcome once that is stored, and what carries it if it cannot be."""

    commit: Commit
    outcome: Outcome
    #: What makes the copy that carries everything known, for a worker that must stop while the storage is away.
    carrier: Callable[[], Message[Any]] | None = None
    #: Whether the commit needs storing no more: a transaction did it.
    is_stored: bool = False

    def unsettled(self) -> Outcome:
        """Return what a driver does where this could not be stored before it must stop."""
        if self.is_stored:
            return self.outcome
        if self.carrier is None:
            return Busy(0.0)
        if isinstance(self.outcome, Retry):
            return self.outcome
        return Snoozed(0.0, self.carrier())


def digest_of(plain: bytes) -> str:
    """Return the digest of data as canonical JSON, by which a repetition under an index is told from other data."""
    return hashlib.blake2b(plain, digest_size=16).hexdigest()


def error_text(error: BaseException | str) -> str:
    """Return an error as `Type: text`, cut to 2,000 characters, and always writable as UTF-8."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {_told(str, error)}"
    return _writable(text[:_ERROR])


def shown(data: Any) -> str:
    """Return the `repr` of data that has no JSON form, always writable as UTF-8."""
    return _writable(_told(repr, data))


def _told(tell: Callable[[Any], str], value: Any) -> str:
    try:
        return tell(value)
    except Exception as exc:  # noqa: BLE001 - a broken __str__ must not change what becomes of the message
        return f"<its text raised {type(exc).__name__}>"


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
