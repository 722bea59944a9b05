"""What a storage in memory keeps: records by time, marks, dead letters, stories and counters, each with its end."""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import StorageClosedError
from ..record import Counters
from .base import Storage, Stored
from .protocol import STORY_LENGTH

__all__ = ["NEVER", "Entry", "Key", "MemoryRecords"]

Key = tuple[str, str]  # topic, index
NEVER: Final = float("inf")


@dataclass(slots=True)
class Entry:
    """A record, with what the protocol asks of it."""

    at: float
    expires: float
    id: str
    first_token: int
    token: int
    digest: str
    blob: bytes


@dataclass(slots=True)
class Mark:
    """That an id is done, where no record says so."""

    token: int
    expires: float


@dataclass(slots=True)
class Story:
    expires: float
    events: deque[tuple[float, str, bytes]] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))


class MemoryRecords(Storage):
    """The part of `MemoryStorage` that keeps and gives back; it decides nothing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._closed = False
        self._last_token = 0
        self._records: dict[Key, Entry] = {}
        self._by_time: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self._marks: dict[str, Mark] = {}
        self._dead_letters: dict[str, tuple[float, str, bytes]] = {}
        self._stories: dict[Key, Story] = {}
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        #: (when, what, which): things whose time may have come.
        self._expiries: list[tuple[float, str, Key | str]] = []
        self._kept: dict[str, dict[Any, Any]] = {
            "record": self._records,
            "mark": self._marks,
            "story": self._stories,
        }

    def close(self) -> None:
        self._closed = True

    # -- records

    def _get(self, topic: str, index: str) -> Stored | None:
        with self._lock:
            self._now()
            entry = self._records.get((topic, index))
            return Stored(entry.at, entry.blob) if entry else None

    def _scan(self, topic: str, since: float | None, newest_first: bool) -> Iterator[Stored]:
        with self._lock:
            self._now()
            line = self._by_time[topic]
            start = 0 if since is None else bisect_left(line, (since, ""))
            picked = [self._records[topic, index] for _, index in line[start:]]
        for entry in reversed(picked) if newest_first else picked:
            yield Stored(entry.at, entry.blob)

    def _len(self, topic: str) -> int:
        with self._lock:
            self._now()
            return len(self._by_time[topic])

    def _store(self, key: Key, entry: Entry) -> None:
        old = self._drop(key)
        if old and old.id != entry.id:
            self._mark(old.id, old.token, old.expires)
        self._records[key] = entry
        line = self._by_time[key[0]]
        line.insert(bisect_left(line, (entry.at, key[1])), (entry.at, key[1]))
        self._expire("record", key, entry.expires)

    def _drop(self, key: Key) -> Entry | None:
        entry = self._records.pop(key, None)
        if entry:
            line = self._by_time[key[0]]
            del line[bisect_left(line, (entry.at, key[1]))]
        return entry

    def _mark(self, id: str, token: int, expires: float) -> None:
        self._marks[id] = Mark(token, expires)
        self._expire("mark", id, expires)

    # -- dead letters

    def _letters(self, topic: str | None, since: float | None) -> Iterator[Stored]:
        with self._lock:
            self._now()
            picked = [
                (at, blob)
                for at, name, blob in self._dead_letters.values()
                if topic in (None, name) and (since is None or at >= since)
            ]
        for at, blob in reversed(picked):
            yield Stored(at, blob)

    def _letter(self, id: str) -> Stored | None:
        with self._lock:
            self._now()
            found = self._dead_letters.get(id)
            return Stored(found[0], found[2]) if found else None

    # -- what happened

    def _story(self, topic: str, index: str) -> Iterator[tuple[float, str, bytes]]:
        with self._lock:
            self._now()
            story = self._stories.get((topic, index))
            events = list(story.events) if story else []
        yield from events

    def _counters(self, topic: str) -> Counters:
        with self._lock:
            self._now()
            counts = self._counts.get(topic, {})
            dead = sum(name == topic for _, name, _ in self._dead_letters.values())
            return Counters(**counts, dead=dead)

    def _topics(self) -> set[str]:
        with self._lock:
            self._now()
            return {name for name in self._counts if name}

    def _notes(
        self, key: Key | None, notes: tuple[tuple[str, bytes], ...], retention: float | None, now: float
    ) -> None:
        for kind, note in notes if key else ():
            self._note(key, now, kind, note, retention, now)  # type: ignore[arg-type]  # checked above

    def _note(self, key: Key, at: float, kind: str, note: bytes, retention: float | None, now: float) -> None:
        expires = now + retention if retention is not None else NEVER
        story = self._stories.get(key)
        if story is None:
            story = self._stories[key] = Story(expires)
            self._expire("story", key, expires)
        story.expires = max(story.expires, expires)
        story.events.append((at, kind, note))

    # -- time

    def _now(self) -> float:
        """Return the time, and forget what it ends."""
        if self._closed:
            raise StorageClosedError("the storage was closed")
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            _, what, which = heapq.heappop(self._expiries)
            kept: dict[object, Entry | Mark | Story] = self._kept[what]
            thing = kept.get(which)
            if thing and thing.expires > now:
                self._expire(what, which, thing.expires)
            elif thing and what == "record":
                self._drop(which)  # type: ignore[arg-type]
            elif thing:
                del kept[which]
        return now

    def _expire(self, what: str, which: Key | str, when: float) -> None:
        if when < NEVER:
            heapq.heappush(self._expiries, (when, what, which))

    def _next_token(self, now: float) -> int:
        self._last_token = max(self._last_token + 1, int(now * 1_000_000))
        return self._last_token
