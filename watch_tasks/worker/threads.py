"""Deliveries of topics in the threads pool: claimed together, each run by a thread, recorded and acked together.

A thread that claimed, recorded and acked by itself would wait for Python's lock again after each of these: with a
hundred of them that takes longer than the work. So a thread only runs handlers, and takes the next delivery itself.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, ClassVar, Final

from celery.concurrency.base import BasePool, apply_target

from ..work import Work
from .gathering import BEHIND, Gathering
from .hand import Hand
from .request import TopicRequest
from .runtime import Runtime
from .settler import Settler

__all__ = ["ThreadsGathering"]

logger = logging.getLogger(__name__)

#: Seconds that a handled message waits for others, to be recorded with them: while many are handled, enough come
#: during the round trip before.
_MOMENT: Final = 0.0


class ThreadsGathering(Gathering):
    """As in the solo pool, but for who runs the handlers: as many threads of the pool as there is work for.

    Args:
        runtime: of the worker's main process.
        pool: of threads, which it shares with others; see `make_way`.
    """

    _is_free: ClassVar[bool] = True

    def __init__(self, runtime: Runtime, pool: BasePool) -> None:
        super().__init__(runtime, pool)
        self._here = _Here()
        self._lock = threading.Lock()
        #: Threads that take deliveries, or are about to, and how many are asked to let others have the pool.
        self._running = self._asked = 0

    def _make_settler(self) -> Settler[tuple[TopicRequest, Any]]:
        return Settler(self._pipeline.settle, self._recorded, moment=_MOMENT)

    def _turn(self) -> None:
        """Have claimed what came, and threads take what is claimed."""
        if self._claiming and self._claiming.answer.done():
            self._take_claimed()
        if self._arrived and not self._claiming:
            self._claim()
        if self._runtime.is_stopping():
            return  # a cold stop ends the pool first, and the loop runs on for a moment
        with self._lock:
            missing = min(len(self._ready), self._pool.limit - self._running)
            self._running += max(missing, 0)
        for _ in range(missing):
            self._pool.apply_async(self._work, callback=_nothing)

    def make_way(self) -> None:
        """Have one thread go to the end of the pool's queue: what comes into it now must not wait for all of ours."""
        with self._lock:
            self._asked = min(self._asked + 1, self._pool.limit)

    def let_go(self) -> None:
        """Give back what no thread has begun. What runs goes on, and is recorded."""
        claiming, self._claiming = self._claiming, None
        with self._lock:
            left = [*self._ready, *self._arrived]
            self._ready.clear()
            self._arrived.clear()
        self._give_back(left)
        if claiming:
            # Not here: the storage may be away, and the loop has a connection to make.
            self._aside.submit(self._give_back_claimed, claiming)

    def close(self) -> None:
        """Record and ack what is handled."""
        self._aside.shutdown()
        self._settler.close()

    def _give_back_claimed(self, claiming: Any) -> None:
        claiming.take()
        self._give_back(claiming.arrived)

    # -- in a thread of the pool

    def _work(self) -> None:
        """Take deliveries until none is left, or somebody else wants the thread."""
        while found := self._next():
            try:
                self._run(*found)
            except Exception:
                logger.exception("message %s could not be settled, it is handed over again", found[0].id)
                found[0].drop()
            except BaseException:
                with self._lock:
                    self._running -= 1
                raise

    def _next(self) -> tuple[TopicRequest, Hand] | None:
        self._settler.keep_up(BEHIND)
        # What waits at a stop is given back by `let_go`, in a moment.
        is_stopping = self._runtime.is_stopping()
        with self._lock:
            if self._ready and not self._asked and not is_stopping:
                return self._ready.popleft()
            if self._ready and not is_stopping:
                self._asked -= 1
                self._pool.apply_async(self._work, callback=_nothing)
            else:
                self._running -= 1
            return None

    def _run(self, request: TopicRequest, hand: Hand) -> None:
        if not isinstance(hand.begun, Work):
            request.start(self._here, request.on_success)
            return
        # In company until it is recorded: who wants to be alone, because it may take the worker down, waits for that.
        company = self._pipeline.company
        company.__enter__()
        is_put = False

        def ended(answer: Any) -> None:
            nonlocal is_put
            is_put = hand.settlement is not None
            self._ended(request, hand, answer)

        try:
            request.start(self._here, ended)
        finally:
            if hand.settlement:  # something came up after its handlers: they have returned all the same
                ended(None)
            if not is_put:
                company.__exit__()

    # -- in the settler's thread

    def _recorded(self) -> None:
        """Tell Celery what became of messages, now that it is stored: only this acks."""
        for (request, answer), outcome in self._settler.take():
            self._pipeline.company.__exit__()
            try:
                request.settled(outcome, answer)
            except Exception:
                logger.exception("message %s could not be settled, it is handed over again", request.id)
                request.drop()


class _Here:
    """What a request takes for a pool: runs its task in the thread that asks."""

    def apply_async(self, target: Any, args: Any, **callbacks: Any) -> None:
        apply_target(target, args, **callbacks)


def _nothing(answer: Any) -> None:
    """Tell nobody that a thread has no more to do."""
