"""The one path a message takes: decode → claim → handlers → commit. It ends in an Outcome; a driver acts on it.

Knows neither Celery nor any queue. The Watcher and the Celery worker drive it; neither decides anything itself.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import msgspec

from .errors import DeadLetterError, MessageError, SchemaError, StorageUnavailableError
from .handlers import Interrupts, run_handler
from .message import Message, Once
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
from .record import Attempt, DeadLetter, Record
from .schema import dump
from .storage.base import Storage, encode
from .storage.protocol import Claim, Commit, Granted, Refusal, Refused, Step
from .topics import WEEK, Topic

__all__ = ["Pipeline", "Work"]

logger = logging.getLogger(__name__)

R = TypeVar("R")

#: Failed tries that a message carries along: the newest.
_ATTEMPTS: Final = 100
#: Characters of an error's text that are kept.
_ERROR: Final = 2000
#: Seconds between two tries to reach a storage that is away: the first, doubled up to the last.
_PAUSES: Final = (0.05, 2.0)
#: Seconds after which a message of an unknown topic is looked at again.
_UNKNOWN_PAUSE: Final = 5.0
#: Unknown messages whose first sight is remembered.
_UNKNOWN_KEPT: Final = 10_000


class _Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a message carries from try to try, kept by the storage."""

    retries: int = 0
    handled: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()


