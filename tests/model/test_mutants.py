"""A model that cannot fail proves nothing: with any one rule taken out, it must find a broken promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from watch_tasks.storage.base import Storage
from watch_tasks.storage.memory import MemoryStorage, _State, _Status
from watch_tasks.storage.memory_records import Entry, Key
from watch_tasks.storage.protocol import Claim, Commit, Refusal, Refused, Replay, Replayed

from .machine import StorageMachine
from .truth import Invariant, Violation

#: Schedules within which a broken rule must show.
HISTORIES = 3000
#: Where the schedules begin; any number finds all mutants, this one soon.
SEED = 13


class NoTokenCheck(MemoryStorage):
    """Whoever finishes a message that somebody handles may settle it, with a token however old."""

    def _may_settle(self, commit: Commit, state: _State | None) -> bool:
        return state is not None and self._is_held(commit.id, state)


class NoLease(MemoryStorage):
    """A claim does not keep others out."""

    def _check_copy(self, claim: Claim, state: _State, now: float) -> Refused | None:
        return super()._check_copy(claim, replace(state, until=min(state.until, now)), now)


class NoWaiting(MemoryStorage):
    """A copy is stale as soon as a newer one was decided on, though nobody may have published that."""

    def _check_copy(self, claim: Claim, state: _State, now: float) -> Refused | None:
        if state.status is _Status.WAITING and claim.copy < state.copy:
            return Refused(Refusal.STALE)
        return super()._check_copy(claim, state, now)


class NoStandIn(MemoryStorage):
    """A copy is stale as soon as a newer one runs, though it may be this very copy that stands in for it."""

    def _check_copy(self, claim: Claim, state: _State, now: float) -> Refused | None:
        if state.status is _Status.RUNNING and claim.copy < state.copy:
            return Refused(Refusal.STALE)
        return super()._check_copy(claim, state, now)


class LateCarrier(MemoryStorage):
    """A newer copy is granted although an older one is being handled."""

    def _check_copy(self, claim: Claim, state: _State, now: float) -> Refused | None:
        return None if claim.copy > state.copy else super()._check_copy(claim, state, now)


class NoFirstToken(MemoryStorage):
    """Whoever finishes last has the record."""

    def _is_newer(self, record: Entry, first_token: int) -> bool:
        return False


class NoMarks(MemoryStorage):
    """Only records tell what is done."""

    def _mark(self, id: str, token: int, expires: float) -> None:
        return


class NoHolder(MemoryStorage):
    """Messages of one index run side by side."""

    def _rival(self, key: Key, id: str, now: float) -> _State | None:
        return None


class NoNonce(MemoryStorage):
    """A claim that is asked again, because its answer was lost, is a new one."""

    def _is_asked_again(self, claim: Claim, state: _State) -> bool:
        return False


class NoGrave(MemoryStorage):
    """What is dead may be claimed again without a replay."""

    def _check_copy(self, claim: Claim, state: _State, now: float) -> Refused | None:
        return None if state.status is _Status.DEAD else super()._check_copy(claim, state, now)


class LastingLetter(MemoryStorage):
    """A message that is done stays listed as dead."""

    def _forget(self, id: str) -> None:
        letter = self._dead_letters.get(id)
        super()._forget(id)
        if letter:
            self._dead_letters[id] = letter


class LastingState(MemoryStorage):
    """What is known of a message that nothing waits for is kept for ever."""

    def _expire_state(self, id: str, state: _State, now: float) -> None:
        return


class NoCompare(MemoryStorage):
    """A letter may be replayed while somebody else is at it."""

    def _replay_one(self, replay: Replay, now: float) -> tuple[Replayed, int]:
        state = self._states.get(replay.id)
        if state and state.status is _Status.REPLAYING:
            state.until = now
        return super()._replay_one(replay, now)


class FreshCopy(MemoryStorage):
    """A replay that is repeated is another copy, beside the one that may travel already."""

    def _replay_one(self, replay: Replay, now: float) -> tuple[Replayed, int]:
        state = self._states.get(replay.id)
        if state and state.status is _Status.REPLAYING and now >= state.until:
            state.status = _Status.DEAD
        return super()._replay_one(replay, now)


class NoNewer(MemoryStorage):
    """An old message is replayed though a newer one of its index was handled."""

    def _replay_one(self, replay: Replay, now: float) -> tuple[Replayed, int]:
        return super()._replay_one(replace(replay, force=True), now)


def find_violation(storage: type[MemoryStorage], machine: type[StorageMachine] = StorageMachine) -> Violation | None:
    """Return how a storage breaks its promises, in schedules that are the same each time."""

    @seed(SEED)
    class Mutated(machine):  # type: ignore[valid-type, misc]
        @classmethod
        def open(cls, clock: Callable[[], float]) -> Storage:
            return storage(clock=clock)

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
BROKEN: dict[type[MemoryStorage], list[Invariant]] = {
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


#: What takes seconds to show: these are part of the long run.
SLOW = {LastingState, NoTokenCheck}


@pytest.mark.parametrize(
    ("storage", "broken"),
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
def test_a_missing_rule_shows(storage: type[MemoryStorage], broken: list[Invariant]) -> None:
    violation = find_violation(storage)

    assert violation is not None, f"the model found nothing wrong, instead of: {broken[0]}"
    assert violation.invariant in broken, f"instead of {broken[0]}: {violation}"
