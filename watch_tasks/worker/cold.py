"""Celery's cold stop, at a turn of the event loop.

Celery does it in the handler of the signal, wherever that finds the main thread: also where it has a lock that the stop
needs, or has read half of a frame of the broker's, of which the stop reads the rest as something else. With messages
under way, one stop in six hung by that.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Final

from ..transport.waker import Waker

__all__ = ["ColdStop"]

#: What may be bound to it: SIGTERM, by REMAP_SIGTERM, and SIGINT when it comes again.
_SIGNALS: Final = (signal.SIGQUIT, signal.SIGTERM, signal.SIGINT)
#: The name that Celery gives its handler.
_HANDLER: Final = "worker_Cold"


class ColdStop:
    """Has the loop do what Celery's handlers would do at once.

    Args:
        noticed: called in the signal's handler.
        before: called before the stop, at the loop's turn.
    """

    def __init__(self, noticed: Callable[[], object], before: Callable[[], object]) -> None:
        self._noticed, self._before = noticed, before
        self._pid = os.getpid()
        self._waker = Waker(self._turn)
        self._asked: Callable[[], object] | None = None
        self._is_looping = False

    def register_with_event_loop(self, loop: Any) -> None:
        """Have this loop do it. Again after the loop was reset."""
        self._waker.register(loop)
        self._is_looping = True
        if threading.current_thread() is not threading.main_thread():
            return  # nobody else can bind signals
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and getattr(handler, "__name__", "") == _HANDLER:
                signal.signal(number, self._later(handler))

    def let_go(self) -> None:
        """The loop does not run: a signal is handled where it comes."""
        self._is_looping = False
        self._turn()

    def _later(self, handler: Callable[..., object]) -> Callable[..., object]:
        def handle(number: int, frame: Any) -> None:
            # Asked again, whatever keeps the loop from its turn shall not keep the worker from ending.
            if self._is_looping and self._asked is None and os.getpid() == self._pid:
                self._asked = lambda: handler(number, None)
                self._noticed()
                self._waker.wake()
            else:
                handler(number, frame)

        return handle

    def _turn(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            self._is_looping = False
            self._before()
            asked()