@dataclass(slots=True)
class Work:
    """A message in hand: decoded and claimed."""

    topic: Topic[Any]
    #: As it came, with the copy it is handled as.
    received: Message[Any]
    #: Its decoded data.
    data: Any
    #: Its data as canonical JSON, and the digest of that.
    plain: bytes
    digest: str
    #: None: unclaimed, under the rule "none".
    token: int | None
    crashes: int
    progress: _Progress
    #: The storage's clock when it was claimed, and ours.
    claimed_at: float
    started: float = field(default_factory=time.monotonic)

    @property
    def max_retries(self) -> int | None:
        limit = self.received.max_retries
        return self.topic.retry.max_retries if limit is None else limit

    def now(self) -> datetime:
        """The time by the storage's clock, without asking it."""
        return datetime.fromtimestamp(self.claimed_at, UTC) + timedelta(seconds=time.monotonic() - self.started)


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a message in hand ended: what to store, the outcome once that is stored, and what if it cannot be."""

    commit: Commit
    outcome: Outcome
    #: The copy that carries everything known, for a worker that must stop while the storage is away.
    carrier: Message[Any] | None = None


class Pipeline:
    """Decides what becomes of messages. Safe to call from several threads.

    Args:
        storage: remembers.
        find: the topic of a name, or None.
        worker: who claims; unique to one worker process and its children.
        lease: seconds that a claim holds; whoever drives renews it (see `leases.py`).
        max_crashes: how often a handler may take its worker down before the message is dead.
        unknown_grace: seconds that a message of an unknown topic is put back, for a deploy under way.
        stopping: whether the worker is asked to stop; ends the waiting for a storage that is away.
        pause: waits for some seconds.
        interrupts: the exceptions by which the driver ends its process while a handler runs.
        kill_after: see `run_handler`.
    """

    def __init__(
        self,
        storage: Storage,
        find: Callable[[str], Topic[Any] | None],
        *,
        worker: str,
        lease: float = 8.0,
        max_crashes: int = 3,
        unknown_grace: float = 60.0,
        stopping: Callable[[], bool] = lambda: False,
        pause: Callable[[float], object] = time.sleep,
        interrupts: Interrupts = lambda error: False,
        kill_after: float | None = None,
    ) -> None:
        self.storage = storage
        self.worker = worker
        self._find = find
        self._lease = lease
        self._max_crashes = max_crashes
        self._unknown_grace = unknown_grace
        self._stopping = stopping
        self._pause = pause
        self._interrupts = interrupts
        self._kill_after = kill_after
        self._nonces = itertools.count()
        self._unknown: OrderedDict[str, float] = OrderedDict()

    # -- the path

    def handle(self, message: Message[Any]) -> Outcome:
        """Take one message all the way. Its data is in plain form, or of its schema's type."""
        return self.handle_many((message,))[0]

    def handle_many(self, messages: Sequence[Message[Any]]) -> list[Outcome]:
        """Take several all the way: claimed in one round trip, handled in order, settled in one round trip."""
        begun = self.begin(messages)
        settlements = {number: self.run(work) for number, work in enumerate(begun) if isinstance(work, Work)}
        settled = dict(zip(settlements, self.settle(list(settlements.values())), strict=True))
        return [work if isinstance(work, Outcome) else settled[number] for number, work in enumerate(begun)]

    def begin(self, messages: Sequence[Message[Any]]) -> list[Work | Outcome]:
        """Decode and claim. A message that is not to be handled has its Outcome, stored."""
        found: list[Work | Outcome] = [self._read(message) for message in messages]
        asked = [work for work in found if isinstance(work, Work) and _once(work) != "none"]
        try:
            claims = [self._claim(work) for work in asked]
            answers = self._patiently(lambda: self.storage.claim_many(claims))
        except StorageUnavailableError:
            # Asked to stop: nothing is handled without a claim, so the same copies go back.
            return [Busy(0.0) if isinstance(work, Work) else work for work in found]
        granted = {id(work): self._answer(work, answer) for work, answer in zip(asked, answers, strict=True)}
        return [granted.get(id(work), work) for work in found]

    def run(self, work: Work) -> Settlement:
        """Run the handlers that have not finished yet, and decide. Nothing is settled until `settle`."""
        clock = time.monotonic()
        done = work.progress.handled
        left = [handler for handler in work.topic.handlers if handler.name not in done]
        notes: list[tuple[str, bytes]] = []
        timeout = work.topic.timeout
        deadline = None if timeout is None else work.now() + timedelta(seconds=timeout)
        for number, handler in enumerate(left):
            begun = time.monotonic()
            message = replace(
                work.received,
                data=work.data,
                retries=work.progress.retries,
                handled=work.progress.handled,
                deadline=deadline,
                token=work.token,
                idempotency_key=f"{work.received.id}:{handler.name}",
            )
            seconds = None if timeout is None else max(timeout - (begun - clock), 0.0)
            try:
                run_handler(handler, message, seconds, interrupts=self._interrupts, kill_after=self._kill_after)
            except Exception as exc:  # noqa: BLE001 - whatever a handler raises is decided on here
                return self._failed(work, handler.name, exc, time.monotonic() - begun, notes)
            except BaseException:
                self._give_back(work)
                raise
            spent = time.monotonic() - begun
            notes.append(("handler", _note(work, handler=handler.name, seconds=spent)))
            work.progress = msgspec.structs.replace(work.progress, handled=(*work.progress.handled, handler.name))
            if number + 1 < len(left):
                lost = self._mark(work, tuple(notes))
                if lost:
                    return lost
                notes.clear()
        return self._handled(work, time.monotonic() - clock, notes)

    def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Store what became of messages in one round trip; only then it counts.

        While the storage is away this waits. Asked to stop meanwhile, it returns outcomes by which the driver
        publishes copies that carry everything known.
        """
        try:
            commits = [settlement.commit for settlement in settlements]
            accepted = self._patiently(lambda: self.storage.commit_many(commits))
        except StorageUnavailableError:
            return [_unsettled(settlement) for settlement in settlements]
        outcomes = [
            settlement.outcome if yes else Fenced() for settlement, yes in zip(settlements, accepted, strict=True)
        ]
        for settlement, outcome in zip(settlements, outcomes, strict=True):
            _log(settlement.commit, outcome)
        return outcomes

    # -- what never becomes work

    def bury(
        self,
        reason: Reason,
        error: BaseException | str,
        *,
        id: str,
        topic: str | None = None,
        index: str | None = None,
        copy: int = 0,
        raw: bytes | None = None,
        data: Any = None,
        content_type: str | None = None,
        max_retries: int | None = None,
        once: Once | None = None,
        retries: int = 0,
        crashes: int = 0,
        sent_at: datetime | None = None,
    ) -> Outcome:
        """Make a dead letter of a message that was never claimed, once for each id. Waits for the storage."""
        letter = DeadLetter(
            id=id,
            topic=topic,
            index=index,
            reason=reason,
            error=_text(error),
            retries=retries,
            max_retries=max_retries,
            crashes=crashes,
            data=data,
            raw=raw,
            content_type=content_type,
            once=once,
            sent_at=sent_at,
            copy=copy,
        )
        try:
            blob = encode(letter)
        except SchemaError:
            blob = encode(msgspec.structs.replace(letter, data=None, raw=raw or repr(data).encode()))
        note = msgspec.json.encode({"id": id, "copy": copy, "error": _text(error), "worker": self.worker})
        known = self._find(topic) if topic else None
        commit = Commit(
            step=Step.DEAD,
            topic=topic or "",
            index=index,
            id=id,
            copy=copy,
            token=None,
            blob=blob,
            retention=known.retention if known else WEEK,
            notes=(("dead", note),),
        )
        cause = error if isinstance(error, BaseException) else DeadLetterError(error)
        return self.settle([Settlement(commit, Dead(reason, cause))])[0]

    def unknown(self, topic: str, id: str, bury: Callable[[str], Outcome]) -> Outcome:
        """Decide on a message whose topic nobody here knows: Busy for the grace period, then `bury(error)`."""
        now = time.monotonic()
        first = self._unknown.setdefault(id, now)
        while len(self._unknown) > _UNKNOWN_KEPT:
            self._unknown.popitem(last=False)
        left = first + self._unknown_grace - now
        if left > 0:
            # Spread, or it would come back in step with the polling of the one worker that does not know it.
            return Busy(min(left, _UNKNOWN_PAUSE * random.uniform(0.5, 1.0)))  # noqa: S311 - no secret
        del self._unknown[id]
        return bury(
            f"no worker knows topic `{topic}`: load the module that defines it "
            f"(`imports` in celeryconfig.py, or -I MODULE), then replay this letter"
        )

    # -- steps

    def _read(self, message: Message[Any]) -> Work | Outcome:
        topic = self._find(message.topic)
        if topic is None or not topic.handlers:
            return self.unknown(
                message.topic,
                message.id,
                lambda error: self._bury_message(message, Reason.UNKNOWN_TOPIC, error),
            )
        try:
            plain = dump(message.data)
            data = topic.decode(message.data)
        except MessageError as exc:
            return self._bury_message(message, Reason.UNDECODABLE, exc)
        if message.index == message.id:  # nobody named it
            try:
                message = replace(message, index=topic.index_of(data) or message.id)
            except MessageError as exc:
                return self._bury_message(message, Reason.MALFORMED, exc)
        return Work(
            topic=topic,
            received=message,
            data=data,
            plain=plain,
            digest=hashlib.blake2b(plain, digest_size=16).hexdigest(),
            token=None,
            crashes=0,
            progress=_Progress(message.retries, message.handled),
            claimed_at=time.time(),
        )

    def _claim(self, work: Work) -> Claim:
        message = work.received
        return Claim(
            topic=message.topic,
            index=message.index,
            id=message.id,
            copy=message.copy,
            once=_once(work),
            worker=self.worker,
            lease=self._lease,
            digest=work.digest,
            retention=work.topic.retention,
            sent_at=message.sent_at.timestamp(),
            nonce=f"{os.getpid()}.{next(self._nonces)}",
            note=_note(work, retries=message.retries, worker=self.worker),
        )

    def _answer(self, work: Work, answer: Granted | Refused) -> Work | Outcome:
        if isinstance(answer, Refused):
            match answer.why:
                case Refusal.BUSY:
                    return Busy(answer.seconds)
                case Refusal.CONFLICT:
                    return self._bury_message(
                        work.received,
                        Reason.INDEX_CONFLICT,
                        f"index `{work.received.index}` of topic `{work.topic.name}` was handled with other data",
                    )
                case _:
                    return Duplicate()
        work.token, work.crashes, work.claimed_at = answer.token, answer.crashes, answer.now
        work.received = replace(work.received, copy=answer.copy)
        work.progress = _merge(work.progress, answer.progress)
        if answer.crashes >= self._max_crashes:
            error = DeadLetterError(f"its handler took the worker down {answer.crashes} times")
            return self.settle([self._dead(work, Reason.KILLED_WORKER, error, None, ())])[0]
        return work

    def _handled(self, work: Work, seconds: float, notes: list[tuple[str, bytes]]) -> Settlement:
        message = work.received
        record = Record(
            topic=message.topic,
            index=message.index,
            id=message.id,
            retries=work.progress.retries,
            max_retries=work.max_retries,
            sent_at=message.sent_at,
            seconds=seconds,
            worker=self.worker,
            digest=work.digest,
            data=msgspec.Raw(work.plain) if work.topic.keep_data else None,
        )
        note = _note(work, retries=work.progress.retries, seconds=seconds, worker=self.worker)
        commit = self._commit(work, Step.HANDLED, encode(record), (*notes, ("handled", note)))
        return Settlement(replace(commit, digest=work.digest), Handled(seconds), self._carrier(work))

    def _failed(
        self, work: Work, handler: str, error: Exception, seconds: float, notes: list[tuple[str, bytes]]
    ) -> Settlement:
        if isinstance(error, Snooze):
            message = self._carrier(work)
            note = _note(work, handler=handler, seconds=error.seconds)
            commit = self._commit(work, Step.SNOOZED, self._progress(work), (*notes, ("snoozed", note)))
            return Settlement(replace(commit, delay=error.seconds), Snoozed(error.seconds, message), message)
        attempt = Attempt(at=work.now(), handler=handler, error=_text(error), seconds=seconds)
        work.progress = msgspec.structs.replace(work.progress, attempts=(*work.progress.attempts, attempt)[-_ATTEMPTS:])
        if isinstance(error, Discard):
            return self._dead(work, Reason.DISCARDED, error, handler, notes)
        policy = work.topic.retry
        delay = policy.decide(error, work.progress.retries, work.received.max_retries)
        if delay is None:
            reason = Reason.EXHAUSTED if policy.is_retryable(error) else Reason.FATAL
            return self._dead(work, reason, error, handler, notes)
        note = _note(work, handler=handler, seconds=seconds, error=_text(error), worker=self.worker)
        work.progress = msgspec.structs.replace(work.progress, retries=work.progress.retries + 1)
        message = self._carrier(work)
        commit = self._commit(work, Step.RETRY, self._progress(work), (*notes, ("retry", note)))
        return Settlement(replace(commit, delay=delay), Retry(delay, message, error), message)

    def _dead(
        self,
        work: Work,
        reason: Reason,
        error: Exception,
        handler: str | None,
        notes: Sequence[tuple[str, bytes]],
    ) -> Settlement:
        message = work.received
        letter = DeadLetter(
            id=message.id,
            topic=message.topic,
            index=message.index,
            reason=reason,
            error=_text(error),
            handler=handler,
            retries=work.progress.retries,
            max_retries=work.max_retries,
            crashes=work.crashes,
            attempts=work.progress.attempts,
            handled=work.progress.handled,
            data=msgspec.Raw(work.plain),
            content_type="application/json",
            once=message.once,
            sent_at=message.sent_at,
            copy=message.copy,
        )
        note = _note(work, handler=handler, error=_text(error), worker=self.worker)
        commit = self._commit(work, Step.DEAD, encode(letter), (*notes, ("dead", note)))
        return Settlement(commit, Dead(reason, error), self._carrier(work))

    def _mark(self, work: Work, notes: tuple[tuple[str, bytes], ...]) -> Settlement | None:
        """Store that a handler finished, before the next one starts; a Settlement means: do not go on."""
        if work.token is None:
            return None
        commit = self._commit(work, Step.MARK, self._progress(work), notes)
        try:
            if self._patiently(lambda: self.storage.commit(commit)):
                return None
        except StorageUnavailableError:
            return Settlement(replace(commit, step=Step.RELEASED), Busy(0.0), self._carrier(work))
        # Taken over: settling it again is refused again, and ends as Fenced.
        return Settlement(commit, Fenced())

    def _give_back(self, work: Work) -> None:
        """End a claim at no cost, because the process is being ended; if that fails its lease will end it."""
        if work.token is not None:
            try:
                self.storage.commit(self._commit(work, Step.RELEASED, self._progress(work), ()))
            except StorageUnavailableError as exc:
                logger.warning("could not give message %s back: %s", work.received.id, exc)

    def _bury_message(self, message: Message[Any], reason: Reason, error: BaseException | str) -> Outcome:
        return self.bury(
            reason,
            error,
            id=message.id,
            topic=message.topic,
            index=message.index,
            copy=message.copy,
            data=message.data,
            content_type="application/json",
            max_retries=message.max_retries,
            once=message.once,
            retries=message.retries,
            sent_at=message.sent_at,
        )

    def _commit(self, work: Work, step: Step, blob: bytes, notes: tuple[tuple[str, bytes], ...]) -> Commit:
        message = work.received
        return Commit(
            step=step,
            topic=message.topic,
            index=message.index,
            id=message.id,
            copy=message.copy,
            token=work.token,
            blob=blob,
            retention=work.topic.retention,
            notes=notes,
        )

    def _progress(self, work: Work) -> bytes:
        return msgspec.json.encode(work.progress)

    def _carrier(self, work: Work) -> Message[Any]:
        return work.received.next_copy(retries=work.progress.retries, handled=work.progress.handled)

    def _patiently(self, call: Callable[[], R]) -> R:
        """Call until the storage answers.

        Raises:
            StorageUnavailableError: it does not, and the worker is asked to stop.
        """
        pause, longest = _PAUSES
        while True:
            try:
                return call()
            except StorageUnavailableError as exc:
                if self._stopping():
                    raise
                logger.warning("the storage is away, trying again in %.2g s: %s", pause, exc)
                self._pause(pause)
                pause = min(pause * 2, longest)


def _once(work: Work) -> Once:
    return work.received.once or work.topic.once


def _merge(wire: _Progress, stored: bytes | None) -> _Progress:
    """Join what the storage kept with what the copy carries: it carries more after a stop without storage."""
    if not stored:
        return wire
    kept = msgspec.json.decode(stored, type=_Progress)
    more = tuple(name for name in wire.handled if name not in kept.handled)
    return _Progress(max(kept.retries, wire.retries), kept.handled + more, kept.attempts)


def _unsettled(settlement: Settlement) -> Outcome:
    """What a driver does with an outcome that could not be stored before it must stop."""
    if settlement.carrier is None:
        return Busy(0.0)
    if isinstance(settlement.outcome, Retry):
        return settlement.outcome
    return Snoozed(0.0, settlement.carrier)


def _note(work: Work, **fields: Any) -> bytes:
    """Return an event's details as JSON, without those that say nothing."""
    told = {name: value for name, value in fields.items() if value is not None}
    return msgspec.json.encode({"id": work.received.id, "copy": work.received.copy, **told})


