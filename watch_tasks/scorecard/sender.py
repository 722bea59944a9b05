"""A process that sends for one contender, and writes down what was confirmed. Contenders' modules are its programs."""

from __future__ import annotations

import argparse
import math
import signal
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

    end = time.monotonic() + asked.limit

    def deliver(numbers: range) -> range:
        """Send these, or those that there is time for; return which."""
        if not (send_many and asked.batch):
            for number in numbers:
                send(number, asked.work)
            return numbers
        given = 0

        def until_the_limit() -> Iterator[int]:
            nonlocal given
            for given, number in enumerate(numbers, 1):  # noqa: B007 - how many were given is told below
                yield number
                if time.monotonic() > end:
                    return

        send_many(until_the_limit(), asked.work)
        return numbers[:given]

    with asked.file.open("a") as notes:
        _send(deliver, notes, asked, end)


def _send(deliver: Callable[[range], range], notes: IO[str], asked: argparse.Namespace, end: float) -> None:
    """Send in steps of a batch, each when it is due, and note each when it is done."""
    stops: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stops.append(number)

    signal.signal(signal.SIGTERM, stop)
    start, done, size = time.monotonic(), 0, asked.batch or 1
    while not stops and (done < asked.count or not asked.count):
        if asked.rate:
            time.sleep(max(0.0, start + done / asked.rate - time.monotonic()))
        numbers = range(asked.first + done, asked.first + min(done + size, asked.count or done + size))
        before = now()
        sent = deliver(numbers)
        notes.write(note_sent(sent, before, now()))
        if asked.rate:
            notes.flush()
        done += size
        if time.monotonic() > end:
            return
