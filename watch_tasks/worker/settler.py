"""Stores what became of messages while the next ones are handled, from a thread of its own: many in one round trip."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from ..outcome import Outcome
from ..together import settle_each
from ..work import Settlement

__all__ = ["Settler"]

T = TypeVar("T")

#: Seconds that one waits for others at most. A turn of whoever handles messages is shorter, and ends with an `urge`.
_MOMENT: Final = 0.05


class Settler(Generic[T]):
    """Settles what it is given, in order. What comes while one round trip is under way goes with the next.

    A thread, so that no settlement waits for a handler, however long that runs: at most for a moment, in which others
    may come, unless somebody says sooner that nothing comes for now.

    Args:
        settle: stores a group; see `Pipeline.settle`.
        tell: called, in the thread, whenever there are answers to take.
        moment: seconds that one waits for others at most.
    """

    def __init__(
        self,
        settle: Callable[[Sequence[Settlement]], list[Outcome]],
        tell: Callable[[], object],
        *,
        moment: float = _MOMENT,
    ) -> None:
        self._settle, self._tell, self._moment = settle, tell, moment
        self._changed = threading.Condition()
        self._open: list[tuple[T, Settlement, float]] = []
        self._under_way: list[tuple[T, Settlement, float]] = []
        self._answered: list[tuple[T, Outcome | Exception]] = []
        #: Whether nobody is to be waited for, until that is stored.
        self._is_urged = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def put(self, ticket: T, settlement: Settlement) -> None:
        """Have this stored; `take` returns the ticket with what it came to."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watch-settler", daemon=True)
                self._thread.start()
            if not self._open:
                self._changed.notify_all()
            self._open.append((ticket, settlement, time.monotonic()))

    def urge(self) -> None:
        """Wait for no others: store what was put."""
        with self._changed:
            if self._open and not self._is_urged:
                self._is_urged = True
                self._changed.notify_all()

    def take(self) -> list[tuple[T, Outcome | Exception]]:
        """Return what was answered since the last time, in the order in which it was put."""
        with self._changed:
            taken, self._answered = self._answered, []
        return taken

    def age(self) -> float:
        """Return the seconds for which the oldest has been waiting for its answer."""
        with self._changed:
            waiting = self._under_way or self._open
            return time.monotonic() - waiting[0][2] if waiting else 0.0

    def keep_up(self, seconds: float) -> None:
        """Wait while the oldest has been waiting for longer than that."""
        with self._changed:
            while self.age() > seconds:
                self._changed.wait()

    def drain(self) -> None:
        """Wait until everything is answered."""
        self.urge()
        with self._changed:
            while self._open or self._under_way:
                self._changed.wait()

    def close(self) -> None:
        """Wait until everything is answered, and end the thread. Twice is safe; answers can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
            self._thread = None
        self._is_closed = False

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._open and not self._is_closed:
                    self._changed.wait()
                if not self._open:
                    return
                end = self._open[0][2] + self._moment
                while not (self._is_urged or self._is_closed) and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)
                part = self._under_way = self._open
                self._open, self._is_urged = [], False
            answers = settle_each(self._settle, [settlement for _, settlement, _ in part])
            with self._changed:
                self._answered += [(ticket, answer) for (ticket, _, _), answer in zip(part, answers, strict=True)]
                self._under_way = []
                self._changed.notify_all()
            self._tell()
