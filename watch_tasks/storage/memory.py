"""A storage in the memory of one process: for tests, for the Watcher, and as the plainest form of the rules."""

from __future__ import annotations

import heapq
import threading
import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from ..errors import StorageClosedError
from ..record import Counters, Record
from ..topics import WEEK
from .base import Storage, Stored
from .protocol import STORY_LENGTH, Claim, Commit, Granted, Refusal, Refused, Step

__all__ = ["MemoryStorage"]

_Key = tuple[str, str]  # topic, index
_NEVER = float("inf")


class _Status(StrEnum):
    RUNNING = "running"
    WAITING = "waiting"
    DEAD = "dead"
    REPLAYING = "replaying"


@dataclass(slots=True)
class _State:
    """What is known of an unfinished message."""

    key: _Key | None
    copy: int
    status: _Status
    #: The newest copy that a delivery brought; `copy` may be one that was never published.
    carried: int = 0
    token: int = 0
    first_token: int = 0
    worker: str = ""
    #: Of the claim that was granted.
    nonce: str = ""
    #: RUNNING: end of the lease. WAITING: when the copy is due.
    until: float = 0.0
    started: bool = False
    #: Claimed under once="index": only while it holds its index may it commit.
    exclusive: bool = False
    crashes: int = 0
    progress: bytes | None = None
    #: When it is forgotten: only where no message waits for it.
    expires: float = _NEVER


@dataclass(slots=True)
class _Entry:
    """A record, with what the protocol asks of it."""

    at: float
    expires: float
    id: str
    first_token: int
    token: int
    digest: str
    blob: bytes


@dataclass(slots=True)
class _Mark:
    """That an id is done, where no record says so."""

    token: int
    expires: float


@dataclass(slots=True)
class _Story:
    expires: float
    events: deque[tuple[float, str, bytes]] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))


