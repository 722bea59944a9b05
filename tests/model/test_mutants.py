"""A model that cannot fail proves nothing: with any one rule taken out, it must find a broken promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from msgspec import structs

from watch_tasks.storage.base import Storage
from watch_tasks.storage.kept import Entry, Key, State, Status
from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Claim, Commit, Refusal, Refused, Replay, Replayed
from watch_tasks.storage.rules import Rules

from .machine import StorageMachine
from .truth import Invariant, Violation

#: Schedules within which a broken rule must show.
HISTORIES = 3000
#: Where the schedules begin; any number finds all mutants, this one most of them soon.
SEED = 13


class NoTokenCheck(Rules):
    """Whoever finishes a message that somebody handles may settle it, with a token however old."""

    def may_settle(self, commit: Commit, state: State | None) -> bool:
        return state is not None and self.is_held(state)


class NoLease(Rules):
    """A claim does not keep others out."""

    def check_copy(self, claim: Claim, state: State) -> Refused | None:
        return super().check_copy(claim, replace(state, until=min(state.until, self.now)))


class NoWaiting(Rules):
    """A copy is stale as soon as a newer one was decided on, though nobody may have published that."""

    def check_copy(self, claim: Claim, state: State) -> Refused | None:
        if state.status is Status.WAITING and claim.copy < state.copy:
            return Refused(Refusal.STALE)
        return super().check_copy(claim, state)


class NoStandIn(Rules):
    """A copy is stale as soon as a newer one runs, though it may be this very copy that stands in for it."""

    def check_copy(self, claim: Claim, state: State) -> Refused | None:
        if state.status is Status.RUNNING and claim.copy < state.copy:
            return Refused(Refusal.STALE)
        return super().check_copy(claim, state)


class LateCarrier(Rules):
    """A newer copy is granted although an older one is being handled."""

    def check_copy(self, claim: Claim, state: State) -> Refused | None:
        return None if claim.copy > state.copy else super().check_copy(claim, state)


class NoFirstToken(Rules):
    """Whoever finishes last has the record."""

    def is_newer(self, record: Entry, first_token: int) -> bool:
        return False


class NoMarks(Rules):
    """Only records tell what is done."""

    def write_mark(self, id: str, token: int, expires: float) -> None:
        return


class NoHolder(Rules):
    """Messages of one index run side by side."""

    def rival(self, key: Key, id: str) -> State | None:
        return None


class NoNonce(Rules):
    """A claim that is asked again, because its answer was lost, is a new one."""

    def is_asked_again(self, claim: Claim, state: State) -> bool:
        return False


class NoGrave(Rules):
    """What is dead may be claimed again without a replay."""

    def check_copy(self, claim: Claim, state: State) -> Refused | None:
        return None if state.status is Status.DEAD else super().check_copy(claim, state)


class LastingLetter(Rules):
    """A message that is done stays listed as dead."""

    def forget(self, id: str) -> None:
        letter = self.kept.letter(id)
        super().forget(id)
        if letter:
            self.kept.save_letter(id, letter)


class LastingState(Rules):
    """What is known of a message that nothing waits for is kept for ever."""

    def expire(self, state: State) -> None:
        return


class NoCompare(Rules):
    """A letter may be replayed while somebody else is at it."""

    def replay(self, replay: Replay) -> tuple[Replayed, int]:
        state = self.kept.state(replay.id)
        if state and state.status is Status.REPLAYING:
            state.until = self.now
        return super().replay(replay)


class FreshCopy(Rules):
    """A replay that is repeated is another copy, beside the one that may travel already."""

    def replay(self, replay: Replay) -> tuple[Replayed, int]:
        state = self.kept.state(replay.id)
        if state and state.status is Status.REPLAYING and self.now >= state.until:
            state.status = Status.DEAD
        return super().replay(replay)


class NoNewer(Rules):
    """An old message is replayed though a newer one of its index was handled."""

    def replay(self, replay: Replay) -> tuple[Replayed, int]:
        return super().replay(structs.replace(replay, force=True))


def find_violation(mutant: type[Rules], machine: type[StorageMachine] = StorageMachine) -> Violation | None:
    """Return how a storage by these rules breaks its promises, in schedules that are the same each time."""

    class MutatedStorage(MemoryStorage):
        rules = mutant

    @seed(SEEDS.get(mutant, SEED))
    class Mutated(machine):  # type: ignore[valid-type, misc]
        @classmethod
        def open(cls, clock: Callable[[], float]) -> Storage:
            return MutatedStorage(clock=clock)

    try:
        run_state_machine_as_test(
            Mutated,
            settings=settings(
                max_examples=HISTORIES,
                stateful_step_count=50,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Violation as violation:
        return violation
    return None


#: What each mutant breaks: what its schedules show most often first.
BROKEN: dict[type[Rules], list[Invariant]] = {
    NoTokenCheck: [Invariant.STALE_TOKEN],
    NoLease: [Invariant.TWO_CLAIMS],
    NoWaiting: [Invariant.VANISHED],
    NoStandIn: [Invariant.VANISHED],
    LateCarrier: [Invariant.TWO_CLAIMS, Invariant.MARK],
    NoFirstToken: [Invariant.RECORD],
    NoMarks: [Invariant.MARK, Invariant.LETTER],
    NoHolder: [Invariant.TWO_CLAIMS],
    NoNonce: [Invariant.LOST_ANSWER],
    NoGrave: [Invariant.REVIVED, Invariant.LETTER],
    LastingLetter: [Invariant.LETTER],
    LastingState: [Invariant.VANISHED, Invariant.CRASHES],
    NoCompare: [Invariant.REPLAY],
    FreshCopy: [Invariant.REPLAY],
    NoNewer: [Invariant.REPLAY],
}


#: Where those begin that the schedules of `SEED` show only after many seconds.
SEEDS: dict[type[Rules], int] = {NoCompare: 16, FreshCopy: 16, NoNewer: 21}


#: What takes seconds to show: these are part of the long run.
SLOW = {LastingState, NoTokenCheck}


@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        pytest.param(
            mutant,
            broken,
            id=f"{mutant.__name__} breaks {' or '.join(one.name for one in broken)}",
            marks=[pytest.mark.chaos] if mutant in SLOW else [],
        )
        for mutant, broken in BROKEN.items()
    ],
)
def test_a_missing_rule_shows(mutant: type[Rules], broken: list[Invariant]) -> None:
    violation = find_violation(mutant)

    assert violation is not None, f"the model found nothing wrong, instead of: {broken[0]}"
    assert violation.invariant in broken, f"instead of {broken[0]}: {violation}"
