"""Deliveries of topics where handlers run in the worker's process: claimed together, run one by one, recorded together.

In the solo pool a handler runs between two turns of the event loop, so several deliveries lie in hand when its turn
comes; for threads see `threads.py`. What may be claimed ahead of its handler, and what it costs when the worker is
killed meanwhile, is in docs/protocol.md §5.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple, Protocol, TypeVar

from celery.concurrency.base import BasePool

from ..errors import StorageError
from ..outcome import Outcome
from ..transport.waker import Waker
from ..work import Work
from .hand import Hand
from .request import TopicRequest
from .runtime import Runtime
from .settler import Settler

__all__ = ["BEHIND", "Gatherer", "Gathering"]

logger = logging.getLogger(__name__)

#: Seconds for which messages are handled before the event loop runs again.
_SLICE: Final = 0.01
#: Seconds for which a handled message may wait to be recorded; then nothing is handled until it is.
BEHIND: Final = 1.0

Q = TypeVar("Q")
A = TypeVar("A")
_Deliveries = list[tuple[TopicRequest, Hand]]


class _Claiming(NamedTuple):
    """What is being claimed."""

    arrived: _Deliveries
    #: Those of them that may be claimed ahead.
    ahead: _Deliveries
    answer: Future[list[Work | Outcome | None]]

    def take(self) -> None:
        """Wait for the answer, and put into each hand what it says."""
        try:
            begun = self.answer.result()
        except Exception:
            logger.exception("could not claim %d messages together, claiming them one by one", len(self.ahead))
            return
        for (_, hand), found in zip(self.ahead, begun, strict=True):
            hand.begun = found


class Gatherer(Protocol):
    """Has messages that a worker has in hand claimed, and recorded, together."""

    def takes(self, request: Any) -> bool:
        """Whether a delivery that is due is for it."""

    def add(self, request: TopicRequest) -> None:
        """Take a delivery."""

    def register_with_event_loop(self, loop: Any) -> None:
        """Have this loop give turns. Again after the loop was reset."""

    def make_way(self) -> None:
        """Let something else have the pool."""

    def look_again(self) -> None:
        """See what nobody tells of. Called once a second."""

    def let_go(self) -> None:
        """Let what was not started go back: at a stop, or because the connection was lost."""

    def close(self) -> None:
        """Finish what the pool has handled since it was let go of."""


class Gathering:
    """Takes deliveries as they come, and handles them in that order. Nothing is acked before its commit is answered.

    Args:
        runtime: of the worker's main process.
        pool: runs a task at once, here.
    """

    #: Whether the event loop has other things to do than to wait for a claim.
    _is_free: ClassVar[bool] = False

    def __init__(self, runtime: Runtime, pool: BasePool) -> None:
        self._runtime, self._pool = runtime, pool
        self._pipeline = runtime.pipeline(runtime.worker, can_die=False)
        self._waker = Waker(self._turn)
        #: Not claimed yet; being claimed while others run; and those whose turn it is to run.
        self._arrived: _Deliveries = []
        self._claiming: _Claiming | None = None
        self._ready: deque[tuple[TopicRequest, Hand]] = deque()
        self._aside = ThreadPoolExecutor(1, "watch-claims")
        #: What a request was answered by the tracer, kept until its message is recorded.
        self._settler = self._make_settler()

    def _make_settler(self) -> Settler[tuple[TopicRequest, Any]]:
        return Settler(self._pipeline.settle, self._waker.wake)

    def takes(self, request: Any) -> bool:
        """Whether this is a single message, and not for a batch."""
        return isinstance(request, TopicRequest) and request.hand is not None and not request.task.topic.batch

    def add(self, request: TopicRequest) -> None:
        """Take a delivery."""
        if request.hand is None:
            raise ValueError(f"message {request.id} was not read by the consumer")
        self._arrived.append((request, request.hand))
        self._waker.wake()

    def register_with_event_loop(self, loop: Any) -> None:
        """Have this loop give turns. Again after the loop was reset."""
        self._waker.register(loop)

    def _turn(self) -> None:
        """Ack what was recorded meanwhile, and handle for a moment."""
        self._tell()
        if self._claiming and self._claiming.answer.done():
            self._take_claimed()
        # Not a few while many are ready: the more in one round trip, the less each costs.
        if not self._claiming and len(self._arrived) >= max(len(self._ready), 1):
            self._claim()
        end = time.monotonic() + _SLICE
        while self._ready:
            if self._settler.age() > BEHIND:
                self._settler.drain()
            self._run(*self._ready.popleft())
            if time.monotonic() > end:
                break
        self._settler.urge()
        self._tell()
        if self._ready or (self._arrived and not self._claiming):
            self._waker.wake()

    def let_go(self) -> None:
        """Finish what was handled, and give back what was not: nothing of it is in hand afterwards."""
        self._settler.close()
        self._tell()
        self._take_claimed()
        left = [*self._ready, *self._arrived]
        self._ready.clear()
        self._arrived.clear()
        self._give_back(left)

    def look_again(self) -> None:
        """See what nobody tells of: here nothing is."""

    def make_way(self) -> None:
        """Let something else have the pool: here it has it anyway, between two turns."""

    def close(self) -> None:
        """Finish what the pool has handled since it was let go of."""

    def _give_back(self, left: _Deliveries) -> None:
        claimed = [request.id for request, hand in left if isinstance(hand.begun, Work)]
        try:
            self._runtime.storage.release(self._runtime.worker, claimed)
        except StorageError as exc:
            logger.warning("could not give back %d messages, their leases end by themselves: %s", len(claimed), exc)
        for request, _ in left:
            request.drop()

    # -- before

    def _claim(self) -> None:
        """Claim what may be claimed ahead, in one round trip: while others run, if there are any."""
        arrived, self._arrived = self._arrived, []
        if len(arrived) == 1 and not self._ready:
            self._ready += arrived  # its handler starts at once, so that a crash of it counts
            return
        ahead = [(request, hand) for request, hand in arrived if request.is_new]
        for request, _ in ahead:
            request.hold()
        messages = [hand.message for _, hand in ahead]
        if self._ready or self._is_free:
            answer = self._aside.submit(self._pipeline.begin_ahead, messages)
            answer.add_done_callback(lambda _: self._waker.wake())
            self._claiming = _Claiming(arrived, ahead, answer)
        else:  # a thread would only be waited for
            self._claiming = _Claiming(arrived, ahead, _called(self._pipeline.begin_ahead, messages))
            self._take_claimed()

    def _take_claimed(self) -> None:
        """Wait for the answer to the last claim, if there was one, and have its messages run."""
        claiming, self._claiming = self._claiming, None
        if claiming is None:
            return
        claiming.take()
        self._ready += claiming.arrived

    # -- one by one

    def _run(self, request: TopicRequest, hand: Hand) -> None:
        if hand.begun is None:
            # It may have taken a worker down, or wait for one of those that are not recorded yet.
            self._settler.drain()
            self._tell()
        try:
            request.start(self._pool, partial(self._ended, request, hand))
        finally:
            if hand.settlement:  # something came up after its handlers: they have returned all the same
                self._ended(request, hand, None)

    def _ended(self, request: TopicRequest, hand: Hand, answer: Any) -> None:
        settlement, hand.settlement = hand.settlement, None
        if settlement is None:
            request.on_success(answer)
        else:
            self._settler.put((request, answer), settlement)

    # -- after

    def _tell(self) -> None:
        """Tell Celery what became of messages, now that it is stored: only this acks."""
        for (request, answer), outcome in self._settler.take():
            request.settled(outcome, answer)


def _called(call: Callable[[Q], A], question: Q) -> Future[A]:
    """Return the answer to a call that is made here."""
    answer: Future[A] = Future()
    try:
        answer.set_result(call(question))
    except Exception as exc:  # noqa: BLE001 - told to whoever asks for the answer
        answer.set_exception(exc)
    return answer
