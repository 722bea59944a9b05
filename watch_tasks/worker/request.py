"""A topic's message as the worker's main process knows it: leases, and what Celery would lose or repeat for ever.

Decided here and not in signals, whose errors Celery swallows: a lost child, a hard time limit, revoked and expired.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals
from celery.app.task import Context
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.exceptions import Reject, Retry, TaskPredicate, Terminated
from celery.worker import state
from celery.worker.request import Request
from kombu.transport.virtual import Channel as VirtualChannel
from kombu.transport.virtual import QoS as VirtualQoS

from .. import points
from ..errors import MessageError, StorageError
from ..message import Message
from ..outcome import Busy, Dead, Handled, Outcome, Reason
from ..queue import wire
from .hand import HAND, Hand
from .outlet import AGAIN_HEADER, WORKER_HEADER
from .runtime import runtime_of
from .task import SETTLED, Yielded

if TYPE_CHECKING:
    from .batches import Batch

__all__ = ["LOST", "TopicRequest", "error_of"]

logger = logging.getLogger(__name__)

#: Seconds until a message that cannot be buried is handed over again.
_AGAIN: Final = 2.0

#: How a child of the prefork pool, or what Celery's own code in it raises, ends without our say.
LOST: Final = (WorkerLostError, TimeLimitExceeded, SystemExit, KeyboardInterrupt, MemoryError)


#: What of a request is no header of anybody else's; as in Celery's `Context`.
_CELERYS: Final = frozenset({*Context.__dict__, "lang", "task", "argsrepr", "kwargsrepr", "compression"})


class TopicRequest(Request):
    """One delivery of a topic's message."""

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        # The topic's timeout holds, and our own guard keeps it: a limit of Celery's would cut claims and commits.
        self.time_limits = (None, None)
        self._runtime = runtime_of(self.app)
        self._is_held = False
        #: The batch in which it is handled.
        self.batch: Batch | None = None
        #: What it claims.
        self._ids: Sequence[str] = (self.id,)
        #: What the consumer read, where the task runs in this process.
        self.hand: Hand | None = getattr(message, HAND, None)
        if self.hand is not None:
            self._request_dict[HAND] = self.hand
        self._request_dict[WORKER_HEADER] = [self._runtime.worker, self._runtime.pid]

    @property
    def is_over(self) -> bool:
        """Whether somebody has revoked or cancelled it."""
        return bool(self._already_cancelled or self._already_revoked)

    @property
    def is_unclaimed(self) -> bool:
        """Whether its message is handled without a claim, by its own rule or its topic's."""
        message = self.read()
        return ((message and message.once) or self.task.topic.once) == "none"

    @property
    def is_new(self) -> bool:
        """Whether nobody can have had the message in hand before, and nothing but its record hangs on its success."""
        _, _, embed = self._payload
        return not (
            self.delivery_info["redelivered"]
            or AGAIN_HEADER in self._request_dict
            # Celery acts on a success before it tells anybody.
            or not self._ignore_result
            or (embed and (embed.get("callbacks") or embed.get("chain") or embed.get("chord")))
            or signals.task_success.receivers
        )

    def start(self, pool: Any, ended: Callable[[Any], object]) -> None:
        """Run the task in this process, by a pool of it.

        As `execute_using_pool`, but for the body, which is decoded, and for what is called when it ended.
        """
        if self.revoked():
            return
        request = self._request_dict
        # Celery would find the same, in ten times the time.
        request.setdefault("headers", {name: value for name, value in request.items() if name not in _CELERYS})
        trace = fast_trace_task if self._app.use_fast_trace_task else trace_task_ret
        result = pool.apply_async(
            trace,
            args=(self._type, self.id, request, self._payload, None, None),
            accept_callback=self.on_accepted,
            callback=ended,
            error_callback=self.on_failure,
            correlation_id=self.id,
        )
        self._apply_result = result and ref(result)

    def settled(self, outcome: Outcome | Exception, answer: Any) -> Any:
        """Tell Celery of a handled message, whose storing came to this.

        Args:
            outcome: what `Pipeline.settle` answered, or raised.
            answer: what the tracer said; None: nothing.
        """
        if isinstance(outcome, Handled):
            if answer is not None:
                return self.on_success(answer)
            state.task_ready(self)
            return self.acknowledge()
        try:
            self._task.settled(outcome, self._context)
        except Yielded:
            state.task_ready(self)
            self._yield()
        except Retry as exc:
            state.task_ready(self)
            self.acknowledge()
            self.send_event("task-retried", exception=str(exc), traceback="")
        except Reject as exc:
            state.task_ready(self)
            self.reject(requeue=exc.requeue)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        self.hold()
        super().on_accepted(pid, time_accepted)

    def given_back(self) -> None:
        """Be as before it was accepted, by a process that did not begin it."""
        self.drop()
        # Whoever terminates it must not end that process, which may run something else by now.
        self.time_start = self.worker_pid = None
        # Celery keeps what is active when the connection is lost: nobody would run it, and it would stay in hand.
        state.active_requests.discard(self)

    def hand_over_again(self) -> None:
        """Let the broker give it to somebody else: nobody has begun it here."""
        state.task_ready(self)
        self.reject(requeue=True)

    def acknowledge(self) -> None:
        points.reach("before_ack")
        self.drop()
        super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        # Celery throws away like this what has an `eta` that is no time on this machine.
        is_lost = not requeue and not self.acknowledged
        if is_lost and not isinstance(self.bury(Reason.MALFORMED, "Celery cannot tell when it is due"), Dead):
            self.put_back()
        else:
            self.drop()
            super().reject(requeue)

    def terminate(self, pool: Any, signal: Any = None) -> None:
        with _as_far_as_the_pool_can(self.id):
            if self.batch:
                self.batch.is_ended = True
            super().terminate(pool, signal)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        with _as_far_as_the_pool_can(self.id):
            super().cancel(pool, signal, emit_retry)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        if soft:
            super().on_timeout(soft, timeout)
        else:
            logger.error("hard time limit (%s s) exceeded by message %s", timeout, self.id)
            self.lost(TimeLimitExceeded(timeout))

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        error = error_of(exc_info)
        if isinstance(error, Yielded):
            state.task_ready(self)
            self._yield()
        elif self.is_over or _is_told(error):
            super().on_failure(exc_info, send_failed_event, return_ok)
        elif isinstance(error, LOST) or not isinstance(error, Exception):
            self.lost(error)
        elif isinstance(self.bury(Reason.MALFORMED, error), Dead):
            # Celery failed before or after our task did its part; buried once, if it was not settled.
            super().on_failure(exc_info, send_failed_event, return_ok)
        else:
            state.task_ready(self)
            self.put_back()

    def bury(self, reason: Reason, error: BaseException | str, *, crashes: int = 0) -> Outcome:
        """Make a dead letter of the message, unless its id is settled; the Outcome is Dead where it is kept."""
        message = self.read()
        try:
            return self._runtime.clerk.bury(
                reason,
                error,
                id=self.id,
                topic=wire.topic_of(self.type),
                index=message.index if message else None,
                copy=message.copy if message else 0,
                data=message.data if message else None,
                raw=None if message else bytes(self.body),
                content_type=self.content_type,
                max_retries=message.max_retries if message else None,
                once=message.once if message else None,
                retries=message.retries if message else 0,
                crashes=crashes,
                sent_at=message.sent_at if message else None,
            )
        except StorageError as exc:
            logger.error("could not bury message %s: %s", self.id, exc)
            return Busy(_AGAIN)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        self._release()
        if isinstance(self.bury(Reason.EXPIRED if expired else Reason.REVOKED, f"{reason}, by Celery"), Dead):
            super()._announce_revoked(reason, terminated, signum, expired)
        else:
            state.task_ready(self)
            self._already_revoked = True
            self.put_back()

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        # Its process is being ended, which is not its fault: at a cold stop, or because the connection was lost.
        super()._announce_cancelled(emit_retry)
        self.drop()
        self._release()

    def lost(self, error: BaseException, crashes: int | None = None) -> None:
        """Settle a message whose process ended under it: once more, unless it took too many processes with it.

        Args:
            error: how it ended.
            crashes: how often its handler took a worker down, where its claim is released already.
        """
        if self.acknowledged:
            return
        state.task_ready(self)
        settings = self._runtime.settings
        if crashes is None:
            crashes = self._count_crash()
        text = f"its handler took the worker down {crashes} times, the last time with {type(error).__name__}: {error}"
        if crashes >= settings.max_crashes and isinstance(self.bury(Reason.KILLED_WORKER, text, crashes=crashes), Dead):
            self.acknowledge()
            self.send_event("task-failed", exception=text, traceback="")
        else:
            logger.warning("message %s is handed over again: its process was lost (%r)", self.id, error)
            self.reject(requeue=True)
            self.send_event("task-retried", exception=repr(error), traceback="")

    def _count_crash(self) -> int:
        """End this worker's claim; return how often the handler took a worker down, with this time."""
        # Being stopped costs nothing: whoever stops a whole process group ends the children as well.
        return self._release(crashed=not self._runtime.is_stopping())

    def _release(self, *, crashed: bool = False) -> int:
        """End this worker's claims, if it has any; return how often the handler took a worker down."""
        return max(self._runtime.release(self._ids, crashed=crashed), default=0)

    def put_back(self) -> None:
        """Have the message handed over again in a while: at once would be a hot loop while the storage is away."""
        logger.warning("message %s could not be buried, it is handed over again in %.2g s", self.id, _AGAIN)
        self.drop()
        timer = threading.Timer(_AGAIN, self.reject, (True,))
        timer.daemon = True  # what is not back when the worker ends, the broker hands over all the same
        timer.start()

    def _yield(self) -> None:
        """Let go of a delivery that another worker took over, without an ack.

        A transport of kombu's own keeps the other worker's delivery under the same tag: there, any word takes it away.
        """
        self.drop()
        channel = self.message.channel
        if isinstance(channel, VirtualChannel) and not getattr(channel, "tags_are_unique", False):
            self.acknowledged = True
            VirtualQoS.ack(channel.qos, self.message.delivery_tag)
        else:
            super().reject(requeue=True)

    def hold(self) -> None:
        """Have the message's lease renewed from now on. Twice is safe."""
        if not self._is_held and not self.acknowledged:
            self._is_held = True
            self._runtime.keeper.hold(*self._ids)

    def drop(self) -> None:
        """Let the message's lease be. Twice is safe."""
        if self._is_held:
            self._is_held = False
            self._runtime.keeper.drop(*self._ids)

    def read(self) -> Message[Any] | None:
        """Return the message, its data in plain form; None: it is none."""
        if self.hand:
            return self.hand.message
        try:
            return wire.read(self.request_dict, self.args, self.kwargs)
        except MessageError:
            return None


@contextmanager
def _as_far_as_the_pool_can(id: str) -> Iterator[None]:
    """Let run on what a pool cannot end.

    Threads would never run what is to be terminated when they take it up; to a handler in a solo pool, which a signal
    interrupts, it would look like an error of its own.
    """
    try:
        yield
    except NotImplementedError:
        logger.warning("message %s runs on: this pool cannot end what runs", id)


def error_of(exc_info: Any) -> BaseException:
    """Return the error of which a pool tells."""
    error = exc_info.exception
    found: BaseException = error.exc if isinstance(error, ExceptionWithTraceback) else error
    return found


def _is_told(error: BaseException) -> bool:
    """Whether it is how our task, or Celery, tells the end of a message that is settled already."""
    return isinstance(error, (TaskPredicate, Terminated)) or getattr(error, SETTLED, False)
