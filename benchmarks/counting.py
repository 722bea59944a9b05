"""Counts what is handled, over all processes of a worker, at the cost of two numbers written to mapped memory.

A handler calls `seen`; whoever measures reads a `Tally`. Each process has a file of its own in the folder `RESULT`,
so that nothing is asked of a server and a killed process loses nothing. Times are of the clock that all processes of a
machine share, CLOCK_MONOTONIC.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

#: Messages that one process can count: its file has no more than that. Where nobody reads them, so many are plenty.
SLOTS = int(os.environ.get("RESULT_SLOTS", "1000000"))
#: Bytes of a slot: what the message said, and when it was handled.
SLOT = 16

_lock = threading.Lock()
_numbers: Iterator[int] = iter(())
_sheet: memoryview | None = None


def seen(value: float) -> None:
    """Count one message. `value` is what it carried: its number, or when it was sent. Those past the last slot write
    over the first ones.
    """
    sheet = _sheet or _open_sheet()
    slot = 2 * (next(_numbers) % SLOTS)
    sheet[slot] = value
    sheet[slot + 1] = time.monotonic()


def _open_sheet() -> memoryview:
    global _sheet, _numbers
    with _lock:
        if _sheet is None:
            path = Path(os.environ["RESULT"]) / str(os.getpid())
            with path.open("w+b") as file:
                file.truncate(SLOTS * SLOT)
                mapped = mmap.mmap(file.fileno(), SLOTS * SLOT)
            _numbers = count()
            _sheet = memoryview(mapped).cast("d")
        return _sheet


def _forget_sheet() -> None:
    """A forked child counts on a sheet of its own."""
    global _sheet, _lock
    _sheet, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_sheet)


@dataclass(frozen=True, slots=True)
class Handled:
    """One call of a handler."""

    process: int
    value: float
    #: Seconds of the monotonic clock.
    at: float


class Tally:
    """What the processes that count into a folder have counted so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handled: list[Handled] = []
        self._read: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.handled)

    def update(self) -> int:
        """Read what is new; return how many calls there have been."""
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                file.seek(self._read.get(path.name, 0))
                while block := array("d", file.read(SLOT * 4096)):
                    new = 0
                    for value, at in zip(block[::2], block[1::2], strict=True):
                        if not at:
                            break
                        self.handled.append(Handled(int(path.name), value, at))
                        new += 1
                    self._read[path.name] = self._read.get(path.name, 0) + new * SLOT
                    if new * 2 < len(block):
                        break
        return len(self)

    def clear(self) -> None:
        """Forget what was counted until now."""
        self.update()
        self.handled.clear()

    def distinct(self) -> int:
        """Return how many different messages were handled."""
        return len({one.value for one in self.handled})


def rate(handled: list[Handled]) -> tuple[float, float]:
    """Return the messages a second from the moment when every process was at work to the last message.

    Processes do not start at the same time, and what one did before the others would count as if all had.

    Returns:
        The rate, and the part of all messages that it is of.

    Raises:
        ValueError: too few messages.
    """
    firsts: dict[int, float] = {}
    for one in handled:
        firsts[one.process] = min(one.at, firsts.get(one.process, one.at))
    start = max(firsts.values(), default=0.0)
    later = [one.at for one in handled if one.at > start]
    if not later:
        raise ValueError(f"{len(handled)} messages in {len(firsts)} processes are too few for a rate")
    return len(later) / (max(later) - start), len(later) / len(handled)
