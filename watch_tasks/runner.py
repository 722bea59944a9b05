"""Runs the handlers of one message in hand, and decides what its delivery comes to.

A handler of a transactional topic runs in a transaction of the storage, and what becomes of the message is committed in
it. For the others that is left to `Pipeline.settle`, except the marks between two handlers.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

from . import points
from .errors import StorageUnavailableError, TransactionLostError
from .handlers import Interrupts, run_handler
from .outcome import Busy, Dead, Discard, Fenced, Handled, Reason, Retry, Snooze, Snoozed
from .patience import Patience
from .storage.base import Storage
from .storage.protocol import Commit, Settled, Step
from .topics import Handler
from .work import Settlement, Work, error_text

__all__ = ["Runner"]

logger = logging.getLogger(__name__)

_Notes = list[tuple[str, bytes]]

#: Seconds after which a message whose transaction was lost comes again: from, to. At once would be a hot loop where the
#: cause lasts, and two that met in a deadlock would meet again.
_AGAIN: Final = (0.1, 1.0)


class _Delivery:
    """How far the handlers of one delivery have come."""

    __slots__ = ("_started", "begun", "deadline", "ended", "is_unsure", "left", "notes", "timeout", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.timeout = work.topic.timeout
        self.deadline = None if self.timeout is None else work.now() + timedelta(seconds=self.timeout)
        self.left: Sequence[Handler] = work.topic.handlers
        if work.progress.handled:
            self.left = [handler for handler in self.left if handler.name not in work.progress.handled]
        #: Events that are not stored yet.
        self.notes: _Notes = []
        #: Whether nobody knows if the last commit holds.
        self.is_unsure = False
        self._started = time.monotonic()
        #: When the newest handler started, and when the last one finished.
        self.begun = self.ended = self._started

    def spent(self) -> float:
        """Return the seconds from the start of the first handler to the end of the last one that finished."""
        return self.ended - self._started

    def seconds(self) -> float | None:
        """Return the seconds that are left; None: no limit."""
        return None if self.timeout is None else max(self.timeout - (time.monotonic() - self._started), 0.0)


class Runner:
    """See the module.

    Args:
        storage: where marks go, and what transactions are of.
        worker: name of the worker.
        patiently: asks a storage that is away again.
        stopping: whether the worker is asked to stop.
        interrupts: the exceptions by which the driver ends its process while a handler runs.
        kill_after: see `run_handler`.
    """

    def __init__(
        self,
        storage: Storage,
        worker: str,
        patiently: Patience,
        stopping: Callable[[], bool],
        interrupts: Interrupts,
        kill_after: float | None,
    ) -> None:
        self._storage, self._worker = storage, worker
        self._patiently, self._stopping = patiently, stopping
        self._interrupts, self._kill_after = interrupts, kill_after

    def run(self, work: Work) -> Settlement:
        """Run the handlers that have not finished yet, in order, until one fails."""
        delivery = _Delivery(work)
        step = self._run_in_transaction if work.topic.transactional else self._run_plain
        for number, handler in enumerate(delivery.left):
            delivery.begun = time.monotonic()  # and again when it is called: a transaction may have to begin before
            try:
                ended = step(delivery, handler, number + 1 == len(delivery.left))
            except Exception as exc:  # noqa: BLE001 - whatever a handler raises is decided on here
                return self.failed(work, handler.name, exc, time.monotonic() - delivery.begun, delivery.notes)
            except BaseException:
                # Where nobody stops the worker, its handler brought this upon its process: that counts as a crash.
                if self._stopping() and not delivery.is_unsure:
                    self._give_back(work)
                raise
            if ended:
                return ended
        # Every handler had finished before.
        return self._ended(delivery)

    def dead(
        self, work: Work, reason: Reason, error: Exception, handler: str | None = None, notes: _Notes | None = None
    ) -> Settlement:
        """Decide that a message will not be tried again by itself."""
        told = work.note(handler=handler, error=error_text(error), worker=self._worker)
        commit = work.commit(Step.DEAD, work.letter(reason, error, handler), [*(notes or ()), ("dead", told)])
        return Settlement(commit, Dead(reason, error), work.carrier)

    # -- one handler

    def _run_plain(self, delivery: _Delivery, handler: Handler, is_last: bool) -> Settlement | None:
        self._call(delivery, handler)
        if not is_last:
            return self._mark(delivery)
        return self._ended(delivery)

    def _call(self, delivery: _Delivery, handler: Handler, connection: Any = None) -> None:
        """Call a handler; when it returned, it has finished."""
        work, delivery.begun = delivery.work, time.monotonic()
        message = work.for_handler(handler.name, delivery.deadline, connection)
        points.reach("in_handler")
        run_handler(handler, message, delivery.seconds(), interrupts=self._interrupts, kill_after=self._kill_after)
        points.reach("after_effect")
        delivery.ended = time.monotonic()
        work.finished(handler.name)
        told = work.note(handler=handler.name, seconds=delivery.ended - delivery.begun)
        delivery.notes.append(("handler", told))

    def _ended(self, delivery: _Delivery) -> Settlement:
        return Settlement(self._handled(delivery), Handled(delivery.spent()), delivery.work.carrier)

    def _handled(self, delivery: _Delivery) -> Commit:
        return self.handled(delivery.work, delivery.spent(), delivery.notes)

    def handled(self, work: Work, spent: float, notes: _Notes) -> Commit:
        """Return the commit of a message whose handlers have all finished, in so many seconds."""
        told = work.note(retries=work.progress.retries, seconds=spent, worker=self._worker)
        return work.commit(Step.HANDLED, work.record(spent), [*notes, ("handled", told)])

    def _mark(self, delivery: _Delivery) -> Settlement | None:
        """Store that a handler finished, before the next one starts; a Settlement means: do not go on."""
        work = delivery.work
        if work.token is None:
            return None
        commit = work.commit(Step.MARK, notes=delivery.notes)
        try:
            is_accepted = self._patiently(lambda: self._storage.commit(commit))
        except StorageUnavailableError:
            return Settlement(replace(commit, step=Step.RELEASED), Busy(0.0), work.carrier)
        delivery.notes.clear()
        # Taken over: settling it again is refused again, and ends as Fenced.
        return None if is_accepted else Settlement(commit, Fenced())

    # -- one handler in a transaction (docs/protocol.md §7)

    def _run_in_transaction(self, delivery: _Delivery, handler: Handler, is_last: bool) -> Settlement | None:
        work = delivery.work
        before, notes, commit = work.progress, [*delivery.notes], None
        try:
            with self._storage.transaction() as transaction:
                self._call(delivery, handler, transaction.connection)
                commit = self._handled(delivery) if is_last else work.commit(Step.MARK, notes=delivery.notes)
                settled = transaction.commit(commit)
        except TransactionLostError as exc:
            logger.warning("the transaction of message %s was lost: %s", work.received.id, exc)
            try:
                holds = commit is not None and self._patiently(partial(self._storage.was_accepted, commit))
            except StorageUnavailableError:
                # Asked to stop, and nobody can tell. Nothing is stored, for a mark may hold that must not be taken
                # back: the carrier is a duplicate where the record holds, and else resumes where the storage says.
                work.progress = before
                return Settlement(work.commit(Step.RELEASED), Snoozed(0.0, work.carrier()), is_stored=True)
            if not holds or commit is None:
                work.progress = before
                released = work.commit(Step.RELEASED, notes=notes)
                return Settlement(released, Busy(_again()), work.carrier)
        except BaseException as exc:
            # Undone: as if the handler had not been called. But cut off in a commit, nobody knows.
            work.progress, delivery.notes = before, notes
            delivery.is_unsure = commit is not None and not isinstance(exc, Exception)
            raise
        else:
            if settled is Settled.REFUSED:
                # Settling it again is refused again, tells of it, and ends as Fenced.
                return Settlement(commit, Fenced())
        points.reach("after_commit")
        delivery.notes.clear()
        return Settlement(commit, Handled(delivery.spent()), is_stored=True) if is_last else None

    # -- what becomes of a message whose handler failed

    def failed(self, work: Work, handler: str, error: Exception, seconds: float, notes: _Notes) -> Settlement:
        """Decide what becomes of a message whose handler raised this: a later time, or a dead letter."""
        if isinstance(error, Snooze):
            notes.append(("snoozed", work.note(handler=handler, seconds=error.seconds)))
            return self._later(work, Step.SNOOZED, error.seconds, Snoozed(error.seconds, work.carrier()), notes)
        work.failed(handler, error, seconds)
        if isinstance(error, Discard):
            return self.dead(work, Reason.DISCARDED, error, handler, notes)
        policy = work.topic.retry
        delay = policy.decide(error, work.progress.retries, work.received.max_retries)
        if delay is None:
            reason = Reason.EXHAUSTED if policy.is_retryable(error) else Reason.FATAL
            return self.dead(work, reason, error, handler, notes)
        told = work.note(handler=handler, seconds=seconds, error=error_text(error), worker=self._worker)
        notes.append(("retry", told))
        work.retried()
        return self._later(work, Step.RETRY, delay, Retry(delay, work.carrier(), error), notes)

    def _later(self, work: Work, step: Step, delay: float, outcome: Retry | Snoozed, notes: _Notes) -> Settlement:
        return Settlement(replace(work.commit(step, notes=notes), delay=delay), outcome, lambda: outcome.message)

    def _give_back(self, work: Work) -> None:
        """End a claim at no cost, because the process is being ended; if that fails its lease will end it."""
        if work.token is not None:
            try:
                self._storage.commit(work.commit(Step.RELEASED))
            except Exception as exc:  # noqa: BLE001 - nothing may take the place of what ends the process
                logger.warning("could not give message %s back: %s", work.received.id, exc)


def _again() -> float:
    return random.uniform(*_AGAIN)  # noqa: S311 - no secret
