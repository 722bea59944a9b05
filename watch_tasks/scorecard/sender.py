"""A process that sends for one contender, and writes down what was confirmed. Contenders' modules are its programs."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from .ledger import note_sent, now

__all__ = ["arguments", "main"]

#: Sends one message: its number, and the seconds that handling it takes.
Send = Callable[[int, float], Any]
#: Sends many of them.
SendMany = Callable[[Iterable[int], float], None]


def arguments(
    file: Path,
    *,
    first: int,
    count: int = 0,
    rate: float = 0.0,
    batch: int = 0,
    limit: float = math.inf,
    work: float = 0.0,
) -> list[str]:
    """Return the arguments for a sender.

    Args:
        file: where it writes what was confirmed.
        first: the number of its first message.
        count: how many it sends; 0: until SIGTERM.
        rate: how many a second; 0: as fast as it can.
        batch: how many at a time; 0: one by one.
        limit: seconds after which it ends, though there would be more.
        work: seconds that handling one takes.
    """
    values = {"first": first, "count": count, "rate": rate, "batch": batch, "limit": limit, "work": work}
    return [str(file), *(f"--{name}={value}" for name, value in values.items())]


def main(send: Send, send_many: SendMany | None = None) -> None:
    """Send as the arguments of this process say.

    Args:
        send: sends one, and returns when the broker has it.
        send_many: sends many, and returns when the broker has them.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--first", type=int)
    parser.add_argument("--count", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--work", type=float)
    asked = parser.parse_args()
    sender = _Sender(send, send_many if asked.batch else None, asked)
    signal.signal(signal.SIGTERM, sender.stop)
    with asked.file.open("a") as notes:
        sender.run(notes)


class _Sender:
    def __init__(self, send: Send, send_many: SendMany | None, asked: argparse.Namespace) -> None:
        self._send = send
        self._send_many = send_many
        self._asked = asked
        self._is_stopped = False
        self._end = math.inf

    def stop(self, number: int, frame: FrameType | None) -> None:
        """End after what is being sent now."""
        self._is_stopped = True

    def run(self, notes: IO[str]) -> None:
        """Send one, which makes the connection, and then the others in steps of a batch, each when it is due."""
        asked, size = self._asked, self._asked.batch or 1
        numbers = range(asked.first, asked.first + asked.count if asked.count else sys.maxsize)
        done = self._deliver(numbers[:1], notes)
        start = time.monotonic()
        self._end = start + asked.limit
        while done < len(numbers) and not self._is_stopped and time.monotonic() < self._end:
            if asked.rate:
                time.sleep(max(0.0, start + done / asked.rate - time.monotonic()))
            done += self._deliver(numbers[done : done + size], notes)

    def _deliver(self, numbers: range, notes: IO[str]) -> int:
        """Send these, in bulk those that there is time for, and note them when that is done; return how many."""
        before, given = now(), 0

        def in_time() -> Iterator[int]:
            nonlocal given
            for given, number in enumerate(numbers, 1):  # noqa: B007 - how many were given is told below
                yield number
                if time.monotonic() > self._end:
                    return

        if self._send_many:
            self._send_many(in_time(), self._asked.work)
        else:
            for number in in_time():
                self._send(number, self._asked.work)
        notes.write(note_sent(numbers[:given], before, now()))
        if self._asked.rate:
            notes.flush()
        return given
