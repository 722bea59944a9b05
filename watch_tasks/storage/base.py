"""The contract of a storage: what remembers the handled, the unfinished and the dead.

The public verbs are written once, here, over primitives that see opaque bytes. A backend implements the primitives
and passes `watch_tasks.testing.StorageSuite`.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from itertools import islice
from typing import Any, ClassVar, Final, Self

import msgspec

from ..errors import ConfigurationError
from ..message import check_index
from ..record import Counters, DeadLetter, Event, Record
from ..schema import load
from ..topics import WEEK, Topic, check_topic
from .protocol import Claim, Commit, Granted, Put, Refused, Replay, Replayed, Settled
from .stored import Stored, StoredRecord, encode_record, letter_of, record_of, time_of

__all__ = ["PAGE", "Storage", "Transaction"]

#: Records and letters that `range`, `dead`, `clear` and `restore` take in one step.
PAGE: Final = 200

_NOTHING: Final = b"{}"


class Transaction(ABC):
    """What a handler writes by `connection`, and what becomes of its message, are stored together or not at all."""

    @property
    @abstractmethod
    def connection(self) -> Any:
        """What the handler writes by."""

    @abstractmethod
    def commit(self, commit: Commit) -> Settled:
        """Settle a message, and commit both. REFUSED or REPEATED: what the handler wrote is undone.

        Raises:
            TransactionLostError: both were stored, or neither: `Storage.was_accepted` tells.
            HandlerTransactionError: the handler left a transaction that cannot be committed. It is undone.
            Exception: the database refused what the handler wrote. It is undone.
        """


class Storage(ABC):
    """Remembers what was handled, by topic and index; who handles what now; and what is dead.

    Every verb may be called from any thread, and by any number of processes where `is_shared` says so. All times
    are the storage's own clock.

    Raises:
        StorageUnavailableError: from every verb: the server does not answer, or refuses to write.
        StorageClosedError: from every verb: `close` was called.
    """

    #: Whether several processes that open the same URL see the same storage.
    is_shared: ClassVar[bool] = True
    #: Whether a handler can write in the transaction that records its message; see `transaction`.
    is_transactional: ClassVar[bool] = False

    # -- handled records

    def get(self, topic: str, index: str) -> Record | None:
        """Return the record of an index, or None where it was never handled or its retention is over."""
        stored = self._get(check_topic(topic), check_index(index))
        return record_of(stored) if stored else None

    def put(self, record: Record, *, retention: float | None = WEEK) -> None:
        """Keep a record as it is, in place of the one there may be. Twice is safe.

        Args:
            record: its `handled_at` decides how long it is still kept.
            retention: seconds after `handled_at` that it is kept; None: for ever.
        """
        self._put([_put(record, retention)])

    def restore(self, records: Iterable[Record]) -> int:
        """Keep records that another storage gave, each until its `expires_at`. Twice is safe.

        Where there is a record of the same index that was handled later, that one stays. Records of handled times that
        grow, as `range(newest_first=False)` gives them, take the least work.

        Args:
            records: read as it goes, some hundred at a time.

        Returns:
            How many of them are kept now. The others were overtaken, or their time is over.
        """
        puts = (_put(record, _retention(record), only_newer=True) for record in records)
        return sum(sum(self._put(page)) for page in iter(lambda: list(islice(puts, PAGE)), []))

    def remove(self, topic: str, index: str, *, by: str = "") -> bool:
        """Forget that an index was handled; redeliveries of the same message stay duplicates.

        Args:
            topic: the topic's name.
            index: the index.
            by: who asks, for the story of the index.

        Returns:
            Whether there was a record.
        """
        return self._remove(check_topic(topic), [check_index(index)], _by(by)) > 0

    def clear(self, topic: str | None = None) -> int:
        """Remove every record, of one topic or of all, and return how many there were."""
        removed = 0
        for name in self._names(topic):
            indexes = (stored.index for stored in self._scan(name, None, False))
            while page := list(islice(indexes, PAGE)):
                removed += self._remove(name, page, _NOTHING)
        return removed

    def len(self, topic: str | None = None) -> int:
        """Return how many records there are, of one topic or of all."""
        return sum(self._len(name) for name in self._names(topic))

    def range(
        self, topic: str | None = None, *, since: datetime | None = None, newest_first: bool = True
    ) -> Iterator[Record]:
        """Yield the records by the time they were handled, in constant memory.

        Those written while it runs may or may not be among them; none comes twice.

        Args:
            topic: one topic, or None for all.
            since: leave out what was handled before.
            newest_first: the order.
        """
        start = since.timestamp() if since else None
        streams = [map(record_of, self._scan(name, start, newest_first)) for name in self._names(topic)]
        return heapq.merge(*streams, key=lambda record: record.handled_at, reverse=newest_first)

    # -- dead letters

    def dead(self, topic: str | None = None, *, since: datetime | None = None) -> Iterator[DeadLetter]:
        """Yield the dead letters, newest first, in constant memory.

        Args:
            topic: one topic, or None for all, also those that nobody knows.
            since: leave out what died before.
        """
        for stored in self._letters(topic, since.timestamp() if since else None):
            yield letter_of(stored)

    def dead_get(self, id: str) -> DeadLetter | None:
        """Return the dead letter of a message, or None."""
        stored = self._letter(id)
        return letter_of(stored) if stored else None

    def dead_remove(self, id: str, *, by: str = "") -> bool:
        """Throw a dead letter away for good; return whether there was one. Redeliveries of it stay duplicates."""
        letter = self.dead_get(id)
        return letter is not None and self._drop_letter(id, letter.topic or "", letter.index, _by(by))

    # -- what happened

    def explain(self, topic: str, index: str) -> Iterator[Event]:
        """Yield the story of an index, oldest event first; at most its newest 200 events."""
        for at, kind, note in self._story(check_topic(topic), check_index(index)):
            yield msgspec.convert(
                {**load(note), "at": time_of(at), "event": kind, "topic": topic, "index": index}, Event
            )

    def counters(self, topic: str) -> Counters:
        """Return what the messages of a topic came to so far."""
        return self._counters(topic)

    def topics(self) -> set[str]:
        """Return the names of all topics that have records, dead letters or counters."""
        return self._topics()

    # -- the protocol

    def claim(self, claim: Claim) -> Granted | Refused:
        """Ask for the right to handle one message. Atomic: of any number that ask at once, one is granted."""
        return self._claim((claim,))[0]

    def claim_many(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        """Ask for many in one round trip. Each is atomic and answered as if asked after those before it."""
        return self._claim(claims) if claims else []

    def renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]:
        """Extend the leases that `worker` holds on these ids to `lease` seconds from now.

        Returns:
            Those it holds. An id it never claimed, finished or lost is not among them, and nothing happens to it.
        """
        return self._renew(worker, ids, lease) if ids else set()

    def commit(self, commit: Commit) -> bool:
        """Settle one message; return False where the token is not the newest: then nothing was changed."""
        return self._commit((commit,))[0]

    def commit_many(self, commits: Sequence[Commit]) -> list[bool]:
        """Settle many in one round trip; each is accepted or refused alone."""
        return self._commit(commits) if commits else []

    def release(self, worker: str, ids: Sequence[str], *, crashed: bool = False) -> list[int]:
        """Give back what `worker` holds of these ids, so that others may claim it at once.

        Args:
            worker: who holds it; claims of others are left alone.
            ids: message ids.
            crashed: count a crash against each whose handlers had started.

        Returns:
            For each id, how often its handler took a worker down so far.
        """
        return self._release(worker, ids, crashed) if ids else []

    def replay_many(self, replays: Sequence[Replay]) -> list[tuple[Replayed, int]]:
        """Ask for the right to publish dead letters again, in one round trip; each is atomic and answered alone.

        An accepted letter stays listed until the copy is claimed. Where its copy was never published, it may be
        replayed again, as the same copy, once the patience of this asking is over.

        Returns:
            For each what became of it, and the number of the copy to publish; 0 where it was not accepted.
        """
        return self._replay(replays) if replays else []

    def misfits(self, topics: Iterable[Topic[Any]]) -> list[str]:
        """Return a complaint for each topic that needs what this storage cannot do."""
        return [
            f"topic `{topic.name}` is transactional, and storage `{self!r}` has no transactions for handlers: use "
            "postgresql://… or sqlite:///…"
            for topic in topics
            if topic.transactional and not self.is_transactional
        ]

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Begin a transaction for one handler; leaving its block without a commit undoes it.

        Raises:
            ConfigurationError: this storage has none: `is_transactional` says so.
            TransactionLostError: the storage does not answer; also in place of an error inside the block that says no
                more than that.
        """
        raise ConfigurationError(f"storage `{self!r}` cannot store in a handler's transaction: use a SQL storage")

    def was_accepted(self, commit: Commit) -> bool:
        """Return whether this very commit holds, though its answer was lost. Waits for transactions under way."""
        raise ConfigurationError(f"storage `{self!r}` cannot store in a handler's transaction: use a SQL storage")

    # -- life

    def tend(self) -> None:
        """Forget some of what is over: a bounded amount, in milliseconds. Workers call it every few seconds.

        Nothing that is over is seen any more, tended or not; this is for the room it takes. By default there is
        nothing to do.
        """

    def check(self) -> list[tuple[str, bool, str, str]]:
        """Return what a person should know before trusting this storage: (check, ok, detail, fix) each."""
        return []

    def migrations(self) -> list[str]:
        """Return what `migrate` would run, each as a statement or a sentence; empty: the storage is up to date."""
        return []

    def migrate(self) -> list[str]:
        """Bring what is kept to the form that this version needs, and return what was run. Twice is safe."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Let go of connections. Twice is safe. What was kept stays kept, where the backend survives its process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- primitives of a backend

    @abstractmethod
    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]: ...

    @abstractmethod
    def _renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]: ...

    @abstractmethod
    def _commit(self, commits: Sequence[Commit]) -> list[bool]: ...

    @abstractmethod
    def _release(self, worker: str, ids: Sequence[str], crashed: bool) -> list[int]: ...

    @abstractmethod
    def _replay(self, replays: Sequence[Replay]) -> list[tuple[Replayed, int]]: ...

    @abstractmethod
    def _get(self, topic: str, index: str) -> StoredRecord | None: ...

    @abstractmethod
    def _put(self, puts: Sequence[Put]) -> list[bool]: ...

    @abstractmethod
    def _remove(self, topic: str, indexes: Sequence[str], note: bytes) -> int: ...

    @abstractmethod
    def _scan(self, topic: str, since: float | None, newest_first: bool) -> Iterator[StoredRecord]: ...

    @abstractmethod
    def _len(self, topic: str) -> int: ...

    @abstractmethod
    def _letters(self, topic: str | None, since: float | None) -> Iterator[Stored]: ...

    @abstractmethod
    def _letter(self, id: str) -> Stored | None: ...

    @abstractmethod
    def _drop_letter(self, id: str, topic: str, index: str | None, note: bytes) -> bool: ...

    @abstractmethod
    def _story(self, topic: str, index: str) -> Iterator[tuple[float, str, bytes]]: ...

    @abstractmethod
    def _counters(self, topic: str) -> Counters: ...

    @abstractmethod
    def _topics(self) -> set[str]: ...

    def _names(self, topic: str | None) -> list[str]:
        return sorted(self._topics()) if topic is None else [check_topic(topic)]


def _put(record: Record, retention: float | None, *, only_newer: bool = False) -> Put:
    return Put(
        topic=check_topic(record.topic),
        index=check_index(record.index),
        id=record.id,
        digest=record.digest,
        at=record.handled_at.timestamp(),
        retention=retention,
        blob=encode_record(record),
        only_newer=only_newer,
    )


def _retention(record: Record) -> float | None:
    return (record.expires_at - record.handled_at).total_seconds() if record.expires_at else None


def _by(by: str) -> bytes:
    return msgspec.json.encode({"by": by}) if by else _NOTHING
