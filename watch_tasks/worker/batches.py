"""A batch as one job of the pool: its messages are handled together there, and each is told to Celery as its own task.

Its requests stay with the main process, which holds their leases meanwhile, and acks each by what became of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from billiard.einfo import ExceptionInfo
from celery import Celery, current_app
from celery.exceptions import Reject, TaskRevokedError

from ..errors import MessageError
from ..message import Message
from ..outcome import Handled, Outcome
from ..queue import wire
from ..work import error_text
from .grouped import Told, body_of, tracer_of
from .request import LOST, TopicRequest, error_of
from .runtime import Runtime, runtime_of
from .task import decided, worker_of

__all__ = ["Batch", "run_batch", "told"]

logger = logging.getLogger(__name__)


class Batch:
    """Requests of one topic, to be handled together. To Celery's worker it is a request.

    Args:
        name: of their task.
        runtime: of this process.
        ended: called with it once it is over.
    """

    def __init__(self, name: str, runtime: Runtime, ended: Callable[[Batch], object]) -> None:
        self.name = name
        self.requests: list[TopicRequest] = []
        #: Whether somebody has its process ended, by revoking one of its messages: no fault of the others.
        self.is_ended = False
        #: Whether a process of the pool has it.
        self.is_accepted = False
        self._runtime, self._over = runtime, ended

    def execute_using_pool(self, pool: Any, **_: Any) -> None:
        """Hand it to the pool.

        Raises:
            TaskRevokedError: nothing is left of it: all were revoked, or are expired.
        """
        if self._runtime.is_stopping():
            return  # what was not started goes back with the connection
        self.requests = [request for request in self.requests if not request.revoked()]
        if not self.requests:
            self._over(self)
            raise TaskRevokedError("all messages of a batch")
        self._hand_over(pool, run_batch, self.name, [told(request) for request in self.requests])

    def _hand_over(self, pool: Any, run: Callable[..., list[Any]], *args: Any) -> None:
        for request in self.requests:
            request.batch = self
        result = pool.apply_async(
            run,
            args=args,
            accept_callback=self._on_accepted,
            callback=self._on_answered,
            error_callback=self._on_lost,
            correlation_id=self.requests[0].id,
        )
        for request in self.requests:
            request._apply_result = result and ref(result)

    def forget(self) -> None:
        """Let go of its requests: they are settled, or its pool has forgotten it, and they are to go back.

        They refer to it as it does to them: their deliveries would stay in hand until the collector finds the ring.
        """
        for request in self.requests:
            if request.batch is self:
                request.batch = None
        self.requests = []

    def _on_accepted(self, pid: int, time_accepted: float) -> None:
        if self.is_accepted:
            return  # a stop had counted it as that already
        self.is_accepted = True
        for request in self.requests:
            request.on_accepted(pid, time_accepted)

    def _on_answered(self, answers: list[Any]) -> None:
        if isinstance(answers, ExceptionInfo):  # so pools of this process say that a task would end it
            self._on_lost(answers)
            return
        if not self.requests:  # forgotten; what it has settled will be duplicates
            return
        for request, answer in zip(self.requests, answers, strict=True):
            self._each(request, self._settle, answer)
        self._end()

    def _settle(self, request: TopicRequest, answer: Any) -> None:
        request.on_success(answer)

    def _on_lost(self, info: ExceptionInfo) -> None:
        if not self.requests:
            return
        error = error_of(info)
        is_lost = isinstance(error, LOST) or not isinstance(error, Exception)
        # Being stopped costs nothing, nor being ended for another's sake.
        counts = self._release(is_crash=is_lost and not (self.is_ended or self._runtime.is_stopping()))
        for request, crashes in zip(self.requests, counts, strict=True):
            if request.is_over:
                self._each(request, lambda request, info: request.on_failure(info), info)
            elif is_lost:
                self._each(request, lambda request, crashes: request.lost(error, crashes), crashes)
            else:
                # A mistake of ours: what is settled will be a duplicate.
                logger.error("a batch could not be told: %s", error_text(error))
                self._each(request, lambda request, _: request.put_back(), None)
        self._end()

    def _end(self) -> None:
        self.forget()
        self._over(self)

    def _each(self, request: TopicRequest, call: Callable[[TopicRequest, Any], object], argument: Any) -> None:
        """One that fails must not keep the others from being settled."""
        try:
            call(request, argument)
        except Exception:
            logger.exception("message %s could not be settled, it is handed over again", request.id)
            request.put_back()

    def _release(self, *, is_crash: bool) -> list[int]:
        """End the claims; return how often the handler of each took a worker down."""
        # Who is not claimed cannot be told from its neighbours by the storage: it counts where it is alone.
        counted = [request for request in self.requests if len(self.requests) == 1 or not request.is_unclaimed]
        counts = dict.fromkeys((request.id for request in self.requests), 0)
        for requests, crashed in ((counted, is_crash), (set(self.requests) - set(counted), False)):
            ids = [request.id for request in requests]
            counts.update(zip(ids, self._runtime.release(ids, crashed=crashed), strict=True))
        return [counts[request.id] for request in self.requests]


def told(request: TopicRequest) -> Told:
    """Return what a child is told of a request."""
    # The arguments are in the body.
    headers = {name: value for name, value in request.request_dict.items() if name not in ("args", "kwargs")}
    return request.id, headers, request.body, request.content_type, request.content_encoding


def run_batch(name: str, members: Sequence[Told]) -> list[Any]:
    """Handle the messages of a batch, in a process or thread of the pool; return what tracing each as a task told.

    Args:
        name: of their task.
        members: their requests.
    """
    app = current_app._get_current_object()
    bodies = [body_of(app, member) for member in members]
    outcomes = _handle(app, name, members, bodies)
    trace = tracer_of(app)
    answers = []
    for (id, headers, *_), body, outcome in zip(members, bodies, outcomes, strict=True):
        token = decided.set(outcome)
        try:
            failed, answer, seconds = trace(name, id, headers, body, None, None)
        finally:
            decided.reset(token)
        answers.append((failed, answer, outcome.seconds if isinstance(outcome, Handled) else seconds))
    return answers


def _handle(app: Celery, name: str, members: Sequence[Told], bodies: Sequence[Any]) -> list[Outcome | Reject | None]:
    """Return what became of each; None of what is no message: that its task says by itself."""
    runtime = runtime_of(app)
    messages: dict[int, Message[Any]] = {}
    for place, ((id, headers, *_), (args, keywords, _embed)) in enumerate(zip(members, bodies, strict=True)):
        try:
            messages[place] = wire.read({**headers, "id": id, "task": name}, args, keywords)
        except MessageError:
            logger.debug("message %s of a batch is none", id)
    try:
        outcomes = runtime.pipeline(*worker_of(members[0][1], runtime)).handle_many(list(messages.values()))
    except Exception as exc:
        logger.exception("could not settle a batch of %d messages; they are handed over again", len(members))
        time.sleep(1.0)  # so that a mistake of ours does not spin
        return [Reject(error_text(exc), requeue=True)] * len(members)
    found: dict[int, Outcome] = dict(zip(messages, outcomes, strict=True))
    return [found.get(place) for place in range(len(members))]
