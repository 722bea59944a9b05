"""Has an event loop of kombu's turn once more, from any thread and from inside the loop."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["Waker"]


class Waker:
    """Calls back in the loop, soon. However often it is woken before that, it calls once.

    A pipe that the loop reads: its own `call_soon` is looked at before it waits, so that what is called from inside a
    turn comes after the next event, whenever that is.

    Args:
        call: called in the loop's thread; what was done before `wake` is seen by it.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._is_due = False
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
            weakref.finalize(self, os.close, end)

    def register(self, loop: Any) -> None:
        """Have this loop call. Again after the loop was reset."""
        self._is_due = False
        loop.add_reader(self._read, self._turn)
        self.wake()

    def wake(self) -> None:
        """Have the loop call."""
        if not self._is_due:
            self._is_due = True
            os.write(self._write, b"\0")

    def _turn(self) -> None:
        # In this order: woken in between, it is not due again, but called now.
        with suppress(BlockingIOError):
            os.read(self._read, 1024)
        self._is_due = False
        self._call()
