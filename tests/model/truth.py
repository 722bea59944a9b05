"""What a storage must answer, in plain Python: the reference beside which the real one is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from watch_tasks.message import Once
from watch_tasks.storage.protocol import Claim, Commit, Granted, Refusal, Refused, Replay, Replayed, Step
from watch_tasks.topics import WEEK

__all__ = ["Grant", "Invariant", "Sent", "Truth", "Violation"]


class Invariant(StrEnum):
    """What never happens, whatever fails when."""

    VANISHED = "a message is nowhere: not queued, handled, dead or a duplicate"
    TWO_CLAIMS = "two hold a claim on the same thing at once"
    STALE_TOKEN = "an older token settled what a newer one was granted for"
    REFUSED = "a holder that nobody replaced was refused"
    RECORD = "the record is not that of the newest first token"
    MARK = "a message that is done was granted again within its retention"
    EFFECTS = "an effect happened again although nothing failed"
    REVIVED = "a dead message was granted again, though nobody replayed it"
    LETTER = "a dead letter is lacking, or one is listed of a message that is done or was replayed"
    REPLAY = "a letter was replayed by two at once, as a wrong copy, or against a newer message; or it could not be"
    LOST_ANSWER = "a claim whose answer was lost was not granted again when it was asked again"
    CRASHES = "a crash was counted that was none, or one was not"
    UNFINISHED = "a message does not end although everything works"


class Violation(AssertionError):
    """A schedule broke an invariant."""

    def __init__(self, invariant: Invariant, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


@dataclass(eq=False, slots=True)
class Grant:
    """One granted claim."""

    token: int
    copy: int
    worker: str
    #: End of the lease.
    until: float
    #: Names the asking that it answers.
    nonce: str
    #: Neither settled nor given back. An open grant whose lease ran out counts until somebody takes over.
    open: bool = True
    #: What ended it, for a commit whose answer was lost and that comes again.
    settled: Commit | None = None

    def is_live(self, now: float) -> bool:
        return self.open and now < self.until


@dataclass(eq=False, slots=True)
class Sent:
    """One message, whatever number of copies of it travel."""

    id: str
    index: str
    once: Once
    digest: str
    newest: Grant | None = None
    first_token: int | None = None
    #: Handled: the time until which that must be known.
    known_until: float | None = None
    #: The newest copy that is known; None: nothing unfinished is known of it.
    copy: int | None = None
    crashes: int = 0
    is_dead: bool = False
    #: A dead letter tells of it. Buried without a claim while somebody holds one, it is listed and not dead.
    is_listed: bool = False
    died_at: float = 0.0
    #: Dead, and somebody may publish its next copy: the time until which nobody else may.
    replaying_until: float | None = None
    #: When what is known of it is forgotten.
    forget_at: float | None = None
    #: Handled, dead, or a duplicate of a handled index: its last copy may go.
    is_finished: bool = False
    effects: int = 0
    #: What may explain a further effect: retries, crashes, lost leases.
    excuses: int = 0

    def is_known(self, now: float) -> bool:
        """Whether it is done, and that must be known still."""
        return self.known_until is not None and now < self.known_until

    def is_held(self) -> bool:
        return self.newest is not None and self.newest.open

    def forget(self) -> None:
        """Nothing unfinished is known of it any more."""
        self.copy = self.first_token = self.forget_at = None
        self.crashes = 0
        self.is_dead = self.is_listed = False
        self.replaying_until = None
        if self.newest:
            self.newest.open = False


@dataclass(slots=True)
class _Kept:
    id: str
    first_token: int
    digest: str
    expires: float
    at: float


@dataclass(slots=True)
class Truth:
    """Follows every call that the storage carried out, and judges its answers."""

    sent: dict[str, Sent] = field(default_factory=dict)
    records: dict[str, _Kept] = field(default_factory=dict)
    #: The newest grant under once="index", by index.
    holders: dict[str, Grant] = field(default_factory=dict)
    handled: int = 0
    retries: int = 0
    last_token: int = 0

    def pass_time(self, now: float) -> None:
        self.records = {index: kept for index, kept in self.records.items() if now < kept.expires}
        for message in self.sent.values():
            if message.forget_at is not None and now >= message.forget_at:
                message.forget()

    # -- claims

    def claimed(self, claim: Claim, answer: Granted | Refused, now: float) -> None:
        message = self.sent[claim.id]
        grant = self._granted_before(message, claim)
        if grant and not message.is_known(now):
            if not isinstance(answer, Granted) or answer.token != grant.token:
                raise Violation(Invariant.LOST_ANSWER, f"{message.id} by {claim.worker}: {answer}")
            self._check_crashes(message, answer)
            grant.until = now + claim.lease
        elif isinstance(answer, Granted):
            self._granted(message, claim, answer, now)
        elif answer.why is Refusal.DUPLICATE:
            self._suppressed(message, claim, now)
        elif answer.why is Refusal.CONFLICT:
            kept = self.records.get(message.index)
            if claim.once != "index" or kept is None or kept.digest == message.digest:
                raise Violation(Invariant.VANISHED, f"{message.id} conflicts with nothing")
        elif answer.why is Refusal.BUSY and not 0 < answer.seconds < 60:
            raise Violation(Invariant.UNFINISHED, f"{message.id} is busy for {answer.seconds} s")

    def _granted_before(self, message: Sent, claim: Claim) -> Grant | None:
        """Return the grant that this very asking got, if nobody took over."""
        grant = message.newest
        if grant is None or not grant.open or (grant.worker, grant.nonce) != (claim.worker, claim.nonce):
            return None
        return grant if self._holds_index(message, grant) else None

    def _holds_index(self, message: Sent, grant: Grant) -> bool:
        return message.once != "index" or self.holders.get(message.index) is grant

    def _check_crashes(self, message: Sent, answer: Granted) -> None:
        if answer.crashes != message.crashes:
            raise Violation(Invariant.CRASHES, f"{message.id}: {answer.crashes}, not {message.crashes}")

    def _granted(self, message: Sent, claim: Claim, answer: Granted, now: float) -> None:
        if answer.token <= self.last_token:
            raise Violation(Invariant.STALE_TOKEN, f"token {answer.token} after {self.last_token}")
        if message.is_known(now):
            raise Violation(Invariant.MARK, f"{message.id} was handled")
        if message.is_dead and message.copy is not None and claim.copy <= message.copy:
            raise Violation(Invariant.REVIVED, f"{message.id} is dead at copy {message.copy}")
        if message.newest and message.newest.is_live(now):
            raise Violation(Invariant.TWO_CLAIMS, f"{message.id} is held by {message.newest.worker}")
        rival = self.holders.get(message.index)
        if claim.once == "index" and rival and rival is not message.newest and rival.is_live(now):
            raise Violation(Invariant.TWO_CLAIMS, f"index {message.index} is held by {rival.worker}")
        if message.newest:
            message.excuses += 1  # not live any more: it was settled, given back, or its lease was lost
        if message.is_dead:
            message.is_dead = message.is_listed = message.is_finished = False
            message.replaying_until, message.crashes = None, 0
        elif message.newest and message.newest.open and message.newest.copy == answer.copy:
            message.crashes += 1
        self._check_crashes(message, answer)
        self.last_token = answer.token
        message.known_until = message.forget_at = None
        message.copy = answer.copy
        message.first_token = message.first_token or answer.token
        message.newest = Grant(answer.token, answer.copy, claim.worker, now + claim.lease, claim.nonce)
        if claim.once == "index":
            self.holders[message.index] = message.newest

    def _suppressed(self, message: Sent, claim: Claim, now: float) -> None:
        kept = self.records.get(message.index)
        if not message.is_known(now):
            if message.is_dead and message.copy is not None and claim.copy <= message.copy:
                return
            if claim.once != "index" or kept is None or kept.digest != message.digest:
                raise Violation(Invariant.VANISHED, f"{message.id} is called a duplicate, of nothing")
        message.forget()
        message.is_finished = True

    # -- commits

    def acted(self, message: Sent) -> None:
        """A handler's effect happened."""
        message.effects += 1
        if message.effects > 1 + message.excuses:
            raise Violation(Invariant.EFFECTS, f"{message.id} had {message.effects} effects")

    def committed(self, commit: Commit, accepted: bool, now: float) -> None:
        message = self.sent[commit.id]
        grant = message.newest
        if commit.token is None:
            self._buried_unclaimed(message, commit, now)
            return
        is_newest = grant is not None and grant.open and grant.token == commit.token
        is_newest = is_newest and grant is not None and self._holds_index(message, grant)
        if not accepted:
            if is_newest:
                raise Violation(Invariant.REFUSED, f"{commit.step} of {message.id} by its newest token")
            return
        if not is_newest or grant is None:
            if grant is None or (grant.token == commit.token and grant.settled != commit):
                raise Violation(Invariant.STALE_TOKEN, f"{commit.step} of {message.id} by a claim that is over")
            if grant.token != commit.token and commit.step is not Step.HANDLED:
                raise Violation(Invariant.STALE_TOKEN, f"{commit.step} of {message.id} by an older token")
            if commit.step is Step.HANDLED and message.known_until is None:
                raise Violation(Invariant.STALE_TOKEN, f"{message.id} handled by an older token")
            return  # the same again: its answer was lost
        if commit.step is Step.MARK:
            return
        grant.open, grant.settled = False, commit
        if commit.step is Step.HANDLED:
            self._handled(message, commit, now)
        elif commit.step is Step.DEAD:
            message.is_dead = message.is_listed = message.is_finished = True
            message.died_at = now
        elif commit.step in (Step.RETRY, Step.SNOOZED):
            message.copy = commit.copy + 1
        self.retries += commit.step is Step.RETRY

    def _handled(self, message: Sent, commit: Commit, now: float) -> None:
        assert message.first_token is not None
        assert commit.retention is not None
        self.handled += 1
        message.is_finished = True
        message.known_until = now + commit.retention
        old = self.records.get(message.index)
        if old is None or old.first_token <= message.first_token:
            kept = _Kept(message.id, message.first_token, message.digest, message.known_until, now)
            self.records[message.index] = kept
        message.forget()

    def _buried_unclaimed(self, message: Sent, commit: Commit, now: float) -> None:
        known = -1 if message.copy is None else message.copy
        # A replay that dies unread is buried anew.
        is_replay = message.replaying_until is not None and commit.copy > known
        is_listed = message.is_listed and not is_replay
        if message.is_known(now) or is_listed or (message.is_dead and commit.copy <= known):
            return
        message.is_listed, message.died_at = True, now
        if message.newest and message.newest.is_live(now):
            return
        message.is_dead = message.is_finished = True
        message.copy, message.forget_at, message.replaying_until = max(known, commit.copy), None, None
        if message.newest:
            message.newest.open = False

    # -- leases

    def renewed(self, worker: str, ids: list[str], held: set[str], lease: float, now: float) -> None:
        for message in (self.sent[id] for id in ids):
            grant = message.newest
            holds = grant is not None and grant.open and grant.worker == worker and self._holds_index(message, grant)
            if holds != (message.id in held):
                invariant = Invariant.REFUSED if holds else Invariant.STALE_TOKEN
                raise Violation(invariant, f"renewal of {message.id} by {worker}: {message.id in held}")
            if holds and grant:
                grant.until = now + lease

    def released(self, worker: str, id: str, crashes: int, *, crashed: bool, now: float) -> None:
        message = self.sent[id]
        if message.first_token is None:  # never claimed, or done
            message.crashes += crashed
            if crashed and not message.is_dead:
                message.copy, message.forget_at = message.copy or 0, now + WEEK
        elif message.newest and message.newest.open and message.newest.worker == worker:
            message.newest.open = False
            message.crashes += crashed
        if crashes != message.crashes:
            raise Violation(Invariant.CRASHES, f"{id} released by {worker}: {crashes}, not {message.crashes}")

    # -- people

    def replayed(self, replay: Replay, why: Replayed, copy: int, now: float) -> None:
        message = self.sent[replay.id]
        expected = self._replay(message, replay, now)
        if why is not expected:
            raise Violation(Invariant.REPLAY, f"that of {message.id} is {why}, not {expected}")
        if why is Replayed.ACCEPTED:
            assert message.copy is not None
            if copy != message.copy + 1:
                raise Violation(Invariant.REPLAY, f"{message.id} is to be copy {copy}, not {message.copy + 1}")
            message.replaying_until = now + replay.patience

    def _replay(self, message: Sent, replay: Replay, now: float) -> Replayed:
        if not message.is_listed or not message.is_dead:
            return Replayed.GONE
        if message.replaying_until is not None and now < message.replaying_until:
            return Replayed.TAKEN
        kept = self.records.get(message.index)
        is_newer = kept and (kept.at > message.died_at or 0 < (message.first_token or 0) < kept.first_token)
        return Replayed.NEWER if is_newer and not replay.force else Replayed.ACCEPTED

    def put(self, id: str, index: str, digest: str, expires: float, now: float) -> None:
        self.last_token += 1
        self.records[index] = _Kept(id, self.last_token, digest, expires, now)
        message = self.sent.get(id)
        if message:
            message.forget()
            message.is_finished, message.known_until = True, expires

    def letter_removed(self, message: Sent, now: float) -> None:
        message.is_listed, message.is_finished = False, True
        if message.is_dead:
            message.forget_at = now + WEEK