def _text(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {_describe(error)}"
    # Half a surrogate pair has no UTF-8 form.
    return text[:_ERROR].encode("utf-8", "backslashreplace").decode()


def _describe(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as exc:  # noqa: BLE001 - a broken __str__ must not change what becomes of the message
        return f"<its text raised {type(exc).__name__}>"


def _log(commit: Commit, outcome: Outcome) -> None:
    action = type(outcome).__name__.lower()
    extra = {"action": action, "topic": commit.topic, "message_id": commit.id, "index": commit.index}
    match outcome:
        case Dead(reason, error):
            # `%r`: an error's text may hold line breaks, and a log line must not be forged by it.
            text = "dead (%s): topic=%s index=%r id=%s error=%r"
            # A handler's own verdict is no error.
            level = logging.INFO if reason is Reason.DISCARDED else logging.ERROR
            logger.log(level, text, reason, commit.topic, commit.index, commit.id, error, extra=extra)
        case Retry(delay, _, error):
            text = "retry in %.3g s: topic=%s index=%r id=%s error=%r"
            logger.info(text, delay, commit.topic, commit.index, commit.id, error, extra=extra)
        case _:
            text = "%s: topic=%s index=%r id=%s"
            logger.info(text, action, commit.topic, commit.index, commit.id, extra=extra)
