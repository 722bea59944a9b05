"""What the rules see of a storage: the few things that one request concerns, and how these are changed.

A backend that keeps the rules in Python implements `Kept` over its own rows: the memory storage over all it has, a SQL
storage over what a transaction has loaded. Decisions are made in `rules.py`, none here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["NEVER", "Entry", "Events", "Kept", "Key", "Letter", "Mark", "State", "Status"]

Key = tuple[str, str]  # topic, index
#: (when, kind, JSON object with details) of each.
Events = Sequence[tuple[float, str, bytes]]

#: The end of what is kept for ever.
NEVER: Final = float("inf")


class Status(StrEnum):
    """Where an unfinished or dead message stands."""

    RUNNING = "running"
    WAITING = "waiting"
    DEAD = "dead"
    REPLAYING = "replaying"


@dataclass(slots=True)
class State:
    """What is known of an unfinished or dead message. Times are seconds since the epoch, by the storage's clock."""

    id: str
    #: Its topic and index, where they are known.
    key: Key | None
    #: The newest copy known; it may be one that was never published.
    copy: int
    status: Status = Status.WAITING
    #: The newest copy that a delivery brought.
    carried: int = 0
    token: int = 0
    first_token: int = 0
    worker: str = ""
    #: Of the claim that was granted.
    nonce: str = ""
    #: RUNNING: end of the lease. WAITING: when the copy is due. REPLAYING: until when nobody else may.
    until: float = 0.0
    started: bool = False
    #: Claimed under once="index": only while it holds its index may it commit.
    exclusive: bool = False
    crashes: int = 0
    progress: bytes | None = None
    #: When it is forgotten: only where no message waits for it.
    expires: float = NEVER


@dataclass(frozen=True, slots=True)
class Entry:
    """A record, with what the protocol asks of it."""

    at: float
    expires: float
    id: str
    first_token: int
    token: int
    digest: str
    blob: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """That an id is done, where no record says so."""

    token: int
    expires: float


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, of a topic that nobody may know ("": not even by name)."""

    at: float
    topic: str
    blob: bytes


class Kept(ABC):
    """Reads see what was changed before, and nothing whose time is over. A `State` is changed in place, then saved."""

    #: Seconds since the epoch, by the storage's clock; the same for the whole request.
    now: float

    @abstractmethod
    def state(self, id: str) -> State | None: ...

    @abstractmethod
    def save(self, state: State) -> None: ...

    @abstractmethod
    def drop_state(self, id: str) -> None: ...

    @abstractmethod
    def mark(self, id: str) -> Mark | None: ...

    @abstractmethod
    def save_mark(self, id: str, mark: Mark) -> None: ...

    @abstractmethod
    def record(self, key: Key) -> Entry | None: ...

    @abstractmethod
    def save_record(self, key: Key, entry: Entry) -> None: ...

    @abstractmethod
    def drop_record(self, key: Key) -> None: ...

    @abstractmethod
    def holder(self, key: Key) -> str | None:
        """Return the id that holds an index under once="index"."""

    @abstractmethod
    def hold(self, key: Key, id: str) -> None: ...

    @abstractmethod
    def let_go(self, key: Key, id: str) -> None:
        """End that this id holds the index; another's hold stays."""

    @abstractmethod
    def letter(self, id: str) -> Letter | None: ...

    @abstractmethod
    def save_letter(self, id: str, letter: Letter) -> None:
        """Keep a dead letter, as the newest, in place of the one there may be."""

    @abstractmethod
    def drop_letter(self, id: str) -> None: ...

    @abstractmethod
    def count(self, topic: str, name: str | None = None) -> None:
        """Add one to a counter of a topic (handled, duplicates, retries); without a name, only list the topic."""

    @abstractmethod
    def tell(self, key: Key, events: Events, retention: float | None) -> None:
        """Add to the story of an index, which is kept for `retention` seconds from now, or for ever."""

    @abstractmethod
    def next_token(self) -> int:
        """Return a token that is higher than each before, and at least the clock in µs (docs/protocol.md §1)."""
