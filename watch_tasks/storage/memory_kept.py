"""What a storage in memory keeps: records by time, marks, dead letters, stories and counters, each with its end."""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .kept import NEVER, Entry, Events, Kept, Key, Letter, Mark, State
from .protocol import STORY_LENGTH

__all__ = ["MemoryKept"]


@dataclass(slots=True)
class Story:
    """The newest events of an index."""

    expires: float
    events: deque[tuple[float, str, bytes]] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))


class MemoryKept(Kept):
    """Everything, for ever the same object. Whoever uses it holds its `lock`, and calls `begin` first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self.now = 0.0
        self.states: dict[str, State] = {}
        self.marks: dict[str, Mark] = {}
        self.records: dict[Key, Entry] = {}
        self.by_time: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.letters: dict[str, Letter] = {}
        self.stories: dict[Key, Story] = {}
        self.counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._clock = clock
        self._holders: dict[Key, str] = {}
        self._last_token = 0
        #: (when, what, which): things whose time may have come.
        self._expiries: list[tuple[float, str, Key | str]] = []
        self._ending: dict[str, dict[Any, Any]] = {
            "state": self.states,
            "record": self.records,
            "mark": self.marks,
            "story": self.stories,
        }

    def begin(self) -> None:
        """Take the time, and forget what it ends."""
        self.now = self._clock()
        while self._expiries and self._expiries[0][0] <= self.now:
            _, what, which = heapq.heappop(self._expiries)
            ending: dict[Any, State | Entry | Mark | Story] = self._ending[what]
            thing = ending.get(which)
            if thing and thing.expires > self.now:
                self._expire(what, which, thing.expires)
            elif thing and what == "record":
                self.drop_record(which)  # type: ignore[arg-type]  # its keys are those of records
            elif thing:
                del ending[which]

    def state(self, id: str) -> State | None:
        return self.states.get(id)

    def save(self, state: State) -> None:
        self.states[state.id] = state
        self._expire("state", state.id, state.expires)

    def drop_state(self, id: str) -> None:
        del self.states[id]

    def mark(self, id: str) -> Mark | None:
        return self.marks.get(id)

    def save_mark(self, id: str, mark: Mark) -> None:
        self.marks[id] = mark
        self._expire("mark", id, mark.expires)

    def record(self, key: Key) -> Entry | None:
        return self.records.get(key)

    def save_record(self, key: Key, entry: Entry) -> None:
        self.drop_record(key)
        self.records[key] = entry
        line = self.by_time[key[0]]
        line.insert(bisect_left(line, (entry.at, key[1])), (entry.at, key[1]))
        self._expire("record", key, entry.expires)

    def drop_record(self, key: Key) -> None:
        entry = self.records.pop(key, None)
        if entry:
            line = self.by_time[key[0]]
            del line[bisect_left(line, (entry.at, key[1]))]

    def holder(self, key: Key) -> str | None:
        return self._holders.get(key)

    def hold(self, key: Key, id: str) -> None:
        self._holders[key] = id

    def let_go(self, key: Key, id: str) -> None:
        if self._holders.get(key) == id:
            del self._holders[key]

    def letter(self, id: str) -> Letter | None:
        return self.letters.get(id)

    def save_letter(self, id: str, letter: Letter) -> None:
        self.letters.pop(id, None)  # so that they stay in the order of their times
        self.letters[id] = letter

    def drop_letter(self, id: str) -> None:
        self.letters.pop(id, None)

    def count(self, topic: str, name: str | None = None) -> None:
        counts = self.counts[topic]
        if name:
            counts[name] += 1

    def tell(self, key: Key, events: Events, retention: float | None) -> None:
        expires = self.now + retention if retention is not None else NEVER
        story = self.stories.get(key)
        if story is None:
            story = self.stories[key] = Story(expires)
            self._expire("story", key, expires)
        story.expires = max(story.expires, expires)
        story.events.extend(events)

    def next_token(self) -> int:
        self._last_token = max(self._last_token + 1, int(self.now * 1_000_000))
        return self._last_token

    def _expire(self, what: str, which: Key | str, when: float) -> None:
        if when < NEVER:
            heapq.heappush(self._expiries, (when, what, which))
