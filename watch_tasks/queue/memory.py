"""A queue in the memory of one process: for tests, and for a Watcher that smooths peaks within one program."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final
from urllib.parse import parse_qs, urlsplit

from ..errors import ConfigurationError, QueueClosedError, QueueFullError
from ..message import Message
from .base import Delivery, Queue

__all__ = ["MemoryQueue", "open_url"]


class _Delivery(Delivery):
    def __init__(self, queue: MemoryQueue, message: Message[Any]) -> None:
        self.message: Message[Any] = message
        self._queue = queue
        self._is_open = True

    def ack(self) -> None:
        self._is_open = False

    def back(self, delay: float = 0.0) -> None:
        if self._is_open:
            self._queue.push(self.message, delay=delay, bounded=False)
            self._is_open = False


class MemoryQueue(Queue):
    """Keeps messages as the objects they are, in this process, and forgets them with it.

    Args:
        maxsize: messages that may wait, those with a delay included; None: any number. It holds back senders only.
        push_timeout: seconds that a sender waits for room before it is refused.
        clock: monotonic seconds; another one makes delays stand still in a test.
    """

    survives_restart: ClassVar[bool] = False

    def __init__(
        self,
        maxsize: int | None = None,
        *,
        push_timeout: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if maxsize is not None and maxsize < 1:
            raise ValueError(f"`maxsize` must be 1 or more, or None, got {maxsize!r}")
        self._maxsize, self._push_timeout, self._clock = maxsize, push_timeout, clock
        lock = threading.RLock()
        self._came = threading.Condition(lock)
        self._left = threading.Condition(lock)
        self._ready: deque[Message[Any]] = deque()
        #: (when it is due, number that keeps the order of equals, message)
        self._delayed: list[tuple[float, int, Message[Any]]] = []
        self._count = 0
        self._closed = False

    def push(self, message: Message[Any], *, delay: float = 0.0, bounded: bool = True) -> None:
        with self._came:
            if bounded and not self._left.wait_for(self._has_room, self._push_timeout):
                raise QueueFullError(
                    f"the queue holds {self._maxsize} messages, its bound, and none left within "
                    f"{self._push_timeout:.3g} s: send slower, or handle faster"
                )
            self._check_open()
            if delay > 0:
                self._count += 1
                heapq.heappush(self._delayed, (self._clock() + delay, self._count, message))
            else:
                self._ready.append(message)
            self._came.notify()

    def next(self, timeout: float | None = None) -> Delivery | None:
        end = None if timeout is None else time.monotonic() + timeout
        with self._came:
            self._check_open()
            while not self._closed:
                self._ripen()
                if self._ready:
                    message = self._ready.popleft()
                    self._left.notify()
                    return _Delivery(self, message)
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    break
                waits = [wait for wait in (left, self._until_due()) if wait is not None]
                self._came.wait(min(waits, default=None))
        return None

    def len(self) -> int:
        with self._came:
            self._check_open()
            return len(self._ready) + len(self._delayed)

    def clear(self) -> int:
        with self._came:
            count = self.len()
            self._ready.clear()
            self._delayed.clear()
            self._left.notify_all()
            return count

    def close(self) -> None:
        with self._came:
            self._closed = True
            self._came.notify_all()
            self._left.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise QueueClosedError("the queue was closed")

    def _has_room(self) -> bool:
        return self._closed or self._maxsize is None or len(self._ready) + len(self._delayed) < self._maxsize

    def _ripen(self) -> None:
        """Put what is due at the tail."""
        now = self._clock()
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])

    def _until_due(self) -> float | None:
        return self._delayed[0][0] - self._clock() if self._delayed else None


_named: Final[dict[str, MemoryQueue]] = {}
_naming: Final = threading.Lock()


def open_url(url: str) -> MemoryQueue:
    """Open `memory://`: a new one each time; or `memory://name`: the one of that name in this process.

    `?maxsize=100` bounds it; of a named one, its first opener decides.

    Raises:
        ConfigurationError: `maxsize` is no number above 0.
    """
    parts = urlsplit(url)
    size = parse_qs(parts.query).get("maxsize", [None])[-1]
    if size is not None and not (size.isascii() and size.isdigit() and int(size)):
        raise ConfigurationError(f"queue `{url}`: `maxsize` must be a whole number above 0, got {size!r}")
    maxsize = int(size) if size else None
    if not parts.netloc:
        return MemoryQueue(maxsize)
    with _naming:
        queue = _named.get(parts.netloc)
        if queue is None or queue.is_closed:
            queue = _named[parts.netloc] = MemoryQueue(maxsize)
        return queue
