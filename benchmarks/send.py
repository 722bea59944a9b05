"""Sends messages by one contender's library, in a process of its own, and tells how long that took.

BROKER=redis://… python -m benchmarks.send stock noop 1000 --in-bulk
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

#: Messages that are sent before time is taken: connections, caches.
WARM_UP = 20


class Bodies:
    """What messages carry, and when the sender asked for it: at the first, at the first that counts, and at the end."""

    def __init__(self, count: int, first: int, payload: int, rate: float | None, skip: int) -> None:
        self.count = count
        self.first = first
        self.payload = ["x" * payload] if payload else []
        self.rate = rate
        self.skip = skip
        self.begun = self.ended = 0.0

    def __iter__(self) -> Iterator[list[Any]]:
        due = time.monotonic()
        for number in range(self.count):
            if number == self.skip:
                self.begun = time.monotonic()
            if self.rate:
                due += 1 / self.rate
                time.sleep(max(0.0, due - time.monotonic()))
                yield [time.monotonic(), *self.payload]
            else:
                yield [self.first + number, *self.payload]
        self.ended = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("work")
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0, help="number of the first message")
    parser.add_argument("--payload", type=int, default=0, help="bytes of each")
    parser.add_argument("--in-bulk", action="store_true")
    parser.add_argument("--rate", type=float, help="messages a second; they carry when they were sent")
    chosen = parser.parse_args()
    contender = import_module(f"benchmarks.contenders.{chosen.module}")
    # What is sent in bulk is asked for before it is sent, so that no message of it can be told to be the first.
    skip = 0 if chosen.in_bulk else min(WARM_UP, chosen.count // 2)
    bodies = Bodies(chosen.count, chosen.first, chosen.payload, chosen.rate, skip)
    (contender.send_many if chosen.in_bulk else contender.send)(chosen.work, bodies)
    ended = time.monotonic() if chosen.in_bulk else bodies.ended
    print(json.dumps({"rate": (chosen.count - skip) / (ended - bodies.begun)}))


if __name__ == "__main__":
    main()
