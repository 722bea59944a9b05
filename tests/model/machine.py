"""Random schedules of a storage's life, one action after the other, as a Hypothesis state machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from watch_tasks.message import Once
from watch_tasks.storage.base import Storage
from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Step
from watch_tasks.topics import WEEK

from .truth import Sent
from .world import DAY, LEASE, Fault, Hand, Stage, World

__all__ = ["StorageMachine"]

T = TypeVar("T")

#: Which one of however many there are just now.
picks = st.integers(0, 11)
#: Mostly none: a world where everything fails all the time gets nowhere interesting.
faults = st.sampled_from([Fault.NONE] * 4 + [Fault.AFTER, Fault.AFTER, Fault.BEFORE])
steps = st.sampled_from(
    [Step.HANDLED, Step.HANDLED, Step.RETRY, Step.RETRY, Step.SNOOZED, Step.DEAD, Step.MARK, Step.RELEASED]
)
delays = st.sampled_from([0.0, 0.0, 5.0])
onces: st.SearchStrategy[Once] = st.sampled_from(["message", "index"])


class StorageMachine(RuleBasedStateMachine):
    """Senders, a broker, workers, and everything that may go wrong between them and a storage."""

    #: Schedules run by this class so far.
    histories: ClassVar[int] = 0

    @classmethod
    def open(cls, clock: Callable[[], float]) -> Storage:
        return MemoryStorage(clock=clock)

    @initialize(index=st.sampled_from("ab"), once=onces)
    def begin(self, index: str, once: Once) -> None:
        type(self).histories += 1
        self.world = World(self.open)
        self.world.send(index, once, "d1")

    # -- senders

    @precondition(lambda self: len(self.world.truth.sent) < 6)
    @rule(index=st.sampled_from("aab"), once=onces, digest=st.sampled_from(["d1", "d1", "d2"]))
    def send(self, index: str, once: Once, digest: str) -> None:
        self.world.send(index, once, digest)

    @precondition(lambda self: len(self.world.broker) < 10)
    @rule(pick=picks)
    def send_the_same_again(self, pick: int) -> None:
        """The answer to the first send was lost."""
        self.world.publish(_pick([*self.world.truth.sent.values()], pick), 0, 0.0)

    # -- workers, a step at a time

    @precondition(lambda self: self.world.due())
    @rule(pick=picks, worker=st.integers(0, 2), fault=faults)
    def take(self, pick: int, worker: int, fault: Fault) -> None:
        """Hand over a copy, perhaps one that somebody holds already."""
        hands = self.world.deliver([_pick(self.world.due(), pick)], self.world.workers[worker])
        self.world.claim(hands, fault)
        self._tell(hands[0])

    @precondition(lambda self: len(self.world.due()) > 1)
    @rule(worker=st.integers(0, 2), fault=faults)
    def take_all(self, worker: int, fault: Fault) -> None:
        self.world.claim(self.world.deliver(self.world.due(), self.world.workers[worker]), fault)

    @precondition(lambda self: self._at(Stage.DELIVERED))
    @rule(pick=picks, fault=faults)
    def claim_again(self, pick: int, fault: Fault) -> None:
        self.world.claim([_pick(self._at(Stage.DELIVERED), pick)], fault)

    @precondition(lambda self: self._at(Stage.DELIVERED))
    @rule(pick=picks, fault=faults, really=st.integers(0, 2))
    def bury_unclaimed(self, pick: int, fault: Fault, really: int) -> None:
        if really == 0:
            hand = _pick(self._at(Stage.DELIVERED), pick)
            self.world.bury(hand)
            self.world.commit([hand], fault)

    @precondition(lambda self: self._at(Stage.GRANTED))
    @rule(pick=picks, step=steps, delay=delays, fault=faults)
    def handle(self, pick: int, step: Step, delay: float, fault: Fault) -> None:
        hand = _pick(self._at(Stage.GRANTED), pick)
        self.world.decide(hand, step, delay if step in (Step.RETRY, Step.SNOOZED) else 0.0)
        self.world.commit([hand], fault)

    @precondition(lambda self: len(self._at(Stage.GRANTED)) > 1)
    @rule(fault=faults)
    def handle_all(self, fault: Fault) -> None:
        hands = self._at(Stage.GRANTED)
        for hand in hands:
            self.world.decide(hand, Step.HANDLED, 0.0)
        self.world.commit(hands, fault)

    @precondition(lambda self: self._at(Stage.DECIDED))
    @rule(pick=picks, fault=faults)
    def commit_again(self, pick: int, fault: Fault) -> None:
        self.world.commit([_pick(self._at(Stage.DECIDED), pick)], fault)

    @precondition(lambda self: self._at(Stage.STORED))
    @rule(pick=picks, fault=faults)
    def publish(self, pick: int, fault: Fault) -> None:
        self.world.publish_next(_pick(self._at(Stage.STORED), pick), fault)

    @precondition(lambda self: self._at(Stage.PUBLISHED))
    @rule(pick=picks, fault=faults)
    def ack(self, pick: int, fault: Fault) -> None:
        hand = _pick(self._at(Stage.PUBLISHED), pick)
        self.world.ack(hand) if fault is Fault.NONE else self.world.drop(hand)

    # -- workers that stop

    @precondition(lambda self: self.world.hands)
    @rule(pick=picks)
    def crash(self, pick: int) -> None:
        self.world.crash(_pick(self.world.hands, pick).worker)

    @precondition(lambda self: self.world.hands)
    @rule(pick=picks, crashed=st.booleans())
    def release(self, pick: int, crashed: bool) -> None:
        self.world.release(_pick(self.world.hands, pick), crashed=crashed)

    @precondition(lambda self: self._leaving())
    @rule(pick=picks)
    def leave_without_storage(self, pick: int) -> None:
        self.world.leave(_pick(self._leaving(), pick))

    @precondition(lambda self: self.world.hands)
    @rule(pick=picks)
    def renew(self, pick: int) -> None:
        self.world.renew(_pick(self.world.hands, pick).worker)

    # -- time, and people

    @rule(seconds=st.sampled_from([1.0, LEASE, LEASE + 1, 2 * LEASE + 6]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @precondition(lambda self: self.world.truth.records or self._ending())
    @rule(really=st.integers(0, 3), seconds=st.sampled_from([DAY + 1, WEEK + 1]))
    def outlive(self, really: int, seconds: float) -> None:
        if really == 0:
            self.world.wait(seconds)

    @precondition(lambda self: self.world.truth.records)
    @rule(index=st.sampled_from("ab"), really=st.integers(0, 2))
    def remove(self, index: str, really: int) -> None:
        if really == 0:
            self.world.remove(index)

    @rule(pick=picks, index=st.sampled_from("ab"), really=st.integers(0, 4))
    def put(self, pick: int, index: str, really: int) -> None:
        free = [message for message in self.world.truth.sent.values() if not message.is_held()]
        if really == 0:
            self.world.put(index, None)
        elif really == 1 and free:
            message = _pick(free, pick)
            self.world.put(message.index, message)

    @precondition(lambda self: self._listed() and len(self.world.replays) < 4)
    @rule(pick=picks, force=st.booleans())
    def replay(self, pick: int, force: bool) -> None:
        self.world.replay(_pick(self._listed(), pick), force=force)

    @precondition(lambda self: self.world.replays and len(self.world.broker) < 10)
    @rule(pick=picks, fault=faults)
    def publish_replay(self, pick: int, fault: Fault) -> None:
        self.world.publish_replay(_pick(self.world.replays, pick), fault)

    @precondition(lambda self: self._listed())
    @rule(pick=picks, really=st.integers(0, 1))
    def remove_letter(self, pick: int, really: int) -> None:
        if really == 0:
            self.world.remove_letter(_pick(self._listed(), pick))

    def teardown(self) -> None:
        # After a violation the rest of the story would only hide it behind another one.
        if sys.exception() is None:
            self.world.drain()
        self.world.storage.close()

    def _at(self, stage: Stage) -> list[Hand]:
        return [hand for hand in self.world.hands if hand.stage is stage]

    def _listed(self) -> list[Sent]:
        return [message for message in self.world.truth.sent.values() if message.is_listed]

    def _ending(self) -> list[Sent]:
        return [message for message in self.world.truth.sent.values() if message.forget_at is not None]

    def _leaving(self) -> list[Hand]:
        return [hand for hand in self._at(Stage.DECIDED) if hand.grant]

    def _tell(self, hand: Hand) -> None:
        event(f"a delivery was {hand.stage if hand in self.world.hands else 'refused'}")
        if hand.grant and hand.grant.copy > hand.entry.copy:
            event("a delivery stood in for a copy that was never published")


def _pick(things: Sequence[T], number: int) -> T:
    return things[number % len(things)]
