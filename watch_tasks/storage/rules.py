"""The protocol's decisions, stated once in Python: claim, commit, release, replay, and what people change.

They read and change a `Kept`, whose backend makes each request one atomic step. The Redis storage says the same in
its scripts, because there the step runs in the server; a test compares the two. The schedules behind the rules are in
`docs/protocol.md`.
"""

from __future__ import annotations

from ..topics import WEEK
from .kept import NEVER, Entry, Kept, Key, Letter, Mark, State, Status
from .protocol import Claim, Commit, Granted, Put, Refusal, Refused, Replay, Replayed, Settled, Step

__all__ = ["Rules"]


class Rules:
    """Decides what one request makes of what is kept."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.now = kept.now

    # -- claims

    def claim(self, claim: Claim) -> Granted | Refused:
        """May this copy be handled now? (§3)"""
        kept, now, key = self.kept, self.now, (claim.topic, claim.index)
        record, state = kept.record(key), kept.state(claim.id)
        if (record and record.id == claim.id) or kept.mark(claim.id):
            self.forget(claim.id)
            return self.refuse(claim, Refusal.DUPLICATE)
        copy = claim.copy
        if state:
            if self.is_asked_again(claim, state):
                state.until = now + claim.lease
                kept.save(state)
                return Granted(state.token, state.copy, state.progress, state.crashes, now)
            refused = self.check_copy(claim, state)
            if refused:
                return refused
            copy = max(copy, state.copy)
        if claim.once == "index":
            refused = self.check_index(claim, key, record)
            if refused:
                return refused
            kept.hold(key, claim.id)
        events = []
        if state is None:
            events.append((claim.sent_at, "sent", claim.note))
            state = State(claim.id, key, copy)
        elif state.status in (Status.REPLAYING, Status.DEAD):
            # The replay arrived: it starts afresh, and its letter need not be listed any longer.
            kept.drop_letter(claim.id)
            state.crashes, state.progress = 0, None
        elif state.status is Status.RUNNING and state.copy == copy and state.started:
            # The same copy again after its lease: its handler took the worker down.
            state.crashes += 1
        token = kept.next_token()
        state.key, state.copy, state.status, state.token = key, copy, Status.RUNNING, token
        state.carried = max(state.carried, claim.copy)
        state.first_token = state.first_token or token
        state.worker, state.until, state.started = claim.worker, now + claim.lease, claim.started
        state.nonce, state.exclusive, state.expires = claim.nonce, claim.once == "index", NEVER
        kept.save(state)
        kept.tell(key, [*events, (now, "attempt", claim.note)], claim.retention)
        return Granted(token, copy, state.progress, state.crashes, now)

    def is_asked_again(self, claim: Claim, state: State) -> bool:
        """Whether this very claim was granted, and its answer lost: refused now, it would count as a crash later."""
        same = bool(claim.nonce) and (claim.worker, claim.nonce) == (state.worker, state.nonce)
        return same and self.is_held(state)

    def check_copy(self, claim: Claim, state: State) -> Refused | None:
        """Compare a delivery's copy with the newest known one; None: it may be claimed."""
        now, older, same = self.now, claim.copy < state.copy, claim.copy == state.copy
        match state.status:
            case Status.RUNNING | Status.WAITING if claim.copy < state.carried:
                return Refused(Refusal.STALE)
            case Status.DEAD if older or same:
                return self.refuse(claim, Refusal.DUPLICATE)
            case Status.REPLAYING if older:
                return self.refuse(claim, Refusal.DUPLICATE)
            case Status.WAITING if older and now < state.until + claim.lease:
                # Its retry may still be published; afterwards this delivery stands in for it.
                return self.refuse(claim, Refusal.BUSY, state.until + claim.lease - now)
            case Status.RUNNING if now < state.until:
                # An older copy too: it may be the one that stands in, handed over once more.
                return self.refuse(claim, Refusal.BUSY, state.until - now)
        return None

    def check_index(self, claim: Claim, key: Key, record: Entry | None) -> Refused | None:
        """Under once="index": a record settles it, a running holder makes wait; waiting and dead hold nothing."""
        if record and record.digest != claim.digest:
            return self.refuse(claim, Refusal.CONFLICT)
        if record:
            self.forget(claim.id)
            return self.refuse(claim, Refusal.DUPLICATE)
        rival = self.rival(key, claim.id)
        return self.refuse(claim, Refusal.BUSY, rival.until - self.now) if rival else None

    def rival(self, key: Key, id: str) -> State | None:
        """Return the other message that runs under this index, if there is one."""
        holder = self.kept.holder(key)
        state = self.kept.state(holder) if holder and holder != id else None
        return state if state and state.status is Status.RUNNING and self.now < state.until else None

    def refuse(self, claim: Claim, why: Refusal, seconds: float = 0.0) -> Refused:
        """Refuse a claim, count it and tell of it."""
        if why is Refusal.DUPLICATE:
            self.kept.count(claim.topic, "duplicates")
        if why is not Refusal.CONFLICT:
            event = "busy" if why is Refusal.BUSY else "suppressed"
            self.kept.tell((claim.topic, claim.index), [(self.now, event, claim.note)], claim.retention)
        return Refused(why, seconds)

    # -- leases

    def renew(self, worker: str, id: str, lease: float) -> bool:
        """Extend the lease that a worker holds on an id; return whether it holds it."""
        state = self.kept.state(id)
        if state is None or state.worker != worker or not self.is_held(state):
            return False
        state.until = self.now + lease
        self.kept.save(state)
        return True

    def release(self, worker: str, id: str, crashed: bool) -> int:
        """Give back what a worker holds; return how often its handler took a worker down (§5)."""
        state = self.kept.state(id) or State(id, None, 0, until=self.now)
        if not state.token:
            state.crashes += crashed
            if crashed:
                # Never claimed, under once="none", or done: nothing else ends what is known of it, unless it is dead.
                if state.status is Status.WAITING:
                    self.expire(state)
                self.kept.save(state)
        elif state.status is Status.RUNNING and state.worker == worker:
            state.crashes += crashed and state.started
            self.give_up(state)
            state.status, state.until = Status.WAITING, self.now
            self.kept.save(state)
        return state.crashes

    def is_held(self, state: State) -> bool:
        """Whether nobody took it over. An expired lease that nobody took over still counts."""
        return state.status is Status.RUNNING and (
            not state.exclusive or state.key is None or self.kept.holder(state.key) == state.id
        )

    # -- commits

    def commit(self, commit: Commit) -> Settled:
        """Settle a message, if its token is the newest (§4)."""
        kept, state = self.kept, self.kept.state(commit.id)
        key = (commit.topic, commit.index) if commit.index is not None else None
        if commit.token is None:
            if commit.step is Step.DEAD and self.is_settled(key, commit, state):
                return Settled.REPEATED
        elif self.is_repeated(commit, state, key):
            return Settled.REPEATED
        elif not self.may_settle(commit, state):
            if key:
                told = commit.notes[-1][1] if commit.notes else b"{}"
                kept.tell(key, [(self.now, "fenced", told)], commit.retention)
            return Settled.REFUSED
        match commit.step:
            case Step.HANDLED:
                self.finish(commit, state)
            case Step.RETRY | Step.SNOOZED | Step.RELEASED if state and commit.token is not None:
                is_next = commit.step is not Step.RELEASED
                state.copy, state.progress = commit.copy + is_next, commit.blob
                state.status, state.until = Status.WAITING, self.now + commit.delay
                kept.save(state)
                self.give_up(state)
            case Step.DEAD:
                self.bury(commit, state)
            case Step.MARK if state and commit.token is not None:
                state.progress = commit.blob
                kept.save(state)
        if commit.step is Step.RETRY:
            kept.count(commit.topic, "retries")
        if key and commit.notes:
            kept.tell(key, [(self.now, kind, note) for kind, note in commit.notes], commit.retention)
        return Settled.ACCEPTED

    def was_accepted(self, commit: Commit) -> bool:
        """Whether this very commit holds already."""
        key = (commit.topic, commit.index) if commit.index is not None else None
        return self.is_repeated(commit, self.kept.state(commit.id), key)

    def may_settle(self, commit: Commit, state: State | None) -> bool:
        """Whether the commit's token is the newest of its message, and still counts."""
        return state is not None and state.token == commit.token and self.is_held(state)

    def is_repeated(self, commit: Commit, state: State | None, key: Key | None) -> bool:
        """Whether this very commit was accepted before, and its answer lost."""
        if commit.step is Step.HANDLED:
            record, mark = self.kept.record(key) if key else None, self.kept.mark(commit.id)
            return bool(
                (record and record.id == commit.id and record.token == commit.token)
                or (mark and mark.token == commit.token)
            )
        if not state or state.token != commit.token:
            return False
        match commit.step:
            case Step.RETRY | Step.SNOOZED:
                return state.status is Status.WAITING and state.copy == commit.copy + 1
            case Step.RELEASED:
                return state.status is Status.WAITING and state.copy == commit.copy
            case Step.DEAD:
                return state.status is Status.DEAD
            case Step.MARK:
                return state.status is Status.RUNNING and state.progress == commit.blob
        return False

    def is_settled(self, key: Key | None, commit: Commit, state: State | None) -> bool:
        """Whether a burial without claim comes too late: an id is buried once, and not after it was done."""
        record, id = self.kept.record(key) if key else None, commit.id
        is_dead = state and state.status is Status.DEAD and commit.copy <= state.copy
        # A replay that died unread is buried again: its letter is of the copy before, whose redelivery is dead still.
        is_replay = state and state.status is Status.REPLAYING and commit.copy >= state.copy
        is_dead = is_dead or (state and state.status is Status.REPLAYING and not is_replay)
        is_listed = not is_replay and self.kept.letter(id) is not None
        return bool(is_dead or is_listed or self.kept.mark(id) or (record and record.id == id))

    def finish(self, commit: Commit, state: State | None) -> None:
        """Record that a message was handled: it is done for good."""
        key = (commit.topic, commit.index or "")
        token = commit.token if commit.token is not None else self.kept.next_token()
        first = state.first_token if state and state.first_token else token
        expires = self.now + commit.retention if commit.retention is not None else NEVER
        old = self.kept.record(key)
        if old and old.id != commit.id and self.is_newer(old, first):
            # A newer message of this index was handled while this one ran: it keeps the record.
            self.write_mark(commit.id, token, expires)
        else:
            self.write_record(key, Entry(self.now, expires, commit.id, first, token, commit.digest, commit.blob))
        self.kept.count(commit.topic, "handled")
        self.forget(commit.id)

    def is_newer(self, record: Entry, first_token: int) -> bool:
        """Whether a record belongs to a message that was first claimed later."""
        return record.first_token > first_token

    def bury(self, commit: Commit, state: State | None) -> None:
        """Keep a dead letter, and end what was known of the message."""
        self.kept.save_letter(commit.id, Letter(self.now, commit.topic, commit.blob))
        self.kept.count(commit.topic)
        if commit.token is None and state and state.status is Status.RUNNING and self.now < state.until:
            return  # somebody handles a readable message of that id: leave it to them
        if state is None:
            key = (commit.topic, commit.index) if commit.index is not None else None
            state = State(commit.id, key, commit.copy)
        elif commit.token is None and state.token:
            state.token = self.kept.next_token()  # it takes over: an older claim settles nothing any more
        state.copy, state.status, state.expires = max(state.copy, commit.copy), Status.DEAD, NEVER
        self.kept.save(state)
        self.give_up(state)

    # -- replays

    def replay(self, replay: Replay) -> tuple[Replayed, int]:
        """May this dead letter be published again, and as which copy? (§6)"""
        letter, state = self.kept.letter(replay.id), self.kept.state(replay.id)
        if not letter or not state or state.status not in (Status.DEAD, Status.REPLAYING):
            return Replayed.GONE, 0
        if state.status is Status.REPLAYING and self.now < state.until:
            return Replayed.TAKEN, 0
        record = self.kept.record(state.key) if state.key else None
        is_newer = record and (record.at > letter.at or 0 < state.first_token < record.first_token)
        if is_newer and not replay.force:
            return Replayed.NEWER, 0
        if state.status is Status.DEAD:
            state.copy, state.status = state.copy + 1, Status.REPLAYING
        state.until = self.now + replay.patience
        self.kept.save(state)
        if state.key:
            self.kept.tell(state.key, [(self.now, "replayed", replay.note)], WEEK)
        return Replayed.ACCEPTED, state.copy

    # -- what people change

    def put(self, put: Put) -> bool:
        """Keep a record as it is. It counts as claimed now: a message claimed before does not replace it."""
        key = (put.topic, put.index)
        old = self.kept.record(key)
        if put.only_newer and old and old.at >= put.at:
            return False
        token = self.kept.next_token()
        expires = put.at + put.retention if put.retention is not None else NEVER
        self.write_record(key, Entry(put.at, expires, put.id, token, token, put.digest, put.blob))
        self.kept.count(put.topic)
        if expires <= self.now:
            return False
        state = self.kept.state(put.id)
        if state and state.status is not Status.RUNNING:
            self.forget(put.id)
        return True

    def remove(self, key: Key, note: bytes) -> bool:
        """Forget that an index was handled; the mark of its id stays for the rest of the retention."""
        old = self.kept.record(key)
        if old is None:
            return False
        self.kept.drop_record(key)
        self.write_mark(old.id, old.token, old.expires)
        self.kept.tell(key, [(self.now, "removed", note)], None if old.expires == NEVER else old.expires - self.now)
        return True

    def drop_letter(self, id: str, key: Key | None, note: bytes) -> bool:
        """Throw a dead letter away. Its id stays dead for a week, so that redeliveries of it are still duplicates."""
        if self.kept.letter(id) is None:
            return False
        self.kept.drop_letter(id)
        state = self.kept.state(id)
        if state and state.status in (Status.DEAD, Status.REPLAYING):
            self.expire(state)
            self.kept.save(state)
        if key:
            self.kept.tell(key, [(self.now, "removed", note)], WEEK)
        return True

    # -- what several of them do

    def write_record(self, key: Key, entry: Entry) -> None:
        """Keep the one record of an index; what it replaces leaves the mark of its id."""
        old = self.kept.record(key)
        if old and old.id != entry.id:
            self.write_mark(old.id, old.token, old.expires)
        if entry.expires > self.now:
            self.kept.save_record(key, entry)
        elif old:
            self.kept.drop_record(key)

    def write_mark(self, id: str, token: int, expires: float) -> None:
        """Note that an id is done, where no record says so."""
        if expires > self.now:
            self.kept.save_mark(id, Mark(token, expires))

    def forget(self, id: str) -> None:
        """It is done for good: nothing unfinished is known of it any more, and it is not listed as dead."""
        state = self.kept.state(id)
        if state:  # whatever has a letter has a state
            self.kept.drop_letter(id)
            self.kept.drop_state(id)
            self.give_up(state)

    def give_up(self, state: State) -> None:
        """Let the index go that a message holds."""
        if state.exclusive and state.key:
            self.kept.let_go(state.key, state.id)

    def expire(self, state: State) -> None:
        """Nothing waits for it: it is forgotten after a week."""
        state.expires = self.now + WEEK
