"""A group in a child of the pool: claimed together, run one by one, each as its task, and recorded together."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from celery import Celery, current_app
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.exceptions import Reject
from kombu.serialization import loads, prepare_accept_content

from ..errors import MessageError, StorageUnavailableError
from ..handlers import watchdog
from ..message import Message
from ..outcome import Busy, Handled, Outcome
from ..pipeline import Pipeline
from ..queue import wire
from ..storage.protocol import Step
from ..work import Settlement, Work, error_text
from .hand import HAND, Hand
from .runtime import Runtime, runtime_of
from .task import worker_of

__all__ = ["ALONE", "Answer", "Told", "body_of", "run_group", "tracer_of"]

logger = logging.getLogger(__name__)

#: What a child is told of a request: id, headers, body, content type and encoding.
Told = tuple[str, dict[str, Any], Any, str | None, str | None]
#: What a child says of a message: what tracing its task told, and what recording it came to, where that asks for more
#: than an ack.
Answer = tuple[Any, Outcome | Exception | None]
#: The same of a message that it did not touch, and that is to run by itself.
ALONE: Final = None

#: Seconds that what is handled waits at most to be recorded together with others.
_TOGETHER: Final = 1.0


def run_group(members: Sequence[tuple[str, Told]], place: int | None) -> list[Answer | None]:
    """Run the tasks of a group.

    Args:
        members: the name of each task, and its request.
        place: where to tell which of them is run; see `Shared`.

    Returns:
        An answer for each.
    """
    app = current_app._get_current_object()
    runtime = runtime_of(app)
    if runtime.is_stopping():
        return [ALONE] * len(members)
    if len(members) == 1:
        ((name, told),) = members
        id, headers, body, content_type, encoding = told
        return [(tracer_of(app)(name, id, headers, body, content_type, encoding), None)]
    pipeline = runtime.pipeline(*worker_of(members[0][1][1], runtime))
    with pipeline.company:
        return _Run(app, runtime, pipeline, place).run(members)


def tracer_of(app: Celery) -> Any:
    """Return what runs a task as Celery does."""
    return fast_trace_task if app.use_fast_trace_task else trace_task_ret


def body_of(app: Celery, told: Told) -> Any:
    """Return the arguments of a request: positional, keywords, and what Celery embeds."""
    _, _, body, content_type, encoding = told
    if not content_type:
        return body
    return loads(body, content_type, encoding, accept=prepare_accept_content(app.conf.accept_content))


class _Run:
    def __init__(self, app: Celery, runtime: Runtime, pipeline: Pipeline, place: int | None) -> None:
        self._runtime, self._pipeline, self._place = runtime, pipeline, place
        self._app, self._trace = app, tracer_of(app)
        self._answers: dict[int, Answer] = {}
        #: Those that are handled and not recorded yet.
        self._ended: deque[tuple[int, Any, Settlement]] = deque()
        #: Who records.
        self._lock = threading.Lock()

    def run(self, members: Sequence[tuple[str, Told]]) -> list[Answer | None]:
        left = self._claim(members)
        until = time.monotonic() + _TOGETHER
        try:
            # In a thread of its own, should a handler take longer than that.
            with watchdog.report(_TOGETHER, self._settle_early):
                while left and time.monotonic() < until and not self._runtime.is_stopping():
                    number, hand, body = left[0]
                    name, (id, headers, *_) = members[number]
                    self._tell(number)
                    self._run_one(number, hand, (name, id, {**headers, HAND: hand}, body, None, None))
                    left.popleft()
            self._tell(-1)
            self._settle()
            self._release([hand for _, hand, _ in left])
        except BaseException:
            # This process is being ended: what is done is kept, what is not begun goes back.
            self._give_back([hand for _, hand, _ in left][1:])
            raise
        return [self._answers.get(number, ALONE) for number in range(len(members))]

    def _claim(self, members: Sequence[tuple[str, Told]]) -> deque[tuple[int, Hand, Any]]:
        """Return those that are to run, with what each was found to be, and its body."""
        read: list[tuple[int, Message[Any], Any]] = []
        for number, (name, told) in enumerate(members):
            body = body_of(self._app, told)
            args, keywords, _ = body
            try:
                message = wire.read({**told[1], "id": told[0], "task": name}, args, keywords)
            except MessageError:
                logger.debug("message %s of a group is none", told[0])
            else:
                read.append((number, message, body))
        try:
            begun = self._pipeline.begin_ahead([message for _, message, _ in read])
        except Exception:
            logger.exception("could not claim %d messages together, each runs by itself", len(read))
            return deque()
        return deque(
            (number, Hand(message, found), body)
            for (number, message, body), found in zip(read, begun, strict=True)
            if found is not None
        )

    def _run_one(self, number: int, hand: Hand, request: Any) -> None:
        answer: Any = None
        try:
            answer = self._trace(*request)
        finally:
            settlement, hand.settlement = hand.settlement, None
            if settlement:  # also where something came up after its handlers: they have returned all the same
                self._ended.append((number, answer, settlement))
        if settlement is None:
            self._answers[number] = (answer, None)

    def _tell(self, number: int) -> None:
        if self._place is not None:
            self._runtime.shared.tell(self._place, number)

    def _settle_early(self) -> None:
        try:
            self._settle()
        except Exception:
            logger.exception("could not record what was handled; it is tried again with what follows")

    def _settle(self) -> None:
        with self._lock:
            # More may end meanwhile.
            ended = list(self._ended)
            outcomes = self._outcomes([settlement for _, _, settlement in ended])
            for (number, answer, _), outcome in zip(ended, outcomes, strict=True):
                self._answers[number] = (answer, None if isinstance(outcome, Handled) else outcome)
            for _ in ended:
                self._ended.popleft()

    def _outcomes(self, settlements: Sequence[Settlement]) -> Sequence[Outcome | Exception]:
        try:
            return self._pipeline.settle(settlements)
        except Exception as exc:
            if len(settlements) == 1:
                logger.exception("could not record a message; it is handed over again")
                return [Reject(error_text(exc), requeue=True)]
            # One of them may be what the storage stumbles over.
            return [outcome for settlement in settlements for outcome in self._outcomes([settlement])]

    def _release(self, hands: Sequence[Hand]) -> None:
        self._pipeline.settle([Settlement(commit, Busy(0.0)) for commit in _released(hands)])

    def _give_back(self, hands: Sequence[Hand]) -> None:
        commits = [settlement.commit for _, _, settlement in list(self._ended) if not settlement.is_stored]
        try:
            self._pipeline.storage.commit_many([*commits, *_released(hands)])
        except StorageUnavailableError:
            pass  # their leases end by themselves


def _released(hands: Sequence[Hand]) -> list[Any]:
    return [hand.begun.commit(Step.RELEASED) for hand in hands if isinstance(hand.begun, Work)]
