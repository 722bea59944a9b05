"""What waits to be handled together with others of its topic: until it is enough, or the first has waited enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from .topics import BatchHandler

__all__ = ["Collection"]

T = TypeVar("T")


class Collection(Generic[T]):
    """Things by topic, in the order they came. For one thread.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Topic → what waits, how many are enough, and when its first has waited for long enough.
        self._waiting: dict[str, tuple[list[T], int, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, topic: str, handler: BatchHandler, thing: T) -> None:
        """Take a thing in; the first of its topic decides how many are enough, and how long it waits."""
        waiting = self._waiting.get(topic)
        if waiting is None:
            waiting = self._waiting[topic] = ([], handler.size, self._clock() + handler.seconds)
        waiting[0].append(thing)

    def take_due(self) -> list[list[T]]:
        """Take out, topic by topic, what need not wait any longer."""
        now = self._clock()
        due = [topic for topic, (things, size, until) in self._waiting.items() if len(things) >= size or now >= until]
        return [self._waiting.pop(topic)[0] for topic in due]

    def take_all(self) -> list[T]:
        """Take out everything."""
        waiting, self._waiting = self._waiting, {}
        return [thing for things, _, _ in waiting.values() for thing in things]

    def seconds(self, most: float) -> float:
        """Return the seconds until something is due by its time, if that is sooner than `most`."""
        now = self._clock()
        return min([most, *(max(until - now, 0.0) for _, _, until in self._waiting.values())])
