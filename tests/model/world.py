"""The world around a storage: a broker that hands over again, workers that crash, and a network that loses answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from watch_tasks.message import Once
from watch_tasks.outcome import Reason
from watch_tasks.record import DeadLetter, Record
from watch_tasks.storage.base import Storage
from watch_tasks.storage.protocol import Claim, Commit, Granted, Refusal, Refused, Replay, Replayed, Step
from watch_tasks.storage.stored import encode_letter, encode_record

from .truth import Grant, Invariant, Sent, Truth, Violation

__all__ = ["DAY", "LEASE", "Fault", "Hand", "Open", "Stage", "World"]

#: Opens the storage under test, with the world's clock.
Open = Callable[[Callable[[], float]], Storage]

TOPIC: Final = "order"
#: Seconds that a claim holds.
LEASE: Final = 8.0
#: Seconds for which one person alone may replay a letter.
PATIENCE: Final = 12.0
#: Seconds that records are kept.
DAY: Final = 86400.0
#: Deliveries within which a healthy worker must have emptied any broker.
_PATIENCE: Final = 2000


class Fault(StrEnum):
    """What goes wrong with one call."""

    NONE = "none"
    BEFORE = "before"  #: it never arrives
    AFTER = "after"  #: it is carried out, its answer is lost


class Stage(StrEnum):
    """How far a worker has come with a delivery."""

    DELIVERED = "delivered"  #: to be claimed
    GRANTED = "granted"  #: to be handled
    DECIDED = "decided"  #: to be committed
    STORED = "stored"  #: its next copy to be published
    PUBLISHED = "published"  #: to be acked


@dataclass(eq=False, slots=True)
class Entry:
    """One copy that the broker keeps until it is acked."""

    message: Sent
    copy: int
    due: float
    #: Who got it last; acks of others do nothing.
    holder: Hand | None = None


@dataclass(eq=False, slots=True)
class Hand:
    """One delivery in a worker's hand."""

    entry: Entry
    worker: str
    stage: Stage = Stage.DELIVERED
    grant: Grant | None = None
    #: What it asked first; asked again because no answer came, it is the same.
    claim: Claim | None = None
    commit: Commit | None = None


