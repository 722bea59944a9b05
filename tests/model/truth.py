"""What a storage must answer, in plain Python: the reference beside which the real one is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from watch_tasks.message import Once
from watch_tasks.storage.protocol import Claim, Commit, Granted, Refusal, Refused, Step

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
    LETTER = "a dead message has no dead letter"
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
    is_dead: bool = False
    #: Handled, dead, or a duplicate of a handled index: its last copy may go.
    is_finished: bool = False
    effects: int = 0
    #: What may explain a further effect: retries, crashes, lost leases.
    excuses: int = 0


@dataclass(slots=True)
class _Kept:
    id: str
    first_token: int
    digest: str
    expires: float


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

    def claimed(self, claim: Claim, answer: Granted | Refused, now: float) -> None:
        message = self.sent[claim.id]
        if isinstance(answer, Granted):
            self._granted(message, claim, answer, now)
            return
        match answer.why:
            case Refusal.DUPLICATE:
                self._suppressed(message, claim, now)
            case Refusal.CONFLICT:
                kept = self.records.get(message.index)
                if claim.once != "index" or kept is None or kept.digest == message.digest:
                    raise Violation(Invariant.VANISHED, f"{message.id} conflicts with nothing")
            case Refusal.BUSY:
                if not 0 < answer.seconds < 60:
                    raise Violation(Invariant.UNFINISHED, f"{message.id} is busy for {answer.seconds} s")

    def _granted(self, message: Sent, claim: Claim, answer: Granted, now: float) -> None:
        if answer.token <= self.last_token:
            raise Violation(Invariant.STALE_TOKEN, f"token {answer.token} after {self.last_token}")
        if message.known_until is not None and now < message.known_until:
            raise Violation(Invariant.MARK, f"{message.id} was handled")
        if message.newest and message.newest.is_live(now):
            raise Violation(Invariant.TWO_CLAIMS, f"{message.id} is held by {message.newest.worker}")
        rival = self.holders.get(message.index)
        if claim.once == "index" and rival and rival is not message.newest and rival.is_live(now):
            raise Violation(Invariant.TWO_CLAIMS, f"index {message.index} is held by {rival.worker}")
        if message.newest:
            message.excuses += 1  # not live any more: it was settled, given back, or its lease was lost
        if message.is_dead:
            message.is_dead = message.is_finished = False
        if message.known_until is not None:
            message.first_token = message.known_until = None
        self.last_token = answer.token
        message.first_token = message.first_token or answer.token
        message.newest = Grant(answer.token, answer.copy, claim.worker, now + claim.lease)
        if claim.once == "index":
            self.holders[message.index] = message.newest

    def _suppressed(self, message: Sent, claim: Claim, now: float) -> None:
        kept = self.records.get(message.index)
        if (message.known_until is not None and now < message.known_until) or message.is_dead:
            return
        if claim.once != "index" or kept is None or kept.digest != message.digest:
            raise Violation(Invariant.VANISHED, f"{message.id} is called a duplicate, of nothing")
        message.is_finished = True
        message.first_token = None
        if message.newest:
            message.newest.open = False

    def acted(self, message: Sent) -> None:
        """A handler's effect happened."""
        message.effects += 1
        if message.effects > 1 + message.excuses:
            raise Violation(Invariant.EFFECTS, f"{message.id} had {message.effects} effects")

    def committed(self, commit: Commit, accepted: bool, now: float) -> None:
        message = self.sent[commit.id]
        grant = message.newest
        if commit.token is None:
            self._buried_unclaimed(message, now)
            return
        is_newest = grant is not None and grant.open and grant.token == commit.token
        if message.once == "index":
            is_newest = is_newest and self.holders.get(message.index) is grant
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
            message.is_dead = message.is_finished = True
        self.retries += commit.step is Step.RETRY

    def _handled(self, message: Sent, commit: Commit, now: float) -> None:
        assert message.first_token is not None
        assert commit.retention is not None
        self.handled += 1
        message.is_finished, message.is_dead = True, False
        message.known_until = now + commit.retention
        old = self.records.get(message.index)
        if old is None or old.first_token <= message.first_token:
            kept = _Kept(message.id, message.first_token, message.digest, message.known_until)
            self.records[message.index] = kept

    def _buried_unclaimed(self, message: Sent, now: float) -> None:
        is_known = message.known_until is not None and now < message.known_until
        if is_known or message.is_dead:
            return
        message.is_dead = message.is_finished = True
        if message.newest and not message.newest.is_live(now):
            message.newest.open = False

    def renewed(self, worker: str, ids: list[str], held: set[str], lease: float, now: float) -> None:
        for message in (self.sent[id] for id in ids):
            grant = message.newest
            holds = grant is not None and grant.open and grant.worker == worker
            if message.once == "index":
                holds = holds and self.holders.get(message.index) is grant
            if holds != (message.id in held):
                invariant = Invariant.REFUSED if holds else Invariant.STALE_TOKEN
                raise Violation(invariant, f"renewal of {message.id} by {worker}: {message.id in held}")
            if holds and grant:
                grant.until = now + lease

    def released(self, worker: str, ids: list[str]) -> None:
        for message in (self.sent[id] for id in ids):
            if message.newest and message.newest.open and message.newest.worker == worker:
                message.newest.open = False
