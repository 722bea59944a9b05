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
from datetime import datetime
from typing import Any, Final

import msgspec

from . import points
from .batches import Batches
from .company import Company
from .errors import DeadLetterError, MessageError, SchemaError, StorageUnavailableError
from .handlers import Interrupts
from .joined import Joined
from .message import Message, Once
from .outcome import Busy, Dead, Duplicate, Fenced, Outcome, Reason, Retry
from .patience import Patience
from .record import DeadLetter
from .runner import Runner
from .storage.base import Storage
from .storage.protocol import Claim, Commit, Granted, Refusal, Refused, Step
from .storage.stored import encode_letter
from .topics import WEEK, Topic
from .work import Settlement, Work, error_text, shown

__all__ = ["Pipeline"]

logger = logging.getLogger(__name__)

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
        self._patiently = Patience(stopping, pause)
        self._runner = Runner(storage, worker, self._patiently, stopping, interrupts, kill_after)
        self._batches = Batches(self._runner, storage, self.settle, stopping, interrupts, kill_after)
        # Threads that come at the same time share a round trip.
        self._claims: Joined[Claim, Granted | Refused] = Joined(lambda claims: self.storage.claim_many(claims))
        self._commits: Joined[Commit, bool] = Joined(lambda commits: self.storage.commit_many(commits))
        self._nonces = itertools.count()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        #: Who is at work in this process.
        self.company = Company()

    # -- the path

    def handle(self, message: Message[Any]) -> Outcome:
        """Take one message all the way. Its data is in plain form, or of its schema's type."""
        return self.handle_many((message,))[0]

    def handle_many(self, messages: Sequence[Message[Any]]) -> list[Outcome]:
        """Take several all the way: claimed in one round trip, handled in order, settled in one round trip.

        The last try of a message that took workers down runs alone in its process, so that nobody else dies of it.
        Messages of a topic with a batch handler are claimed, handled and settled in batches of its size, and those of
        them that took a worker down, each by itself.
        """
        batched: dict[str, list[int]] = {}
        for number, message in enumerate(messages):
            topic = self._find(message.topic)
            if topic is not None and topic.batch is not None:
                batched.setdefault(message.topic, []).append(number)
        if batched:
            return self._handle_batched(messages, batched)
        with self.company:
            begun = self.begin(messages)
            works = {number: work for number, work in enumerate(begun) if isinstance(work, Work)}
            last = [number for number, work in works.items() if 0 < work.crashes == self._max_crashes - 1]
            if len(works) == len(last) == 1 and self.company.stay_alone():
                last = []
            settlements = {
                # Let go of meanwhile: a message that waits for its turn must not count as one that was started.
                number: Settlement(work.commit(Step.RELEASED), Busy(0.0)) if number in last else self.run(work)
                for number, work in works.items()
            }
            settled = dict(zip(settlements, self.settle(list(settlements.values())), strict=True))
        for number in last:
            settled[number] = self._handle_alone(messages[number])
        try:
            return [work if isinstance(work, Outcome) else settled[number] for number, work in enumerate(begun)]
        finally:
            # A handler's error leads to its frames, and those lead here: what leads back would keep all that the
            # handler had in hand, memory and open files, until the collector finds the ring.
            del settlements, settled

    def _handle_batched(self, messages: Sequence[Message[Any]], batched: dict[str, list[int]]) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        for name, numbers in batched.items():
            topic = self._find(name)
            handler = topic.batch if topic else None
            # One crash is one too many: nobody can have company.
            size = handler.size if handler and self._max_crashes > 1 else 1
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                outcomes.update(zip(part, self._handle_batch([messages[number] for number in part]), strict=True))
        rest = [number for number in range(len(messages)) if number not in outcomes]
        if rest:
            outcomes.update(zip(rest, self.handle_many([messages[number] for number in rest]), strict=True))
        try:
            return [outcomes[number] for number in range(len(messages))]
        finally:
            del outcomes  # see `handle_many`

    def _handle_batch(self, messages: Sequence[Message[Any]]) -> list[Outcome]:
        """Take the messages of one call all the way."""
        if self._stopping():
            return [Busy(0.0)] * len(messages)
        outcomes: dict[int, Outcome] = {}
        with self.company:
            begun = self.begin(messages)
            works = {number: work for number, work in enumerate(begun) if isinstance(work, Work)}
            apart = {number: work for number, work in works.items() if work.crashes}
            is_last = {number for number, work in apart.items() if work.crashes == self._max_crashes - 1}
            if len(works) == len(apart) == 1 and (not is_last or self.company.stay_alone()):
                apart = {}
            # Let go of before anything runs: should a neighbour end the process, they must not count as started.
            if apart:
                self.settle([Settlement(work.commit(Step.RELEASED), Busy(0.0)) for work in apart.values()])
            together = [number for number in works if number not in apart]
            handled = self.run_batch([works[number] for number in together])
            outcomes.update(zip(together, handled, strict=True))
        for number in apart:
            outcomes[number] = self._handle_apart(messages[number], number in is_last)
        try:
            return [work if isinstance(work, Outcome) else outcomes[number] for number, work in enumerate(begun)]
        finally:
            del outcomes, handled  # see `handle_many`

    def _handle_apart(self, message: Message[Any], is_last: bool) -> Outcome:
        """Take a message that took a worker down all the way: claimed now, and in no call with others."""
        if self._stopping():
            return Busy(0.0)
        if not is_last:
            with self.company:
                return self._handle_one(message)
        return self._handle_alone(message)

    def _handle_alone(self, message: Message[Any]) -> Outcome:
        if not self.company.enter_alone(_ALONE):
            return Busy(_ALONE)
        try:
            return self._handle_one(message)
        finally:
            self.company.__exit__()

    def _handle_one(self, message: Message[Any]) -> Outcome:
        (work,) = self.begin((message,))
        if isinstance(work, Outcome):
            return work
        return self.run_batch([work])[0] if work.topic.batch else self.settle([self.run(work)])[0]

    def begin(
        self, messages: Sequence[Message[Any]], *, plains: Sequence[bytes] = (), started: bool = True
    ) -> list[Work | Outcome]:
        """Decode and claim. A message that is not to be handled has its Outcome, stored.

        Args:
            messages: their data in plain form, or of their schema's type.
            plains: the data of each as canonical JSON, where that is at hand.
            started: whether their handlers start at once, so that a crash counts against each.
        """
        found = list(map(self._read, messages, plains or itertools.repeat(None)))
        asked = [work for work in found if isinstance(work, Work) and work.once != "none"]
        try:
            answers = self._claim(asked, started=started)
        except StorageUnavailableError:
            # Asked to stop: nothing is handled without a claim, so the same copies go back.
            return [Busy(0.0) if isinstance(work, Work) else work for work in found]
        answered = iter([self._answer(work, answer) for work, answer in zip(asked, answers, strict=True)])
        return [next(answered) if isinstance(work, Work) and work.once != "none" else work for work in found]

    def begin_ahead(self, messages: Sequence[Message[Any]]) -> list[Work | Outcome | None]:
        """Decode and claim messages whose handlers do not start at once: a crash meanwhile counts against nobody.

        Only for messages that are handed over for the first time, or one that kills its worker would never be found
        out; of those that were known already, or are busy, nothing is kept: they are None, and for `handle` to take.
        """
        found = [self._read(message) for message in messages]
        asked = [work for work in found if isinstance(work, Work) and work.is_claimable_ahead]
        answers: list[Granted | Refused]
        try:
            answers = self._claim(asked, started=False)
        except StorageUnavailableError:  # asked to stop
            answers = [Refused(Refusal.BUSY)] * len(asked)
        answered: dict[int, Work | Outcome | None] = {}
        known: list[Commit] = []
        for work, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Granted) and (answer.crashes or answer.progress or answer.copy):
                work.grant(answer)
                known.append(work.commit(Step.RELEASED))
            elif isinstance(answer, Granted) or answer.why is not Refusal.BUSY:
                answered[id(work)] = self._answer(work, answer)
        if known:
            try:
                self._patiently(lambda: self._commits(known))
            except StorageUnavailableError as exc:
                logger.warning("could not give back %d messages, their leases end by themselves: %s", len(known), exc)
        return [answered.get(id(work)) if isinstance(work, Work) else work for work in found]

    def run(self, work: Work) -> Settlement:
        """Run the handlers that have not finished yet, and decide. Nothing counts until `settle`."""
        return self._runner.run(work)

    def run_batch(self, works: Sequence[Work]) -> list[Outcome]:
        """Call the batch handler of their topic, for as many as one call may get, and settle what becomes of each."""
        return self._batches.handle(works)

    def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Store what became of messages in one round trip; only then it counts.

        While the storage is away this waits. Asked to stop meanwhile, it returns outcomes by which the driver
        publishes copies that carry everything known.
        """
        open = [settlement.commit for settlement in settlements if not settlement.is_stored]
        try:
            accepted = iter(self._patiently(lambda: self._commits(open)))
        except StorageUnavailableError:
            return [
                settlement.outcome if settlement.is_stored else settlement.unsettled() for settlement in settlements
            ]
        if open:
            points.reach("after_commit")
        outcomes = [
            settlement.outcome if settlement.is_stored or next(accepted) else Fenced() for settlement in settlements
        ]
        is_told = logger.isEnabledFor(logging.INFO)
        for settlement, outcome in zip(settlements, outcomes, strict=True):
            if is_told or isinstance(outcome, Dead):
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

    def once_of(self, topic: str) -> Once | None:
        """Return the once-rule of a topic; None: nobody here knows it."""
        found = self._find(topic)
        return found.once if found else None

    # -- steps

    def _claim(self, works: Sequence[Work], *, started: bool = True) -> list[Granted | Refused]:
        process = os.getpid()
        claims = [work.claim(self._lease, f"{process}.{next(self._nonces)}", started) for work in works]
        return self._patiently(lambda: self._claims(claims))

    def _read(self, message: Message[Any], plain: bytes | None = None) -> Work | Outcome:
        topic = self._find(message.topic)
        if topic is None or not topic.handlers:
            return self.unknown(
                message.topic,
                message.id,
                lambda error: self.bury_message(message, Reason.UNKNOWN_TOPIC, error),
            )
        try:
            return Work.read(topic, message, self.worker, plain)
        except SchemaError as exc:
            return self.bury_message(message, Reason.UNDECODABLE, exc)
        except MessageError as exc:
            return self.bury_message(message, Reason.MALFORMED, exc)

    def _answer(self, work: Work, answer: Granted | Refused) -> Work | Outcome:
        if isinstance(answer, Granted):
            work.grant(answer)
            points.reach("after_claim")
            if work.crashes < self._max_crashes:
                return work
            error = DeadLetterError(f"its handler took the worker down {work.crashes} times")
            return self.settle([self._runner.dead(work, Reason.KILLED_WORKER, error)])[0]
        match answer.why:
            case Refusal.BUSY:
                return Busy(answer.seconds)
            case Refusal.CONFLICT:
                index, topic = work.received.index, work.topic.name
                error = DeadLetterError(f"index `{index}` of topic `{topic}` was handled with other data")
                return self.bury_message(work.received, Reason.INDEX_CONFLICT, error)
            case _:
                return Duplicate()

    def bury_message(self, message: Message[Any], reason: Reason, error: BaseException | str) -> Outcome:
        """Make a dead letter of a message that was never claimed; see `bury`."""
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
