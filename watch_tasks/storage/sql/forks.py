"""Keeps a process from forking in the middle of SQLite's work.

SQLite notes in the memory of a process which locks its connections hold. A child that is forked while one of them
writes has that note for ever, takes the file for locked by itself, and can never write. So a fork waits until the
connections of other threads are back, and idle ones are closed before.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from weakref import WeakSet

__all__ = ["ForkGate"]

logger = logging.getLogger(__name__)

#: Seconds that a fork waits at most.
_PATIENCE: Final = 5.0


class ForkGate:
    """Counts the connections in use, and holds them up while its process forks.

    Args:
        close_idle: closes those that nobody uses.
    """

    def __init__(self, close_idle: Callable[[], object]) -> None:
        self._close_idle = close_idle
        self._changed = threading.Condition()
        self._used: Counter[int] = Counter()
        _watch(self)

    def enter(self) -> int:
        """Begin to use a connection; return what `leave` wants to know."""
        thread = threading.get_ident()
        with self._changed:
            self._used[thread] += 1
        return thread

    def leave(self, thread: int) -> None:
        """End it, from any thread."""
        with self._changed:
            self._used[thread] -= 1
            self._changed.notify_all()

    @contextmanager
    def used(self) -> Iterator[None]:
        thread = self.enter()
        try:
            yield
        finally:
            self.leave(thread)

    def shut(self) -> None:
        """Wait until no other thread uses a connection, and let none begin."""
        mine = threading.get_ident()
        self._changed.acquire()
        if not self._changed.wait_for(lambda: not (self._used.total() - self._used[mine]), _PATIENCE):
            logger.warning("forking while SQLite is at work: the child may find its file locked")
        self._close_idle()

    def open(self) -> None:
        """Go on, after the fork."""
        self._changed.release()

    def open_in_child(self) -> None:
        """Go on in the child, which has no connections."""
        self._used.clear()
        self._changed.release()


_gates: WeakSet[ForkGate] = WeakSet()
#: Those that are shut, while this process forks.
_shut: list[ForkGate] = []
_lock = threading.Lock()
_is_watching = False


def _watch(gate: ForkGate) -> None:
    global _is_watching
    with _lock:
        _gates.add(gate)
        if not _is_watching:
            _is_watching = True
            os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)


def _before() -> None:
    _lock.acquire()
    for gate in list(_gates):
        gate.shut()
        _shut.append(gate)


def _after() -> None:
    while _shut:
        _shut.pop().open()
    _lock.release()


def _after_in_child() -> None:
    while _shut:
        _shut.pop().open_in_child()
    _lock.release()
