"""Ends a run when a person or a supervisor asks for it, at a moment at which everything that was started is known."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

__all__ = ["Signals"]

_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """As a context manager: raises KeyboardInterrupt at the first signal, and lets no further one cut cleaning off.

    For the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._held = 0
        self._asked = False

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._end) for number in _NUMBERS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep a signal that comes meanwhile until the end of this: what is being started must not be forgotten."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._asked and not self._held:
            raise KeyboardInterrupt

    def _end(self, number: int, frame: FrameType | None) -> None:
        for each in _NUMBERS:
            signal.signal(each, signal.SIG_IGN)
        self._asked = True
        if not self._held:
            raise KeyboardInterrupt
