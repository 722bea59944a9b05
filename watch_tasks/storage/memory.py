"""A storage in the memory of one process: for tests, for the Watcher, and as the plainest of all."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from ..errors import StorageClosedError
from ..record import Counters
from .base import Storage
from .kept import NEVER, Entry
from .memory_kept import MemoryKept
from .protocol import Claim, Commit, Granted, Put, Refused, Replay, Replayed, Settled
from .rules import Rules
from .stored import Stored, StoredRecord

__all__ = ["MemoryStorage"]


class MemoryStorage(Storage):
    """Keeps everything in this process, and forgets it with it.

    Args:
        clock: seconds since the epoch; another one makes time stand still in a test.
    """

    is_shared: ClassVar[bool] = False
    #: What decides.
    rules: ClassVar[type[Rules]] = Rules

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._kept = MemoryKept(clock)
        self._closed = False

    def close(self) -> None:
        self._closed = True

    # -- the protocol

    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        with self._open() as kept:
            rules = self.rules(kept)
            return [rules.claim(claim) for claim in claims]

    def _renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]:
        with self._open() as kept:
            rules = self.rules(kept)
            return {id for id in ids if rules.renew(worker, id, lease)}

    def _commit(self, commits: Sequence[Commit]) -> list[bool]:
        with self._open() as kept:
            rules = self.rules(kept)
            return [rules.commit(commit) is not Settled.REFUSED for commit in commits]

    def _release(self, worker: str, ids: Sequence[str], crashed: bool) -> list[int]:
        with self._open() as kept:
            rules = self.rules(kept)
            return [rules.release(worker, id, crashed) for id in ids]

    def _replay(self, replays: Sequence[Replay]) -> list[tuple[Replayed, int]]:
        with self._open() as kept:
            rules = self.rules(kept)
            return [rules.replay(replay) for replay in replays]

    # -- records

    def _get(self, topic: str, index: str) -> StoredRecord | None:
        with self._open() as kept:
            entry = kept.records.get((topic, index))
        return _stored(topic, index, entry) if entry else None

    def _put(self, puts: Sequence[Put]) -> list[bool]:
        with self._open() as kept:
            rules = self.rules(kept)
            return [rules.put(put) for put in puts]

    def _remove(self, topic: str, indexes: Sequence[str], note: bytes) -> int:
        with self._open() as kept:
            rules = self.rules(kept)
            return sum(rules.remove((topic, index), note) for index in indexes)

    def _scan(self, topic: str, since: float | None, newest_first: bool) -> Iterator[StoredRecord]:
        with self._open() as kept:
            line = kept.by_time[topic]
            start = 0 if since is None else bisect_left(line, (since, ""))
            picked = [(index, kept.records[topic, index]) for _, index in line[start:]]
        for index, entry in reversed(picked) if newest_first else picked:
            yield _stored(topic, index, entry)

    def _len(self, topic: str) -> int:
        with self._open() as kept:
            return len(kept.by_time[topic])

    # -- dead letters

    def _letters(self, topic: str | None, since: float | None) -> Iterator[Stored]:
        with self._open() as kept:
            picked = [
                letter
                for letter in kept.letters.values()
                if topic in (None, letter.topic) and (since is None or letter.at >= since)
            ]
        for letter in reversed(picked):
            yield Stored(letter.at, letter.blob)

    def _letter(self, id: str) -> Stored | None:
        with self._open() as kept:
            letter = kept.letters.get(id)
        return Stored(letter.at, letter.blob) if letter else None

    def _drop_letter(self, id: str, topic: str, index: str | None, note: bytes) -> bool:
        with self._open() as kept:
            return self.rules(kept).drop_letter(id, (topic, index) if index is not None else None, note)

    # -- what happened

    def _story(self, topic: str, index: str) -> Iterator[tuple[float, str, bytes]]:
        with self._open() as kept:
            story = kept.stories.get((topic, index))
            events = list(story.events) if story else []
        yield from events

    def _counters(self, topic: str) -> Counters:
        with self._open() as kept:
            dead = sum(letter.topic == topic for letter in kept.letters.values())
            return Counters(**kept.counts.get(topic, {}), dead=dead)

    def _topics(self) -> set[str]:
        with self._open() as kept:
            return {name for name in kept.counts if name}

    @contextmanager
    def _open(self) -> Iterator[MemoryKept]:
        """Let one thread at a time see what is kept, as it is by now."""
        if self._closed:
            raise StorageClosedError("the storage was closed")
        with self._kept.lock:
            self._kept.begin()
            yield self._kept


def _stored(topic: str, index: str, entry: Entry) -> StoredRecord:
    return StoredRecord(
        topic=topic,
        index=index,
        id=entry.id,
        digest=entry.digest,
        at=entry.at,
        expires=None if entry.expires == NEVER else entry.expires,
        blob=entry.blob,
    )


def open_url(url: str) -> MemoryStorage:
    """Open `memory://`: a new and empty one each time."""
    return MemoryStorage()