class MemoryStorage(Storage):
    """Keeps everything in this process, and forgets it with it.

    Args:
        clock: seconds since the epoch; another one makes time stand still in a test.
    """

    is_shared: ClassVar[bool] = False

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._closed = False
        self._last_token = 0
        self._records: dict[_Key, _Entry] = {}
        self._by_time: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self._states: dict[str, _State] = {}
        self._holders: dict[_Key, str] = {}
        self._marks: dict[str, _Mark] = {}
        self._dead_letters: dict[str, tuple[float, str, bytes]] = {}
        self._stories: dict[_Key, _Story] = {}
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        #: (when, what, which): records, marks, states and stories whose time may have come.
        self._expiries: list[tuple[float, str, _Key | str]] = []
        self._kept: dict[str, dict[Any, Any]] = {
            "record": self._records,
            "mark": self._marks,
            "state": self._states,
            "story": self._stories,
        }

    def close(self) -> None:
        self._closed = True

    # -- the protocol

    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        with self._lock:
            now = self._now()
            return [self._claim_one(claim, now) for claim in claims]

    def _claim_one(self, claim: Claim, now: float) -> Granted | Refused:
        key = (claim.topic, claim.index)
        record, state = self._records.get(key), self._states.get(claim.id)
        if (record and record.id == claim.id) or claim.id in self._marks:
            self._forget(claim.id)
            return self._refuse(claim, Refusal.DUPLICATE, now)
        copy = claim.copy
        if state:
            if self._is_asked_again(claim, state):
                state.until = now + claim.lease
                return Granted(state.token, state.copy, state.progress, state.crashes, now)
            refused = self._check_copy(claim, state, now)
            if refused:
                return refused
            copy = max(copy, state.copy)
        if claim.once == "index":
            if record and record.digest != claim.digest:
                return self._refuse(claim, Refusal.CONFLICT, now)
            if record:
                self._forget(claim.id)
                return self._refuse(claim, Refusal.DUPLICATE, now)
            rival = self._rival(key, claim.id, now)
            if rival:
                return self._refuse(claim, Refusal.BUSY, now, rival.until - now)
            self._holders[key] = claim.id
        if state is None:
            self._note(key, claim.sent_at, "sent", claim.note, claim.retention, now)
            state = self._states[claim.id] = _State(key, copy, _Status.WAITING)
        elif state.status in (_Status.REPLAYING, _Status.DEAD):
            # The replay arrived: it starts afresh, and its letter need not be listed any longer.
            self._dead_letters.pop(claim.id, None)
            state.crashes, state.progress = 0, None
        elif state.status is _Status.RUNNING and state.copy == copy and state.started:
            state.crashes += 1
        token = self._next_token(now)
        state.key, state.copy, state.status, state.token = key, copy, _Status.RUNNING, token
        state.carried = max(state.carried, claim.copy)
        state.first_token = state.first_token or token
        state.worker, state.until, state.started = claim.worker, now + claim.lease, claim.started
        state.nonce, state.exclusive, state.expires = claim.nonce, claim.once == "index", _NEVER
        self._note(key, now, "attempt", claim.note, claim.retention, now)
        return Granted(token, copy, state.progress, state.crashes, now)

    def _is_asked_again(self, claim: Claim, state: _State) -> bool:
        """Whether this very claim was granted, and its answer lost: refused now, it would count as a crash later."""
        same = bool(claim.nonce) and (claim.worker, claim.nonce) == (state.worker, state.nonce)
        return same and self._is_held(claim.id, state)

    def _check_copy(self, claim: Claim, state: _State, now: float) -> Refused | None:
        """Compare a delivery's copy with the newest known one; None: it may be claimed."""
        older, same = claim.copy < state.copy, claim.copy == state.copy
        match state.status:
            case _Status.RUNNING | _Status.WAITING if claim.copy < state.carried:
                return Refused(Refusal.STALE)
            case _Status.DEAD if older or same:
                return self._refuse(claim, Refusal.DUPLICATE, now)
            case _Status.REPLAYING if older:
                return self._refuse(claim, Refusal.DUPLICATE, now)
            case _Status.WAITING if older and now < state.until + claim.lease:
                # Its retry may still be published; afterwards this delivery stands in for it.
                return self._refuse(claim, Refusal.BUSY, now, state.until + claim.lease - now)
            case _Status.RUNNING if now < state.until:
                # An older copy too: it may be the one that stands in, handed over once more.
                return self._refuse(claim, Refusal.BUSY, now, state.until - now)
        return None

    def _rival(self, key: _Key, id: str, now: float) -> _State | None:
        """Return the other message that runs under this index, if there is one."""
        holder = self._holders.get(key, id)
        state = self._states.get(holder) if holder != id else None
        return state if state and state.status is _Status.RUNNING and now < state.until else None

    def _refuse(self, claim: Claim, why: Refusal, now: float, seconds: float = 0.0) -> Refused:
        if why is Refusal.DUPLICATE:
            self._counts[claim.topic]["duplicates"] += 1
        if why is not Refusal.CONFLICT:
            event = "busy" if why is Refusal.BUSY else "suppressed"
            self._note((claim.topic, claim.index), now, event, claim.note, claim.retention, now)
        return Refused(why, seconds)

    def _renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]:
        with self._lock:
            now = self._now()
            held = set()
            for id in ids:
                state = self._states.get(id)
                if state and state.worker == worker and self._is_held(id, state):
                    state.until = now + lease
                    held.add(id)
            return held

    def _release(self, worker: str, ids: Sequence[str], crashed: bool) -> list[int]:
        with self._lock:
            now = self._now()
            counts = []
            for id in ids:
                state = self._states.get(id) or _State(None, 0, _Status.WAITING, until=now)
                if not state.token:
                    state.crashes += crashed
                    if crashed and state.status is _Status.WAITING:
                        # Never claimed, under once="none", or done: nothing else ends what is known of it.
                        self._states[id] = state
                        self._expire_state(id, state, now)
                elif state.status is _Status.RUNNING and state.worker == worker:
                    state.crashes += crashed and state.started
                    self._give_up(id, state)
                    state.status, state.until = _Status.WAITING, now
                counts.append(state.crashes)
            return counts

    def _commit(self, commits: Sequence[Commit]) -> list[bool]:
        with self._lock:
            now = self._now()
            return [self._commit_one(commit, now) for commit in commits]

    def _commit_one(self, commit: Commit, now: float) -> bool:
        state = self._states.get(commit.id)
        key = (commit.topic, commit.index) if commit.index is not None else None
        if commit.token is None:
            if commit.step is Step.DEAD and self._is_settled(key, commit, state):
                return True
        elif not self._may_settle(commit, state):
            if self._is_repeated(commit, state, key):
                return True
            self._notes(key, (("fenced", commit.notes[-1][1] if commit.notes else b"{}"),), commit.retention, now)
            return False
        match commit.step:
            case Step.HANDLED:
                self._finish(commit, state, now)
            case Step.RETRY | Step.SNOOZED | Step.RELEASED if state and commit.token is not None:
                is_next = commit.step is not Step.RELEASED
                state.copy, state.progress = commit.copy + is_next, commit.blob
                state.status, state.until = _Status.WAITING, now + commit.delay
                self._give_up(commit.id, state)
            case Step.DEAD:
                self._bury(commit, state, now)
            case Step.MARK if state and commit.token is not None:
                state.progress = commit.blob
        if commit.step is Step.RETRY:
            self._counts[commit.topic]["retries"] += 1
        self._notes(key, commit.notes, commit.retention, now)
        return True

    def _may_settle(self, commit: Commit, state: _State | None) -> bool:
        return state is not None and state.token == commit.token and self._is_held(commit.id, state)

    def _is_held(self, id: str, state: _State) -> bool:
        """Whether nobody took it over. An expired lease that nobody took over still counts."""
        return state.status is _Status.RUNNING and (
            not state.exclusive or state.key is None or self._holders.get(state.key) == id
        )

    def _is_repeated(self, commit: Commit, state: _State | None, key: _Key | None) -> bool:
        """Whether this very commit was accepted before, and its answer lost."""
        if commit.step is Step.HANDLED:
            record, mark = self._records.get(key) if key else None, self._marks.get(commit.id)
            return bool(
                (record and record.id == commit.id and record.token == commit.token)
                or (mark and mark.token == commit.token)
            )
        if not state or state.token != commit.token:
            return False
        match commit.step:
            case Step.RETRY | Step.SNOOZED:
                return state.status is _Status.WAITING and state.copy == commit.copy + 1
            case Step.RELEASED:
                return state.status is _Status.WAITING and state.copy == commit.copy
            case Step.DEAD:
                return state.status is _Status.DEAD
        return False

    def _is_settled(self, key: _Key | None, commit: Commit, state: _State | None) -> bool:
        """Whether a burial without claim comes too late: an id is buried once, and not after it was done."""
        record, id = self._records.get(key) if key else None, commit.id
        is_dead = state and state.status is _Status.DEAD and commit.copy <= state.copy
        return bool(is_dead or id in self._dead_letters or id in self._marks or (record and record.id == id))

    def _finish(self, commit: Commit, state: _State | None, now: float) -> None:
        key = (commit.topic, commit.index or "")
        token = commit.token if commit.token is not None else self._next_token(now)
        first = state.first_token if state and state.first_token else token
        expires = now + commit.retention if commit.retention is not None else _NEVER
        old = self._records.get(key)
        if old and old.id != commit.id and self._is_newer(old, first):
            # A newer message of this index was handled while this one ran: it keeps the record.
            self._mark(commit.id, token, expires)
        else:
            self._store(key, _Entry(now, expires, commit.id, first, token, commit.digest, commit.blob))
        self._counts[commit.topic]["handled"] += 1
        self._forget(commit.id)

    def _is_newer(self, record: _Entry, first_token: int) -> bool:
        return record.first_token > first_token

    def _bury(self, commit: Commit, state: _State | None, now: float) -> None:
        self._dead_letters.pop(commit.id, None)  # so that they stay in the order of their times
        self._dead_letters[commit.id] = (now, commit.topic, commit.blob)
        self._counts[commit.topic]  # so that the topic is listed
        if commit.token is None and state and state.status is _Status.RUNNING and now < state.until:
            return  # somebody handles a readable message of that id: leave it to them
        if state is None:
            key = (commit.topic, commit.index) if commit.index is not None else None
            state = self._states[commit.id] = _State(key, commit.copy, _Status.DEAD)
        elif commit.token is None and state.token:
            state.token = self._next_token(now)  # it takes over: an older claim settles nothing any more
        state.copy, state.status, state.expires = max(state.copy, commit.copy), _Status.DEAD, _NEVER
        self._give_up(commit.id, state)

    def _forget(self, id: str) -> None:
        """It is done for good: nothing unfinished is known of it any more, and it is not listed as dead."""
        self._dead_letters.pop(id, None)
        state = self._states.pop(id, None)
        if state:
            self._give_up(id, state)

    def _give_up(self, id: str, state: _State) -> None:
        if state.key and self._holders.get(state.key) == id:
            del self._holders[state.key]

    # -- records

    def _get(self, topic: str, index: str) -> Stored | None:
        with self._lock:
            self._now()
            entry = self._records.get((topic, index))
            return Stored(entry.at, entry.blob) if entry else None

    def _put(self, record: Record, at: float, blob: bytes, retention: float | None) -> None:
        with self._lock:
            now = self._now()
            token = self._next_token(now)
            expires = at + retention if retention is not None else _NEVER
            entry = _Entry(at, expires, record.id, token, token, record.digest, blob)
            self._store((record.topic, record.index), entry)
            self._counts[record.topic]
            state = self._states.get(record.id)
            if state and state.status is not _Status.RUNNING and expires > now:
                self._forget(record.id)
            self._now()

    def _remove(self, topic: str, indexes: Sequence[str], note: bytes) -> int:
        with self._lock:
            now = self._now()
            removed = 0
            for index in indexes:
                entry = self._drop((topic, index))
                if entry:
                    removed += 1
                    self._mark(entry.id, entry.token, entry.expires)
                    self._note((topic, index), now, "removed", note, entry.expires - now, now)
            return removed

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

    def _store(self, key: _Key, entry: _Entry) -> None:
        old = self._drop(key)
        if old and old.id != entry.id:
            self._mark(old.id, old.token, old.expires)
        self._records[key] = entry
        line = self._by_time[key[0]]
        line.insert(bisect_left(line, (entry.at, key[1])), (entry.at, key[1]))
        self._expire("record", key, entry.expires)

    def _drop(self, key: _Key) -> _Entry | None:
        entry = self._records.pop(key, None)
        if entry:
            line = self._by_time[key[0]]
            del line[bisect_left(line, (entry.at, key[1]))]
        return entry

    def _mark(self, id: str, token: int, expires: float) -> None:
        self._marks[id] = _Mark(token, expires)
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

    def _drop_letter(self, id: str, topic: str, index: str | None, note: bytes) -> bool:
        with self._lock:
            now = self._now()
            found = self._dead_letters.pop(id, None) is not None
            state = self._states.get(id)
            if found and state and state.status is _Status.DEAD:
                self._expire_state(id, state, now)
            if found and index is not None:
                self._note((topic, index), now, "removed", note, WEEK, now)
            return found

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
        self, key: _Key | None, notes: tuple[tuple[str, bytes], ...], retention: float | None, now: float
    ) -> None:
        for kind, note in notes if key else ():
            self._note(key, now, kind, note, retention, now)  # type: ignore[arg-type]  # checked above

    def _note(self, key: _Key, at: float, kind: str, note: bytes, retention: float | None, now: float) -> None:
        expires = now + retention if retention is not None else _NEVER
        story = self._stories.get(key)
        if story is None:
            story = self._stories[key] = _Story(expires)
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
            kept: dict[object, _Entry | _Mark | _State | _Story] = self._kept[what]
            thing = kept.get(which)
            if thing and thing.expires > now:
                self._expire(what, which, thing.expires)
            elif thing and what == "record":
                self._drop(which)  # type: ignore[arg-type]
            elif thing:
                del kept[which]
        return now

    def _expire(self, what: str, which: _Key | str, when: float) -> None:
        if when < _NEVER:
            heapq.heappush(self._expiries, (when, what, which))

    def _expire_state(self, id: str, state: _State, now: float) -> None:
        state.expires = now + WEEK
        self._expire("state", id, state.expires)

    def _next_token(self, now: float) -> int:
        self._last_token = max(self._last_token + 1, int(now * 1_000_000))
        return self._last_token


def open_url(url: str) -> MemoryStorage:
    """Open `memory://`: a new and empty one each time."""
    return MemoryStorage()
