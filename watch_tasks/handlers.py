"""Runs one handler: sync or async, under a timeout, guarded against everything it may raise."""

from __future__ import annotations

import asyncio
import faulthandler
import heapq
import inspect
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from .errors import HandlerExitError, HandlerTimeoutError
from .message import Message
from .topics import Handler

__all__ = ["Interrupts", "close_loop", "run_handler", "watchdog"]

logger = logging.getLogger(__name__)

#: Tells the exceptions by which a driver interrupts a handler, to end its process, from those of the handler itself.
Interrupts = Callable[[BaseException], bool]

#: How many forks lead from the first process to this one. Cheaper than to ask the system who we are.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)

#: Seconds between further cuts, for a handler that caught the first one and went on.
_AGAIN: Final = 1.0


def run_handler(
    handler: Handler,
    message: Message[Any],
    seconds: float | None,
    *,
    batch: Sequence[Message[Any]] | None = None,
    interrupts: Interrupts = lambda error: False,
    kill_after: float | None = None,
) -> Any:
    """Run a handler to its end, or to its deadline, and return what it returned.

    An async handler is cancelled on time everywhere. A sync one is cut off in the main thread (prefork, solo);
    in another thread it cannot be: it is reported at its deadline, and counts as timed out when it returns.

    Args:
        handler: the handler.
        message: what it gets.
        seconds: what is left of the topic's timeout; None: no limit.
        batch: what a batch handler gets; the message is its first.
        interrupts: which exceptions are the driver's own; they pass as they are.
        kill_after: seconds past the deadline after which the process is ended, for a handler that cannot even be
            cut off; only for processes that somebody replaces.

    Raises:
        HandlerTimeoutError: it ran past its deadline.
        HandlerExitError: it raised something that would have ended its thread or process.
        Exception: whatever else it raised.
    """
    started = time.monotonic()
    forks = _forks
    given = message if batch is None else list(batch)
    try:
        if seconds is None:
            result = _call(handler, given, message, None)
        else:
            with _deadline(handler, message, seconds, kill_after):
                result = _call(handler, given, message, seconds)
    except Exception:
        raise
    except BaseException as exc:
        if interrupts(exc):
            raise
        raise HandlerExitError(
            f"handler `{handler.name}` raised {type(exc).__name__}({exc}), which would have ended its worker"
        ) from exc
    finally:
        if _forks != forks:
            # A fork that the handler let run on: the message is its parent's to settle.
            os._exit(1 if sys.exc_info()[0] else 0)
    if seconds is not None and time.monotonic() - started > seconds:
        raise _timed_out(handler, message, seconds)
    return result


def _call(handler: Handler, given: Any, message: Message[Any], seconds: float | None) -> Any:
    result = handler.function(given)
    if result is None:
        return None
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(f"handler `{handler.name}` is a generator, of which nothing was run: it must not yield")
    if inspect.isawaitable(result):
        return _await(result, seconds, lambda left: _timed_out(handler, message, left))
    return result


def _timed_out(handler: Handler, message: Message[Any], seconds: float) -> HandlerTimeoutError:
    return HandlerTimeoutError(
        f"handler `{handler.name}` of topic `{message.topic}` ran past its timeout ({seconds:.3g} s for it)"
    )


@contextmanager
def _deadline(handler: Handler, message: Message[Any], seconds: float, kill_after: float | None) -> Iterator[None]:
    if threading.current_thread() is threading.main_thread():
        with _alarm(lambda: _timed_out(handler, message, seconds), seconds, kill_after):
            yield
    else:
        text = "handler `%s` of topic `%s`, message %s, ran past its timeout and cannot be cut off in a thread"
        with watchdog.report(seconds, lambda: logger.error(text, handler.name, message.topic, message.id)):
            yield


@contextmanager
def _alarm(error: Callable[[], BaseException], seconds: float, kill_after: float | None) -> Iterator[None]:
    """Raise in the main thread after some seconds; needs no Celery limit, so claims and commits are never cut."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise error()

    before = signal.signal(signal.SIGALRM, ring)
    if kill_after is not None:
        # A watchdog below Python: it works while the handler holds the interpreter, in C code for instance.
        faulthandler.dump_traceback_later(seconds + kill_after, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), _AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        # Once more: a cut that falls on the first one must not leave a timer behind, which would end the process.
        signal.setitimer(signal.ITIMER_REAL, 0)
        if kill_after is not None:
            faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


class _Loops(threading.local):
    """One event loop for each thread that runs async handlers, kept from message to message."""

    runner: asyncio.Runner | None = None


_loops = _Loops()


def close_loop() -> None:
    """Close the event loop that this thread's async handlers ran in; for a thread that ends. Twice is safe."""
    runner, _loops.runner = _loops.runner, None
    if runner:
        runner.close()


def _await(result: Awaitable[Any], seconds: float | None, error: Callable[[float], BaseException]) -> Any:
    if seconds is not None and threading.current_thread() is threading.main_thread():
        # The loop cancels on time; the alarm is for handlers that block the loop.
        signal.setitimer(signal.ITIMER_REAL, seconds + _AGAIN, _AGAIN)
    runner = _loops.runner = _loops.runner or asyncio.Runner()
    try:
        return runner.run(_bounded(result, seconds, error))
    except BaseException as exc:
        if isinstance(exc, HandlerTimeoutError) or not isinstance(exc, Exception):
            # A cut from outside may have left the loop in the middle of something.
            _loops.runner = None
            runner.close()
        raise


async def _bounded(result: Awaitable[Any], seconds: float | None, error: Callable[[float], BaseException]) -> Any:
    mine = asyncio.current_task()
    try:
        async with asyncio.timeout(seconds) as scope:
            return await result
    except TimeoutError:
        if seconds is not None and scope.expired():
            raise error(seconds) from None
        raise
    finally:
        left = [task for task in asyncio.all_tasks() if task is not mine]
        for task in left:
            task.cancel()
        if left:
            await asyncio.gather(*left, return_exceptions=True)


class _Watchdog:
    """Calls back at deadlines, from one thread for all."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._running: set[int] = set()
        self._count = 0
        self._thread: threading.Thread | None = None

    @contextmanager
    def report(self, seconds: float, call: Callable[[], None]) -> Iterator[None]:
        with self._wake:
            self._count += 1
            number = self._count
            self._running.add(number)
            heapq.heappush(self._due, (time.monotonic() + seconds, number, call))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="watch-deadlines", daemon=True)
                self._thread.start()
            self._wake.notify()
        try:
            yield
        finally:
            with self._wake:
                self._running.discard(number)

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._due and self._due[0][1] not in self._running:
                    heapq.heappop(self._due)
                left = self._due[0][0] - time.monotonic() if self._due else None
                if left is None or left > 0:
                    self._wake.wait(left)
                    continue
                _, _, call = heapq.heappop(self._due)
            call()


watchdog: Final = _Watchdog()