class World:
    """Drives a storage, and has every answer judged by the `Truth`."""

    def __init__(self, open: Open) -> None:
        self.time = 1_700_000_000.0
        self.storage = open(lambda: self.time)
        self.truth = Truth()
        self.broker: list[Entry] = []
        self.hands: list[Hand] = []
        #: What people were given to publish, and have not yet.
        self.replays: list[Entry] = []
        self.workers = ["w1", "w2", "w3"]
        self.born = len(self.workers)
        self.askings = 0

    # -- senders

    def send(self, index: str, once: Once, digest: str) -> None:
        message = Sent(f"m{len(self.truth.sent) + 1}", index, once, digest)
        self.truth.sent[message.id] = message
        self.publish(message, 0, 0.0)

    def publish(self, message: Sent, copy: int, delay: float) -> None:
        self.broker.append(Entry(message, copy, self.time + delay))

    # -- the broker

    def due(self) -> list[Entry]:
        return [entry for entry in self.broker if entry.due <= self.time]

    def ack(self, hand: Hand) -> None:
        self.drop(hand)
        if hand.entry.holder is hand and hand.entry in self.broker:
            self.broker.remove(hand.entry)
            self.check_kept(hand.entry.message)

    def back(self, hand: Hand, delay: float) -> None:
        self.drop(hand)
        if hand.entry.holder is hand:
            hand.entry.due, hand.entry.holder = self.time + delay, None

    def drop(self, hand: Hand) -> None:
        if hand in self.hands:
            self.hands.remove(hand)

    def check_kept(self, message: Sent) -> None:
        is_queued = any(entry.message is message for entry in self.broker)
        if not (is_queued or message.is_finished or message.is_listed):
            raise Violation(Invariant.VANISHED, f"the last copy of {message.id} was acked")

    # -- workers

    def deliver(self, entries: list[Entry], worker: str) -> list[Hand]:
        hands = []
        for entry in entries:
            entry.holder = Hand(entry, worker)
            hands.append(entry.holder)
        self.hands += hands
        return hands

    def claim(self, hands: list[Hand], fault: Fault = Fault.NONE) -> None:
        if fault is Fault.BEFORE:
            return
        claims = [self._claim(hand) for hand in hands]
        answers = self.storage.claim_many(claims)
        for claim, answer in zip(claims, answers, strict=True):
            self.truth.claimed(claim, answer, self.time)
        if fault is Fault.NONE:
            for hand, answer in zip(hands, answers, strict=True):
                self._answered(hand, answer)

    def _claim(self, hand: Hand) -> Claim:
        message = hand.entry.message
        if hand.claim:
            return hand.claim
        self.askings += 1
        hand.claim = Claim(
            topic=TOPIC,
            index=message.index,
            id=message.id,
            copy=hand.entry.copy,
            once=message.once,
            worker=hand.worker,
            lease=LEASE,
            digest=message.digest,
            retention=DAY,
            sent_at=self.time,
            nonce=f"n{self.askings}",
        )
        return hand.claim

    def _answered(self, hand: Hand, answer: Granted | Refused) -> None:
        if isinstance(answer, Granted):
            hand.stage, hand.grant = Stage.GRANTED, hand.entry.message.newest
            return
        match answer.why:
            case Refusal.BUSY:
                self.back(hand, answer.seconds)
            case Refusal.CONFLICT:
                self.bury(hand)
            case _:
                self.ack(hand)

    def decide(self, hand: Hand, step: Step, delay: float) -> None:
        """Run the handler, whose effect happens, and decide what becomes of the message."""
        if hand.grant is hand.entry.message.newest:
            # A worker that lost its claim while it slept acts too: that is its lost lease's effect.
            self.truth.acted(hand.entry.message)
        hand.stage, hand.commit = Stage.DECIDED, self._commit(hand, step, delay)
        if hand.grant:
            hand.entry.message.excuses += step is Step.MARK

    def bury(self, hand: Hand) -> None:
        """Decide that a delivery that nobody may handle is dead: it cannot be read, or was revoked."""
        hand.stage, hand.commit = Stage.DECIDED, self._commit(hand, Step.DEAD, 0.0)

    def _commit(self, hand: Hand, step: Step, delay: float) -> Commit:
        message, grant = hand.entry.message, hand.grant
        copy = grant.copy if grant else hand.entry.copy
        blob = b"{}"
        if step is Step.HANDLED:
            blob = encode_record(Record(topic=TOPIC, index=message.index, id=message.id, digest=message.digest))
        elif step is Step.DEAD:
            reason = Reason.EXHAUSTED if grant else Reason.INDEX_CONFLICT
            letter = DeadLetter(
                id=message.id, topic=TOPIC, index=message.index, reason=reason, error="E: no", copy=copy
            )
            blob = encode_letter(letter)
        return Commit(
            step=step,
            topic=TOPIC,
            index=message.index,
            id=message.id,
            copy=copy,
            token=grant.token if grant else None,
            blob=blob,
            digest=message.digest,
            retention=DAY,
            delay=delay,
        )

    def commit(self, hands: list[Hand], fault: Fault = Fault.NONE) -> None:
        if fault is Fault.BEFORE:
            return
        commits = [hand.commit for hand in hands if hand.commit]
        answers = self.storage.commit_many(commits)
        for commit, accepted in zip(commits, answers, strict=True):
            self.truth.committed(commit, accepted, self.time)
        if fault is Fault.NONE:
            for hand, accepted in zip(hands, answers, strict=True):
                self._settled(hand, accepted)
        self.check_storage()

    def _settled(self, hand: Hand, accepted: bool) -> None:
        assert hand.commit
        if not accepted:
            self.drop(hand)  # fenced: publishes nothing, acks nothing
            return
        match hand.commit.step:
            case Step.MARK:
                hand.stage = Stage.GRANTED
            case Step.RELEASED:
                self.back(hand, 0.0)
            case Step.RETRY | Step.SNOOZED:
                hand.stage = Stage.STORED
            case _:
                hand.stage = Stage.PUBLISHED

    def publish_next(self, hand: Hand, fault: Fault = Fault.NONE) -> None:
        assert hand.commit
        if fault is not Fault.BEFORE:
            self.publish(hand.entry.message, hand.commit.copy + 1, hand.commit.delay)
        if fault is Fault.NONE:
            hand.stage = Stage.PUBLISHED

    def leave(self, hand: Hand) -> None:
        """Stop while the storage is away: what is known travels with the next copy."""
        assert hand.grant
        message = hand.entry.message
        self.publish(message, hand.grant.copy + 1, 0.0)
        self.ack(hand)

    def crash(self, worker: str) -> None:
        for hand in [hand for hand in self.hands if hand.worker == worker]:
            self.drop(hand)
        self.born += 1
        self.workers[self.workers.index(worker)] = f"w{self.born}"

    def release(self, hand: Hand, *, crashed: bool) -> None:
        """The main process gives back what its dead child, or itself, held."""
        id = hand.entry.message.id
        (crashes,) = self.storage.release(hand.worker, [id], crashed=crashed)
        self.truth.released(hand.worker, id, crashes, crashed=crashed, now=self.time)
        for other in [other for other in self.hands if other.worker == hand.worker]:
            if other.entry.message is hand.entry.message and other.stage in (Stage.GRANTED, Stage.DECIDED):
                self.back(other, 0.0)

    def renew(self, worker: str) -> None:
        ids = sorted({hand.entry.message.id for hand in self.hands if hand.worker == worker})
        self.truth.renewed(worker, ids, self.storage.renew(worker, ids, LEASE), LEASE, self.time)

    # -- time, and people

    def wait(self, seconds: float) -> None:
        self.time += seconds
        self.truth.pass_time(self.time)

    def remove(self, index: str) -> None:
        removed = self.storage.remove(TOPIC, index)
        if removed != (self.truth.records.pop(index, None) is not None):
            raise Violation(Invariant.RECORD, f"removing {index} returned {removed}")

    def put(self, index: str, message: Sent | None) -> None:
        """Keep that something was handled elsewhere: a message that nobody holds, or none of those sent."""
        id, digest = (message.id, message.digest) if message else ("elsewhere", "d1")
        handled_at = datetime.fromtimestamp(self.time, UTC)
        record = Record(topic=TOPIC, index=index, id=id, digest=digest, handled_at=handled_at)
        self.storage.put(record, retention=DAY)
        self.truth.put(id, index, digest, self.time + DAY, self.time)
        self.check_storage()

    def replay(self, message: Sent, *, force: bool) -> None:
        """Somebody asks for a letter; what is accepted is published in a step of its own, or never."""
        replay = Replay(id=message.id, patience=PATIENCE, force=force)
        ((why, copy),) = self.storage.replay_many([replay])
        self.truth.replayed(replay, why, copy, self.time)
        if why is Replayed.ACCEPTED:
            self.replays.append(Entry(message, copy, 0.0))
        self.check_storage()

    def publish_replay(self, entry: Entry, fault: Fault) -> None:
        """Publish what was accepted; whoever was to do so crashes before, or after without knowing."""
        if fault is not Fault.BEFORE:
            self.publish(entry.message, entry.copy, 0.0)
        if fault is not Fault.AFTER:
            self.replays.remove(entry)

    def remove_letter(self, message: Sent) -> None:
        removed = self.storage.dead_remove(message.id)
        if removed != message.is_listed:
            raise Violation(Invariant.LETTER, f"removing that of {message.id} returned {removed}")
        self.truth.letter_removed(message, self.time)
        self.check_storage()

    # -- judgement

    def check_storage(self) -> None:
        for index in {message.index for message in self.truth.sent.values()}:
            record, kept = self.storage.get(TOPIC, index), self.truth.records.get(index)
            if (record.id if record else None) != (kept.id if kept else None):
                raise Violation(Invariant.RECORD, f"{index}: {record} instead of {kept}")
        if self.storage.len(TOPIC) != len(self.truth.records):
            raise Violation(Invariant.RECORD, f"{self.storage.len(TOPIC)} records, not {len(self.truth.records)}")
        for message in self.truth.sent.values():
            if (self.storage.dead_get(message.id) is not None) != message.is_listed:
                raise Violation(Invariant.LETTER, f"{message.id} is {'not ' * message.is_listed}listed")
        counters = self.storage.counters(TOPIC)
        if (counters.handled, counters.retries) != (self.truth.handled, self.truth.retries):
            raise Violation(Invariant.RECORD, f"{counters} does not count {self.truth.handled} handled")
        if counters.dead != sum(message.is_listed for message in self.truth.sent.values()):
            raise Violation(Invariant.LETTER, f"{counters.dead} are counted")

    def drain(self) -> None:
        """End every worker, and let one healthy worker finish what the broker keeps."""
        for worker in [*self.workers]:
            self.crash(worker)
        for _ in range(_PATIENCE):
            if not self.broker:
                break
            entry = min(self.broker, key=lambda entry: entry.due)
            self.wait(max(entry.due - self.time, 0.0))
            (hand,) = self.deliver([entry], "healthy")
            self.claim([hand])
            if hand.stage is Stage.GRANTED:
                self.decide(hand, Step.HANDLED, 0.0)
            if hand.stage is Stage.DECIDED:
                self.commit([hand])
                self.ack(hand)
        if self.broker:
            raise Violation(Invariant.UNFINISHED, f"{len(self.broker)} copies are left")
        for message in self.truth.sent.values():
            self.check_kept(message)
        self.check_storage()
