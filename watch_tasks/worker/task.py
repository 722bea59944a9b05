"""The Celery task of a topic: hands a message to the pipeline and translates its Outcome into Celery's verbs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Final

from celery import Celery, Task
from celery.exceptions import Ignore, Reject, TaskPredicate
from celery.exceptions import Retry as CeleryRetry
from celery.utils.serialization import get_pickleable_exception

from ..errors import DeadLetterError, MessageError, SendError
from ..message import Message
from ..outcome import Busy, Dead, Duplicate, Fenced, Handled, Outcome, Retry, Snoozed
from ..pipeline import Pipeline
from ..queue import wire
from ..topics import Topic
from ..work import Work, error_text
from .hand import HAND, Hand
from .outlet import WORKER_HEADER
from .runtime import Runtime, runtime_of

__all__ = ["SETTLED", "TopicTask", "Yielded", "decided", "register", "worker_of"]

logger = logging.getLogger(__name__)

#: Marks the error of a dead letter, so that the main process knows it is kept.
SETTLED: Final = "_watch_settled"

#: Characters of an error that Celery is shown: as many as its own events carry of arguments.
_SHOWN: Final = 1024

#: Seconds between two tries to publish a copy: the first, doubled up to the last.
_PAUSES: Final = (0.1, 5.0)


#: What became of the message whose task is run now, where it was handled together with others.
decided: Final[ContextVar[Outcome | Reject | None]] = ContextVar("decided", default=None)


class Yielded(Ignore):
    """Raised by our task when another worker took the message over: nothing is acked, nothing is published."""


class TopicTask(Task):
    """A topic as a Celery task. Its retry attributes mirror the topic's policy, for people and tools to read.

    What is tried again, and when, is decided by the pipeline: Celery's own decision forgets the message's limit, or
    lets it leak to the next message.
    """

    abstract = True
    topic: ClassVar[Topic[Any]]

    Request = "watch_tasks.worker.request:TopicRequest"
    Strategy = "watch_tasks.worker.collecting:strategy"
    #: Its presence keeps Celery from wrapping `run` into retries of its own while `autoretry_for` stays readable.
    _orig_run = None

    serializer = "json"
    typing = False
    ignore_result = True
    acks_late = True
    acks_on_failure = True
    acks_on_timeout = False
    reject_on_worker_lost = True
    retry_on_worker_lost = False
    #: A wrong limit would cut claims and commits as well: the topic's timeout is kept around handlers only.
    soft_time_limit = None
    time_limit = None

    def run(self, *args: Any, **keywords: Any) -> str:
        runtime = runtime_of(self.app)
        request = self.request
        pipeline = runtime.pipeline(*worker_of(request, runtime))
        hand: Hand | None = request.get(HAND)
        message = hand.message if hand else self._read(args, keywords)
        with self.settling():
            outcome = decided.get()
            if isinstance(outcome, Reject):
                raise outcome
            if outcome is None:
                outcome = _handle_ahead(pipeline, hand) if hand and hand.begun else pipeline.handle(message)
            self.publish(runtime, message, outcome)
        return _told(outcome)

    def settled(self, outcome: Outcome | Exception, request: Any) -> None:
        """Do what the outcome asks for of a message that `run` left to be stored.

        Args:
            outcome: what storing it came to, or failed with.
            request: the request that `run` had.

        Raises:
            Yielded: another worker took it over.
            Retry: of Celery's: its next copy was published.
            Reject: it is to be handed over again.
        """
        if isinstance(outcome, Exception):
            raise _again(outcome, request) from outcome
        if isinstance(outcome, Snoozed):  # the worker stops, and the storage is away
            runtime, delay, copy = runtime_of(self.app), outcome.delay, outcome.message
            self.patiently(runtime, lambda: runtime.outlet.push_copy(copy, delay, request))
        _told(outcome)

    def _read(self, args: Any, keywords: Any) -> Message[Any]:
        fields = {"id": self.request.id, "task": self.name, wire.HEADER: self.request.get(wire.HEADER)}
        try:
            return wire.read(fields, args, keywords)
        except MessageError as exc:
            # The consumer reads every message before it hands it on: this one was called by hand.
            raise DeadLetterError(f"task `{self.name}` was called with what is no message: {exc}") from exc

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Have the message handed over again where a mistake of ours keeps it from being settled."""
        try:
            yield
        except (Reject, Yielded):
            raise
        except Exception as exc:
            raise _again(exc, self.request) from exc

    def publish(self, runtime: Runtime, message: Message[Any], outcome: Outcome) -> None:
        """Publish the copy by which a message goes on, if it does."""
        match outcome:
            case Retry(delay, copy) | Snoozed(delay, copy):
                self.patiently(runtime, lambda: runtime.outlet.push_copy(copy, delay, self.request))
            case Busy(until):
                self.patiently(runtime, lambda: runtime.outlet.push_copy(message, until, self.request))

    def patiently(self, runtime: Runtime, publish: Callable[[], None]) -> None:
        """Publish until the broker has it: nothing is acked before. At a stop the message is handed over again."""
        pause, longest = _PAUSES
        while True:
            if runtime.gave_up and runtime.is_stopping():
                raise Reject(runtime.gave_up, requeue=True)
            try:
                return publish()
            except SendError as exc:
                if runtime.is_stopping() or self.request.is_eager:
                    runtime.gave_up = error_text(exc)
                    raise Reject(error_text(exc), requeue=True) from exc
                logger.warning("could not publish a copy, trying again in %.2g s: %s", pause, exc)
                time.sleep(pause)
                pause = min(pause * 2, longest)


