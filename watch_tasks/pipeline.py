"""The one path a message takes: decode → claim → handlers → commit. It ends in an Outcome; a driver acts on it.

Knows neither Celery nor any queue. The Watcher and the Celery worker drive it; neither decides anything itself.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import msgspec

from . import points
from .company import Company
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
from .record import DeadLetter
from .storage.base import Storage, encode_letter
from .storage.protocol import Commit, Granted, Refusal, Refused, Step
from .topics import WEEK, Topic
from .work import Settlement, Work, error_text, shown

__all__ = ["Pipeline"]

logger = logging.getLogger(__name__)

R = TypeVar("R")
_Notes = list[tuple[str, bytes]]

#: Seconds between two tries to reach a storage that is away: the first, doubled up to the last.
_PAUSES: Final = (0.05, 2.0)
#: Seconds after which a message of an unknown topic is looked at again, at most.
_UNKNOWN_PAUSE: Final = 5.0
#: Seconds that a last try waits at most for the others in its process, and until it is asked for again.
_ALONE: Final = 10.0
#: Unknown messages whose first sight is remembered.
_UNKNOWN_KEPT: Final = 10_000


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
        lease: float = 6.0,
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
        self._company = Company()

    # -- the path

    def handle(self, message: Message[Any]) -> Outcome:
        """Take one message all the way. Its data is in plain form, or of its schema's type."""
        return self.handle_many((message,))[0]

    def handle_many(self, messages: Sequence[Message[Any]]) -> list[Outcome]:
        """Take several all the way: claimed in one round trip, handled in order, settled in one round trip.

        The last try of a message that took workers down runs alone in its process, so that nobody else dies of it.
        """
        with self._company:
            begun = self.begin(messages)
            works = {number: work for number, work in enumerate(begun) if isinstance(work, Work)}
            last = [number for number, work in works.items() if 0 < work.crashes == self._max_crashes - 1]
            if len(works) == len(last) == 1 and self._company.stay_alone():
                last = []
            settlements = {
                # Let go of meanwhile: a message that waits for its turn must not count as one that was started.
                number: Settlement(work.commit(Step.RELEASED), Busy(0.0)) if number in last else self.run(work)
                for number, work in works.items()
            }
            settled = dict(zip(settlements, self.settle(list(settlements.values())), strict=True))
        for number in last:
            settled[number] = self._handle_alone(messages[number])
        return [work if isinstance(work, Outcome) else settled[number] for number, work in enumerate(begun)]

    def _handle_alone(self, message: Message[Any]) -> Outcome:
        if not self._company.enter_alone(_ALONE):
            return Busy(_ALONE)
        try:
            (work,) = self.begin((message,))
            return work if isinstance(work, Outcome) else self.settle([self.run(work)])[0]
        finally:
            self._company.__exit__()

    def begin(self, messages: Sequence[Message[Any]]) -> list[Work | Outcome]:
        """Decode and claim. A message that is not to be handled has its Outcome, stored."""
        found = [self._read(message) for message in messages]
        asked = [work for work in found if isinstance(work, Work) and work.once != "none"]
        claims = [work.claim(self._lease, f"{os.getpid()}.{next(self._nonces)}") for work in asked]
        try:
            answers = self._patiently(lambda: self.storage.claim_many(claims))
        except StorageUnavailableError:
            # Asked to stop: nothing is handled without a claim, so the same copies go back.
            return [Busy(0.0) if isinstance(work, Work) else work for work in found]
        answered = {id(work): self._answer(work, answer) for work, answer in zip(asked, answers, strict=True)}
        return [answered.get(id(work), work) for work in found]

    def run(self, work: Work) -> Settlement:
        """Run the handlers that have not finished yet, and decide. Nothing is settled until `settle`."""
        clock = time.monotonic()
        timeout = work.topic.timeout
        deadline = None if timeout is None else work.now() + timedelta(seconds=timeout)
        left = [handler for handler in work.topic.handlers if handler.name not in work.progress.handled]
        notes: _Notes = []
        for number, handler in enumerate(left):
            begun = time.monotonic()
            seconds = None if timeout is None else max(timeout - (begun - clock), 0.0)
            message = work.for_handler(handler.name, deadline)
            points.reach("in_handler")
            try:
                run_handler(handler, message, seconds, interrupts=self._interrupts, kill_after=self._kill_after)
            except Exception as exc:  # noqa: BLE001 - whatever a handler raises is decided on here
                return self._failed(work, handler.name, exc, time.monotonic() - begun, notes)
            except BaseException:
                # Where nobody stops the worker, its handler brought this upon its process: that counts as a crash.
                if self._stopping():
                    self._give_back(work)
                raise
            points.reach("after_effect")
            work.finished(handler.name)
            notes.append(("handler", work.note(handler=handler.name, seconds=time.monotonic() - begun)))
            if number + 1 < len(left):
                cut_short = self._mark(work, notes)
                if cut_short:
                    return cut_short
                notes.clear()
        spent = time.monotonic() - clock
        notes.append(("handled", work.note(retries=work.progress.retries, seconds=spent, worker=self.worker)))
        commit = work.commit(Step.HANDLED, work.record(spent), notes)
        return Settlement(commit, Handled(spent), work.carrier())

    def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Store what became of messages in one round trip; only then it counts.

        While the storage is away this waits. Asked to stop meanwhile, it returns outcomes by which the driver
        publishes copies that carry everything known.
        """
        commits = [settlement.commit for settlement in settlements]
        try:
            accepted = self._patiently(lambda: self.storage.commit_many(commits))
        except StorageUnavailableError:
            return [settlement.unsettled() for settlement in settlements]
        points.reach("after_commit")
        outcomes = []
        for settlement, is_accepted in zip(settlements, accepted, strict=True):
            outcomes.append(settlement.outcome if is_accepted else Fenced())
            _log(settlement.commit, outcomes[-1])
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
        """Make a dead letter of a message that was never claimed, once for each id. Waits for the storage.

        The keywords are the fields of a `DeadLetter`, as far as they are known.
        """
        letter = DeadLetter(
            id=id,
            topic=topic,
            index=index,
            reason=reason,
            error=error_text(error),
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
            blob = encode_letter(letter)
        except SchemaError:
            blob = encode_letter(msgspec.structs.replace(letter, data=None, raw=raw or shown(data).encode()))
        note = {"id": id, "copy": copy, "error": letter.error, "worker": self.worker}
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
            notes=(("dead", msgspec.json.encode(note)),),
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
        self._unknown.pop(id, None)
        return bury(
            f"no worker knows topic `{topic}`: load the module that defines it "
            "(`imports` in celeryconfig.py, or -I MODULE), then send the message again"
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
            return Work.read(topic, message, self.worker)
        except SchemaError as exc:
            return self._bury_message(message, Reason.UNDECODABLE, exc)
        except MessageError as exc:
            return self._bury_message(message, Reason.MALFORMED, exc)

    def _answer(self, work: Work, answer: Granted | Refused) -> Work | Outcome:
        if isinstance(answer, Granted):
            work.grant(answer)
            points.reach("after_claim")
            if work.crashes < self._max_crashes:
                return work
            error = DeadLetterError(f"its handler took the worker down {work.crashes} times")
            return self.settle([self._dead(work, Reason.KILLED_WORKER, error)])[0]
        match answer.why:
            case Refusal.BUSY:
                return Busy(answer.seconds)
            case Refusal.CONFLICT:
                index, topic = work.received.index, work.topic.name
                error = DeadLetterError(f"index `{index}` of topic `{topic}` was handled with other data")
                return self._bury_message(work.received, Reason.INDEX_CONFLICT, error)
            case _:
                return Duplicate()

    def _failed(self, work: Work, handler: str, error: Exception, seconds: float, notes: _Notes) -> Settlement:
        if isinstance(error, Snooze):
            notes.append(("snoozed", work.note(handler=handler, seconds=error.seconds)))
            return self._later(work, Step.SNOOZED, error.seconds, Snoozed(error.seconds, work.carrier()), notes)
        work.failed(handler, error, seconds)
        if isinstance(error, Discard):
            return self._dead(work, Reason.DISCARDED, error, handler, notes)
        policy = work.topic.retry
        delay = policy.decide(error, work.progress.retries, work.received.max_retries)
        if delay is None:
            reason = Reason.EXHAUSTED if policy.is_retryable(error) else Reason.FATAL
            return self._dead(work, reason, error, handler, notes)
        told = work.note(handler=handler, seconds=seconds, error=error_text(error), worker=self.worker)
        notes.append(("retry", told))
        work.retried()
        return self._later(work, Step.RETRY, delay, Retry(delay, work.carrier(), error), notes)

    def _later(self, work: Work, step: Step, delay: float, outcome: Retry | Snoozed, notes: _Notes) -> Settlement:
        return Settlement(replace(work.commit(step, notes=notes), delay=delay), outcome, outcome.message)

    def _dead(
        self, work: Work, reason: Reason, error: Exception, handler: str | None = None, notes: _Notes | None = None
    ) -> Settlement:
        told = work.note(handler=handler, error=error_text(error), worker=self.worker)
        commit = work.commit(Step.DEAD, work.letter(reason, error, handler), [*(notes or ()), ("dead", told)])
        return Settlement(commit, Dead(reason, error), work.carrier())

    def _mark(self, work: Work, notes: _Notes) -> Settlement | None:
        """Store that a handler finished, before the next one starts; a Settlement means: do not go on."""
        if work.token is None:
            return None
        commit = work.commit(Step.MARK, notes=notes)
        try:
            if self._patiently(lambda: self.storage.commit(commit)):
                return None
        except StorageUnavailableError:
            return Settlement(replace(commit, step=Step.RELEASED), Busy(0.0), work.carrier())
        # Taken over: settling it again is refused again, and ends as Fenced.
        return Settlement(commit, Fenced())

    def _give_back(self, work: Work) -> None:
        """End a claim at no cost, because the process is being ended; if that fails its lease will end it."""
        if work.token is not None:
            try:
                self.storage.commit(work.commit(Step.RELEASED))
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


def _log(commit: Commit, outcome: Outcome) -> None:
    action = type(outcome).__name__.lower()
    extra = {"action": action, "topic": commit.topic, "message_id": commit.id, "index": commit.index}
    match outcome:
        case Dead(reason, error):
            # `%r`: what comes from outside may hold line breaks, and a log line must not be forged by it.
            text = "dead (%s): topic=%r index=%r id=%r error=%r"
            # A handler's own verdict is no error.
            level = logging.INFO if reason is Reason.DISCARDED else logging.ERROR
            told = None if error is None else error_text(error)
            logger.log(level, text, reason, commit.topic, commit.index, commit.id, told, extra=extra)
        case Retry(delay, _, error):
            text = "retry in %.3g s: topic=%r index=%r id=%r error=%r"
            logger.info(text, delay, commit.topic, commit.index, commit.id, error_text(error), extra=extra)
        case _:
            text = "%s: topic=%r index=%r id=%r"
            logger.info(text, action, commit.topic, commit.index, commit.id, extra=extra)
