"""Calls batch handlers: one call for many messages, and for halves of them where it fails, until the bad stand alone.

What was handled is settled before the next call begins, so a process that ends in between repeats one call, not all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

from . import points
from .errors import HandlerAnswerError, StorageUnavailableError
from .handlers import Interrupts, run_handler
from .message import Message
from .outcome import Busy, Discard, Handled, Outcome, Snooze
from .runner import Runner
from .storage.base import Storage
from .storage.protocol import Step
from .topics import BatchHandler
from .work import Settlement, Work, error_text, shown

__all__ = ["Batches"]

logger = logging.getLogger(__name__)

_EXPECTED: Final = (
    "return None when all are handled; or a sequence with None or an exception for each of them, in their order; or a "
    "mapping from the ids of those that failed to exceptions"
)


class _Failure(NamedTuple):
    """How a call ended that failed."""

    error: Exception
    seconds: float


class Batches:
    """See the module. Safe to call from several threads.

    Args:
        runner: decides what becomes of a message that failed.
        storage: where claims are given back.
        settle: stores what became of messages; only then it counts.
        stopping: whether the worker is asked to stop: no further call begins then.
        interrupts: the exceptions by which the driver ends its process while a handler runs.
        kill_after: see `run_handler`.
    """

    def __init__(
        self,
        runner: Runner,
        storage: Storage,
        settle: Callable[[Sequence[Settlement]], list[Outcome]],
        stopping: Callable[[], bool],
        interrupts: Interrupts,
        kill_after: float | None,
    ) -> None:
        self.runner, self.storage, self.settle, self.stopping = runner, storage, settle, stopping
        self.interrupts, self.kill_after = interrupts, kill_after

    def handle(self, works: Sequence[Work]) -> list[Outcome]:
        """Handle messages of one topic that has a batch handler, claimed, as many as one call may get."""
        handler = works[0].topic.batch if works else None
        return _Batch(self, handler, works).handle() if handler else []


class _Batch:
    """One batch on its way. Its messages go by their place in it."""

    def __init__(self, by: Batches, handler: BatchHandler, works: Sequence[Work]) -> None:
        self._by, self._handler, self._works = by, handler, works
        self._outcomes: dict[int, Outcome] = {}
        #: How the last call of a message ended, where that failed.
        self._failures: dict[int, _Failure] = {}
        #: The messages as the handler gets them, where that is the same in each call.
        self._messages: dict[int, Message[Any]] = {}

    def handle(self) -> list[Outcome]:
        places = list(range(len(self._works)))
        # Handled before, where it could not be stored: the copy that carries it knows.
        done = [place for place in places if self._handler.name in self._works[place].progress.handled]
        self._settle({place: self._handled(place, 0.0, []) for place in done})
        left = [place for place in places if place not in self._outcomes]
        try:
            if left and not self._call(left):
                self._split(left)
            return [self._outcomes[place] for place in places]
        finally:
            # An error leads to the frames of its call, and those lead here: see `Pipeline.handle_many`.
            self._outcomes, self._failures = {}, {}

    # -- which calls

    def _split(self, places: list[int]) -> None:
        """Go on after the first call failed."""
        if len(places) == 1:
            self._fail(places)
            return
        text = "a batch of %d messages failed, now each half of it is called: topic=%r error=%r"
        logger.warning(text, len(places), self._works[0].topic.name, error_text(self._failures[places[0]].error))
        failed = [half for half in _halves(places) if not self._call_again(half)]
        if len(failed) == 1:
            self._halve(failed[0])
        elif failed:
            # Most likely nothing can be handled now, and each further call would only tell so once more.
            self._fail_all(failed)

    def _halve(self, places: list[int]) -> None:
        """Find those that fail alone among messages whose call failed."""
        if len(places) == 1:
            self._fail(places)
            return
        for half in _halves(places):
            if not self._call_again(half):
                self._halve(half)

    def _fail_all(self, halves: Sequence[list[int]]) -> None:
        """Retry all; call alone what has no retry left, for nobody is buried for what a neighbour did."""
        alone = {place for half in halves if len(half) > 1 for place in half if not self._may_retry(place)}
        self._fail([place for half in halves for place in half if place not in alone])
        for place in sorted(alone):
            if not self._call_again([place]):
                self._fail([place])

    def _may_retry(self, place: int) -> bool:
        work, error = self._works[place], self._failures[place].error
        delay = work.topic.retry.decide(error, work.progress.retries, work.received.max_retries)
        return delay is not None and not isinstance(error, Discard)

    # -- one call

    def _call_again(self, places: list[int]) -> bool:
        if not self._by.stopping():
            return self._call(places)
        self._settle({place: self._released(place) for place in places})
        return True

    def _call(self, places: list[int]) -> bool:
        """Call the handler; settle what it answered, or note how it failed and return False."""
        begun = time.monotonic()
        try:
            answers = self._answers(places)
        except Snooze as verdict:
            answers = [verdict] * len(places)
        except Exception as exc:  # noqa: BLE001 - whatever a handler raises is decided on here
            self._failures.update(dict.fromkeys(places, _Failure(exc, time.monotonic() - begun)))
            return False
        except BaseException:
            # Where nobody stops the worker, the handler brought this upon its process: that counts as a crash.
            if self._by.stopping():
                self._give_back()
            raise
        seconds = time.monotonic() - begun
        self._settle(
            {place: self._answered(place, answer, seconds) for place, answer in zip(places, answers, strict=True)}
        )
        return True

    def _answers(self, places: list[int]) -> Sequence[Exception | None]:
        timeout = self._works[places[0]].topic.timeout
        messages = self._given(places, timeout)
        points.reach("in_handler")
        answer = run_handler(
            self._handler,
            messages[0],
            timeout,
            batch=messages,
            interrupts=self._by.interrupts,
            kill_after=self._by.kill_after,
        )
        points.reach("after_effect")
        return _read(self._handler, answer, messages)

    def _given(self, places: list[int], timeout: float | None) -> list[Message[Any]]:
        name = self._handler.name
        if timeout is not None:
            deadline = self._works[places[0]].now() + timedelta(seconds=timeout)
            return [self._works[place].for_handler(name, deadline) for place in places]
        for place in places:
            if place not in self._messages:
                self._messages[place] = self._works[place].for_handler(name, None)
        return [self._messages[place] for place in places]

    # -- what becomes of messages

    def _answered(self, place: int, answer: Exception | None, seconds: float) -> Settlement:
        if answer is None:
            work = self._works[place]
            work.finished(self._handler.name)
            return self._handled(place, seconds, [("handler", work.note(handler=self._handler.name, seconds=seconds))])
        return self._by.runner.failed(self._works[place], self._handler.name, answer, seconds, [])

    def _handled(self, place: int, seconds: float, notes: list[tuple[str, bytes]]) -> Settlement:
        work = self._works[place]
        return Settlement(self._by.runner.handled(work, seconds, notes), Handled(seconds), work.carrier)

    def _released(self, place: int) -> Settlement:
        return Settlement(self._works[place].commit(Step.RELEASED), Busy(0.0))

    def _fail(self, places: list[int]) -> None:
        self._settle(
            {
                place: self._by.runner.failed(self._works[place], self._handler.name, error, seconds, [])
                for place in places
                for error, seconds in [self._failures[place]]
            }
        )

    def _settle(self, settlements: dict[int, Settlement]) -> None:
        if settlements:
            outcomes = self._by.settle(list(settlements.values()))
            self._outcomes.update(zip(settlements, outcomes, strict=True))

    def _give_back(self) -> None:
        """End the claims at no cost, because the process is being ended; if that fails their leases will end them."""
        left = [
            work for place, work in enumerate(self._works) if place not in self._outcomes and work.token is not None
        ]
        try:
            self._by.storage.commit_many([work.commit(Step.RELEASED) for work in left])
        except StorageUnavailableError as exc:
            logger.warning("could not give %d messages back: %s", len(left), exc)


def _halves(places: list[int]) -> tuple[list[int], list[int]]:
    middle = (len(places) + 1) // 2
    return places[:middle], places[middle:]


def _read(handler: BatchHandler, answer: Any, messages: Sequence[Message[Any]]) -> list[Exception | None]:
    """Return what a batch handler says of each message.

    Raises:
        HandlerAnswerError: it says nothing that can be understood.
    """

    def wrong(came: str) -> HandlerAnswerError:
        return HandlerAnswerError(
            f"batch handler `{handler.name}` of topic `{messages[0].topic}`, given {len(messages)} messages, {came}: "
            f"{_EXPECTED}"
        )

    if answer is None:
        return [None] * len(messages)
    if isinstance(answer, Mapping):
        strangers = set(answer) - {message.id for message in messages}
        if strangers:
            raise wrong(f"answered for {shown(min(strangers, key=repr))}, which is the id of none of them")
        told = [answer.get(message.id) for message in messages]
    elif isinstance(answer, Sequence) and not isinstance(answer, (str, bytes, bytearray)):
        if len(answer) != len(messages):
            raise wrong(f"returned {len(answer)} answers")
        told = list(answer)
    else:
        raise wrong(f"returned {shown(answer)[:200]} ({type(answer).__name__})")
    for message, each in zip(messages, told, strict=True):
        if each is not None and not isinstance(each, Exception):
            raise wrong(f"answered {shown(each)[:200]} ({type(each).__name__}) for message {message.id}")
    return told