def worker_of(request: Any, runtime: Runtime) -> tuple[str, bool]:
    """Return the name of the worker that a task runs in, and whether its process is replaced when it ends."""
    worker, main = request.get(WORKER_HEADER) or (runtime.worker, runtime.pid)
    return worker, main != runtime.pid


def register(app: Celery, topic: Topic[Any]) -> TopicTask:
    """Make a topic a task of an app, in place of one of its name there may be."""
    policy = topic.retry
    made: TopicTask = type(
        "".join(part.capitalize() for part in topic.name.replace("-", ".").replace("_", ".").split(".")) + "Task",
        (TopicTask,),
        {
            "name": wire.task_name(topic.name),
            "topic": topic,
            "autoretry_for": policy.retry_for,
            "dont_autoretry_for": policy.give_up_for,
            "max_retries": policy.max_retries,
            "retry_backoff": policy.backoff,
            "retry_backoff_max": policy.backoff_max,
            "retry_jitter": policy.jitter,
            "__module__": __name__,
            "__doc__": f"Topic `{topic.name}`.",
        },
    )()
    app.tasks.pop(made.name, None)
    app.register_task(made)
    return made


def _handle_ahead(pipeline: Pipeline, hand: Hand) -> Outcome:
    """Handle a message that was claimed ahead. Storing that it was handled is left to whoever gave it in hand."""
    begun = hand.begun
    if not isinstance(begun, Work):
        return begun or Busy(0.0)
    settlement = pipeline.run(begun)
    if isinstance(settlement.outcome, Handled) and not settlement.is_stored:
        hand.settlement = settlement
        return settlement.outcome
    (outcome,) = pipeline.settle([settlement])
    return outcome


def _again(error: Exception, request: Any) -> Reject:
    """Return what has a message handed over again that cannot be settled."""
    logger.error("could not settle message %s; it is handed over again", request.id, exc_info=error)
    time.sleep(1.0)  # so that a mistake of ours does not spin
    return Reject(error_text(error), requeue=True)


def _told(outcome: Outcome) -> str:
    """Tell Celery what became of a message: return for a success, else raise what it knows it by."""
    match outcome:
        case Handled() | Duplicate():
            return type(outcome).__name__.lower()
        case Retry(delay, _, error):
            raise CeleryRetry(error_text(error)[:200], _visible(error), delay)
        case Snoozed(delay):
            raise CeleryRetry("snoozed", when=delay)
        case Busy(until):
            raise CeleryRetry("busy", when=until)
        case Dead(reason, error):
            raise _visible(error or DeadLetterError(reason))
        case Fenced():
            raise Yielded("taken over by another worker")
    raise TypeError(f"the pipeline answered {outcome!r}, which is no Outcome")


def _visible(error: BaseException) -> BaseException:
    """Return what Flower shows of a failure: the handler's error, unless Celery would act on its kind.

    An error that cannot be pickled, or whose text would fill the log, is told in short.
    """
    text = error_text(error)
    if (
        not isinstance(error, Exception)
        or isinstance(error, (MemoryError, TaskPredicate))
        or len(text) > _SHOWN
        or get_pickleable_exception(error) is not error
    ):
        error = DeadLetterError(text[:_SHOWN])
    try:
        setattr(error, SETTLED, True)
    except AttributeError:
        error = DeadLetterError(text)
        setattr(error, SETTLED, True)
    return error
