"""How fast the lines of a file are read, and where Ctrl-C may cut in."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

__all__ = ["Pace", "Stop"]

T = TypeVar("T")

#: Seconds of a rate that may be made up for at once, after a pause of whoever writes the lines.
_CATCH_UP = 0.05


class Pace:
    """Lets so many a second pass at most, evenly.

    Args:
        rate: how many a second; None: any number.
        clock: monotonic seconds.
        sleep: waits some seconds.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._every = 1 / rate if rate else 0.0
        self._clock, self._sleep = clock, sleep
        #: When the next may pass.
        self._due = clock()

    def count(self) -> None:
        """One has passed."""
        self._due = max(self._due, self._clock() - _CATCH_UP) + self._every

    def wait(self) -> None:
        """Return when the next may pass."""
        left = self._due - self._clock()
        if self._every and left > 0:
            self._sleep(left)


class Stop:
    """Has Ctrl-C end the reading of lines between two of them: what was read is still sent, or told.

    A second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self._is_reading = self._is_asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def reading(self, lines: Iterator[T], pace: Pace) -> Iterator[T]:
        """Yield the lines, each when the pace lets it pass.

        Raises:
            KeyboardInterrupt: somebody asked for the end.
        """
        while True:
            self._is_reading = True
            if self._is_asked:
                raise KeyboardInterrupt
            pace.wait()
            line = next(lines, None)
            self._is_reading = False
            if line is None:
                return
            yield line

    def _ask(self, *_: object) -> None:
        if self._is_reading or self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True
