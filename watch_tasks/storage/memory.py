"""A storage in the memory of one process: for tests, for the Watcher, and as the plainest form of the rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from ..record import Record
from ..topics import WEEK
from .memory_records import NEVER, Entry, Key, MemoryRecords
from .protocol import Claim, Commit, Granted, Refusal, Refused, Replay, Replayed, Step

__all__ = ["MemoryStorage"]


class _Status(StrEnum):
    RUNNING = "running"
    WAITING = "waiting"
    DEAD = "dead"
    REPLAYING = "replaying"


@dataclass(slots=True)
class _State:
    """What is known of an unfinished message."""

    key: Key | None
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
    expires: float = NEVER


class MemoryStorage(MemoryRecords):
    """Keeps everything in this process, and forgets it with it.

    Args:
        clock: seconds since the epoch; another one makes time stand still in a test.
    """

    is_shared: ClassVar[bool] = False

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(clock)
        self._states: dict[str, _State] = {}
        self._holders: dict[Key, str] = {}
        self._kept["state"] = self._states

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
        state.nonce, state.exclusive, state.expires = claim.nonce, claim.once == "index", NEVER
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

    def _rival(self, key: Key, id: str, now: float) -> _State | None:
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

    def _is_repeated(self, commit: Commit, state: _State | None, key: Key | None) -> bool:
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

    def _is_settled(self, key: Key | None, commit: Commit, state: _State | None) -> bool:
        """Whether a burial without claim comes too late: an id is buried once, and not after it was done."""
        record, id = self._records.get(key) if key else None, commit.id
        is_dead = state and state.status is _Status.DEAD and commit.copy <= state.copy
        # A replay that died unread is buried again: its letter is of the copy before, whose redelivery is dead still.
        is_replay = state and state.status is _Status.REPLAYING and commit.copy >= state.copy
        is_dead = is_dead or (state and state.status is _Status.REPLAYING and not is_replay)
        is_listed = id in self._dead_letters and not is_replay
        return bool(is_dead or is_listed or id in self._marks or (record and record.id == id))

    def _finish(self, commit: Commit, state: _State | None, now: float) -> None:
        key = (commit.topic, commit.index or "")
        token = commit.token if commit.token is not None else self._next_token(now)
        first = state.first_token if state and state.first_token else token
        expires = now + commit.retention if commit.retention is not None else NEVER
        old = self._records.get(key)
        if old and old.id != commit.id and self._is_newer(old, first):
            # A newer message of this index was handled while this one ran: it keeps the record.
            self._mark(commit.id, token, expires)
        else:
            self._store(key, Entry(now, expires, commit.id, first, token, commit.digest, commit.blob))
        self._counts[commit.topic]["handled"] += 1
        self._forget(commit.id)

    def _is_newer(self, record: Entry, first_token: int) -> bool:
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
        state.copy, state.status, state.expires = max(state.copy, commit.copy), _Status.DEAD, NEVER
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

    def _expire_state(self, id: str, state: _State, now: float) -> None:
        state.expires = now + WEEK
        self._expire("state", id, state.expires)

    def _replay(self, replays: Sequence[Replay]) -> list[tuple[Replayed, int]]:
        with self._lock:
            now = self._now()
            return [self._replay_one(replay, now) for replay in replays]

    def _replay_one(self, replay: Replay, now: float) -> tuple[Replayed, int]:
        letter, state = self._dead_letters.get(replay.id), self._states.get(replay.id)
        if not letter or not state or state.status not in (_Status.DEAD, _Status.REPLAYING):
            return Replayed.GONE, 0
        if state.status is _Status.REPLAYING and now < state.until:
            return Replayed.TAKEN, 0
        record = self._records.get(state.key) if state.key else None
        is_newer = record and (record.at > letter[0] or 0 < state.first_token < record.first_token)
        if is_newer and not replay.force:
            return Replayed.NEWER, 0
        if state.status is _Status.DEAD:
            state.copy, state.status = state.copy + 1, _Status.REPLAYING
        state.until = now + replay.patience
        if state.key:
            self._note(state.key, now, "replayed", replay.note, WEEK, now)
        return Replayed.ACCEPTED, state.copy

    # -- what people change

    def _put(self, record: Record, at: float, blob: bytes, retention: float | None) -> None:
        with self._lock:
            now = self._now()
            token = self._next_token(now)
            expires = at + retention if retention is not None else NEVER
            entry = Entry(at, expires, record.id, token, token, record.digest, blob)
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

    def _drop_letter(self, id: str, topic: str, index: str | None, note: bytes) -> bool:
        with self._lock:
            now = self._now()
            found = self._dead_letters.pop(id, None) is not None
            state = self._states.get(id)
            if found and state and state.status in (_Status.DEAD, _Status.REPLAYING):
                self._expire_state(id, state, now)
            if found and index is not None:
                self._note((topic, index), now, "removed", note, WEEK, now)
            return found


def open_url(url: str) -> MemoryStorage:
    """Open `memory://`: a new and empty one each time."""
    return MemoryStorage()
