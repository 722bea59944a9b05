"""What happened, written down outside of what is measured: one line for each message sent, begun and ended.

Each line is one small write to a file opened to append, so that those of many processes stand whole in one file, and
what was written is kept whoever is killed. Times are those of the machine's monotonic clock, which its processes share.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

__all__ = ["BEGUN", "ENDED", "LEDGER", "Effect", "Ledger", "note_sent", "now", "read_sent", "work"]

#: Names the file for what handlers do.
LEDGER: Final = "SCORECARD_LEDGER"

BEGUN: Final = "begun"
ENDED: Final = "ended"


@dataclass(frozen=True, slots=True)
class Effect:
    """One line of a handler."""

    #: BEGUN or ENDED.
    kind: str
    #: Of the message.
    number: int
    #: By `now`.
    at: float
    #: The process group of its worker.
    group: int


def now() -> float:
    """Return the time by the clock that all processes of the machine share, in seconds."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def work(number: int, seconds: float) -> None:
    """Do what every contender's handler does: begin, take so many seconds, end. Without any, it only ends."""
    if seconds:
        _note(BEGUN, number)
        time.sleep(seconds)
    _note(ENDED, number)


def _note(kind: str, number: int) -> None:
    os.write(_handle(), f"{kind} {number} {now():.6f} {os.getpgrp()}\n".encode())


@functools.cache
def _handle() -> int:
    return os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


@dataclass
class Ledger:
    """What handlers wrote to one file, as far as it was read."""

    path: Path
    effects: list[Effect] = field(default_factory=list)
    #: Numbers of the messages that were handled, each once.
    handled: set[int] = field(default_factory=set)
    _read: int = 0

    def read(self) -> Ledger:
        """Read what was added since; only whole lines count. Returns itself."""
        if not self.path.exists():
            return self
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode().splitlines():
            kind, number, at, group = line.split()
            self.effects.append(Effect(kind, int(number), float(at), int(group)))
            if kind == ENDED:
                self.handled.add(int(number))
        return self


def note_sent(numbers: range, before: float, after: float) -> str:
    """Return the lines for messages whose sending was confirmed: when it was asked for, and when it was done."""
    return "".join(f"{number} {before:.6f} {after:.6f}\n" for number in numbers)


def read_sent(path: Path) -> dict[int, tuple[float, float]]:
    """Return what was sent: for each number, when that was asked for and when it was done."""
    text = path.read_text() if path.exists() else ""
    fields = (line.split() for line in text[: text.rfind("\n") + 1].splitlines())
    return {int(number): (float(before), float(after)) for number, before, after in fields}
