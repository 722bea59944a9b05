"""A group in a child of the pool: claimed together, run one by one, each as its task, and recorded together."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final

from celery import Celery, current_app
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.exceptions import Reject
from kombu.serialization import loads, prepare_accept_content

from ..errors import MessageError
from ..message import Message
from ..outcome import Busy, Handled, Outcome
from ..pipeline import Pipeline
from ..queue import wire
from ..storage.protocol import Step
from ..together import Together, settle_each
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
        #: By its number, and what tracing its task told.
        self._together: Together[tuple[int, Any], Outcome | Exception] = Together(pipeline, self._outcomes)

    def run(self, members: Sequence[tuple[str, Told]]) -> list[Answer | None]:
        left = self._claim(members)
        try:
            with self._together.for_a_while() as is_time:
                while left and is_time() and not self._runtime.is_stopping():
                    number, hand, body = left[0]
                    name, (id, headers, *_) = members[number]
                    self._tell(number)
                    self._run_one(number, hand, (name, id, {**headers, HAND: hand}, body, None, None))
                    left.popleft()
            self._tell(-1)
            self._together.settle()
            self._release(_claimed(left))
        except BaseException:
            # This process is being ended: what is done is kept, what is not begun goes back.
            self._together.give_back(_claimed(list(left)[1:]))
            raise
        for (number, answer), outcome in self._together.answers:
            self._answers[number] = (answer, None if isinstance(outcome, Handled) else outcome)
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
                self._together.put((number, answer), settlement)
        if settlement is None:
            self._answers[number] = (answer, None)

    def _tell(self, number: int) -> None:
        if self._place is not None:
            self._runtime.shared.tell(self._place, number)

    def _outcomes(self, settlements: Sequence[Settlement]) -> list[Outcome | Exception]:
        return [_told(outcome) for outcome in settle_each(self._pipeline.settle, settlements)]

    def _release(self, works: Sequence[Work]) -> None:
        self._pipeline.settle([Settlement(work.commit(Step.RELEASED), Busy(0.0)) for work in works])


def _told(outcome: Outcome | Exception) -> Outcome | Exception:
    """Return what the main process is told: an error in a form that can be pickled."""
    if not isinstance(outcome, Exception):
        return outcome
    logger.error("could not record a message; it is handed over again", exc_info=outcome)
    again: Exception = Reject(error_text(outcome), requeue=True)
    return again


def _claimed(left: Iterable[tuple[int, Hand, Any]]) -> list[Work]:
    return [hand.begun for _, hand, _ in left if isinstance(hand.begun, Work)]
