"""The storage suite: how long a claim holds, who may end it, and what a crash counts."""

from __future__ import annotations

import pytest

from ..storage.base import Storage
from ..storage.protocol import Refusal, Step
from ..topics import WEEK
from .clock import ManualClock
from .storage_values import LEASE, ask, grant, handle, refusal, settle, unclaimed, wait

__all__ = ["LeasePromises"]


class LeasePromises:
    """Protocol §4 (leases) and §5 (crashes)."""

    def test_a_renewed_lease_lasts_from_then_on(self, storage: Storage, clock: ManualClock) -> None:
        grant(storage, ask())
        clock.advance(LEASE - 1)

        assert storage.renew("w1", ["m1"], LEASE) == {"m1"}

        clock.advance(LEASE - 1)
        assert wait(storage, ask()) == pytest.approx(1)

    def test_a_lease_that_ran_out_is_renewed_where_nobody_took_over(self, storage: Storage, clock: ManualClock) -> None:
        grant(storage, ask())
        clock.advance(5 * LEASE)

        assert storage.renew("w1", ["m1"], LEASE) == {"m1"}
        assert refusal(storage, ask(worker="w2")) is Refusal.BUSY

    def test_only_what_a_worker_holds_is_renewed(self, storage: Storage, clock: ManualClock) -> None:
        for id in ("mine", "lost", "theirs"):
            grant(storage, ask(id, index=id, worker="w2" if id == "theirs" else "w1"))
        handle(storage, "done", index="done")
        clock.advance(LEASE)
        storage.renew("w1", ["mine"], LEASE)
        grant(storage, ask("lost", index="lost", worker="w2"))

        assert storage.renew("w1", ["mine", "lost", "theirs", "done", "never"], LEASE) == {"mine"}

    def test_what_is_released_may_be_claimed_at_once(self, storage: Storage) -> None:
        grant(storage, ask())

        assert storage.release("w1", ["m1"]) == [0]
        assert grant(storage, ask(worker="w2")).crashes == 0

    def test_a_released_claim_no_longer_commits(self, storage: Storage) -> None:
        claim = ask()
        granted = grant(storage, claim)
        storage.release("w1", ["m1"])

        assert not storage.commit(settle(Step.HANDLED, claim, granted))

    def test_a_released_index_is_free(self, storage: Storage) -> None:
        grant(storage, ask("m1", once="index"))
        storage.release("w1", ["m1"])

        assert grant(storage, ask("m2", once="index"))

    def test_only_a_started_handler_of_that_worker_counts_as_crashed(self, storage: Storage) -> None:
        grant(storage, ask("started", index="a"))
        grant(storage, ask("fetched", index="b", started=False))
        grant(storage, ask("theirs", index="c", worker="w2"))

        counts = storage.release("w1", ["started", "fetched", "theirs", "never"], crashed=False)
        again = grant(storage, ask("started", index="a"))
        crashed = storage.release("w1", ["started", "fetched", "theirs"], crashed=True)

        assert counts == [0, 0, 0, 0]
        assert again.crashes == 0
        assert crashed == [1, 0, 0]
        assert refusal(storage, ask("theirs", index="c")) is Refusal.BUSY

    def test_crashes_add_up(self, storage: Storage, clock: ManualClock) -> None:
        grant(storage, ask())
        storage.release("w1", ["m1"], crashed=True)
        grant(storage, ask())
        clock.advance(LEASE)

        assert grant(storage, ask()).crashes == 2

    def test_the_crash_of_an_unclaimed_message_is_remembered(self, storage: Storage) -> None:
        assert storage.release("w1", ["m1"], crashed=True) == [1]

        assert grant(storage, ask()).crashes == 1

    def test_each_crash_of_an_unclaimed_message_counts(self, storage: Storage) -> None:
        counts = [storage.release("w1", ["m1"], crashed=True) for _ in range(3)]

        assert counts == [[1], [2], [3]]
        assert storage.release("w1", ["m1"]) == [3]

    def test_the_crash_of_a_dead_message_that_was_never_claimed_counts(self, storage: Storage) -> None:
        assert storage.commit(unclaimed(Step.DEAD))

        assert [storage.release("w1", ["m1"], crashed=True) for _ in range(2)] == [[1], [2]]
        assert refusal(storage, ask()) is Refusal.DUPLICATE

    def test_the_crash_of_an_unclaimed_message_is_forgotten_a_week_after_the_last(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        storage.release("w1", ["m1", "m2"], crashed=True)
        clock.advance(WEEK - 1)
        storage.release("w1", ["m2"], crashed=True)
        clock.advance(1)

        assert [grant(storage, ask(id)).crashes for id in ("m1", "m2")] == [0, 2]

    def test_a_crash_after_a_message_was_done_does_not_count_against_its_next_life(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        handle(storage)
        storage.release("w1", ["m1"], crashed=True)
        clock.advance(WEEK)

        assert grant(storage, ask()).crashes == 0

    def test_a_crash_that_was_remembered_is_kept_with_the_claim(self, storage: Storage, clock: ManualClock) -> None:
        storage.release("w1", ["m1"], crashed=True)
        claim = ask()
        assert storage.commit(settle(Step.RETRY, claim, grant(storage, claim), delay=2 * WEEK))
        clock.advance(2 * WEEK)

        assert grant(storage, ask(copy=1)).crashes == 1

    def test_a_claim_whose_answer_was_lost_is_granted_again(self, storage: Storage, clock: ManualClock) -> None:
        granted = grant(storage, ask(once="index", nonce="n1"))
        clock.advance(LEASE + 1)

        again = grant(storage, ask(once="index", nonce="n1"))

        assert (again.token, again.copy, again.crashes) == (granted.token, granted.copy, 0)
        assert wait(storage, ask(worker="w2", nonce="n1")) == pytest.approx(LEASE)

    def test_another_asking_of_the_same_worker_is_not_granted(self, storage: Storage) -> None:
        grant(storage, ask(nonce="n1"))

        assert refusal(storage, ask(nonce="n2")) is Refusal.BUSY

    def test_a_claim_that_was_taken_over_is_not_granted_again(self, storage: Storage, clock: ManualClock) -> None:
        grant(storage, ask(nonce="n1"))
        clock.advance(LEASE)
        grant(storage, ask(worker="w2", nonce="n1"))

        assert refusal(storage, ask(nonce="n1")) is Refusal.BUSY
