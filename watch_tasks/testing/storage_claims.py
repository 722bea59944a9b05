"""The storage suite: who may handle what, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..storage.base import Storage
from ..storage.protocol import Claim, Granted, Refusal, Refused, Step
from ..topics import WEEK
from .clock import ManualClock
from .storage_values import LEASE, TOPIC, ask, finish, grant, handle, kinds, record, refusal, settle, unclaimed, wait

__all__ = ["ClaimPromises"]

#: Threads that claim at once, and how often.
_THREADS = 16
_ROUNDS = 20


class ClaimPromises:
    """Protocol §2 (copies) and §3 (once-rules)."""

    # -- the first claim

    def test_a_new_message_is_granted(self, storage: Storage, clock: ManualClock) -> None:
        granted = storage.claim(ask(copy=3))

        assert isinstance(granted, Granted)
        assert (granted.copy, granted.progress, granted.crashes) == (3, None, 0)
        assert granted.token > 0
        assert granted.now == pytest.approx(clock(), abs=1e-5)

    def test_tokens_grow_while_the_clock_stands_still_and_when_it_is_set_back(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        tokens = []
        for number, seconds in enumerate([0, 0, -3600, -86400, 0, 5]):
            clock.advance(seconds)
            tokens.append(grant(storage, ask(f"m{number}")).token)

        assert tokens == sorted(set(tokens))

    def test_tokens_follow_the_clock(self, storage: Storage, clock: ManualClock) -> None:
        clock.advance(1000)

        assert grant(storage, ask()).token >= int(clock() * 1_000_000) - 1

    # -- done before

    @pytest.mark.parametrize("copy", [0, 1, 7])
    def test_what_has_a_record_is_a_duplicate(self, storage: Storage, copy: int) -> None:
        handle(storage)

        assert refusal(storage, ask(copy=copy)) is Refusal.DUPLICATE
        assert storage.counters(TOPIC).duplicates == 1

    @pytest.mark.parametrize("copy", [0, 1])
    def test_what_was_replaced_is_a_duplicate_by_its_mark(self, storage: Storage, copy: int) -> None:
        handle(storage, "m1")
        handle(storage, "m2")

        assert refusal(storage, ask("m1", copy=copy)) is Refusal.DUPLICATE

    def test_what_was_removed_is_a_duplicate_by_its_mark(self, storage: Storage) -> None:
        handle(storage)
        storage.remove(TOPIC, "order-1")

        assert refusal(storage, ask()) is Refusal.DUPLICATE

    def test_a_new_message_under_a_handled_index_is_granted(self, storage: Storage) -> None:
        handle(storage, "m1")

        assert grant(storage, ask("m2"))

    def test_what_is_known_of_a_retry_is_forgotten_with_the_duplicate(self, storage: Storage) -> None:
        claim = ask()
        assert storage.commit(settle(Step.RETRY, claim, grant(storage, claim), delay=60))
        storage.put(record("order-1", id="m1"))

        assert refusal(storage, ask(copy=1)) is Refusal.DUPLICATE
        assert refusal(storage, ask(copy=0)) is Refusal.DUPLICATE

    # -- dead before

    @pytest.mark.parametrize(("copy", "why"), [(1, Refusal.DUPLICATE), (2, Refusal.DUPLICATE)])
    def test_a_copy_that_is_dead_or_older_is_a_duplicate(self, storage: Storage, copy: int, why: Refusal) -> None:
        claim = ask(copy=2)
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))

        assert refusal(storage, ask(copy=copy)) is why

    def test_a_newer_copy_than_the_dead_one_is_granted_and_its_letter_is_gone(self, storage: Storage) -> None:
        claim = ask(copy=2)
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))

        granted = grant(storage, ask(copy=3))

        assert granted.copy == 3
        assert storage.dead_get("m1") is None

    def test_a_removed_dead_letter_stays_a_duplicate(self, storage: Storage) -> None:
        claim = ask()
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
        storage.dead_remove("m1")

        assert refusal(storage, ask()) is Refusal.DUPLICATE

    def test_a_replayed_message_starts_afresh(self, storage: Storage) -> None:
        claim = ask()
        grant(storage, claim)
        storage.release("w1", ["m1"], crashed=True)
        granted = grant(storage, claim)
        assert storage.commit(settle(Step.MARK, claim, granted, blob=b"progress"))
        assert storage.commit(settle(Step.DEAD, claim, granted))

        replayed = grant(storage, ask(copy=1))

        assert (granted.crashes, replayed.crashes, replayed.progress) == (1, 0, None)

    def test_once_index_the_replay_of_an_overtaken_message_is_a_duplicate_and_its_letter_is_gone(
        self, storage: Storage
    ) -> None:
        claim = ask("m1", once="index")
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
        handle(storage, "m2", once="index")

        assert refusal(storage, ask("m1", once="index", copy=1)) is Refusal.DUPLICATE
        assert storage.dead_get("m1") is None

    def test_a_removed_dead_letter_is_known_for_a_week(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
        storage.dead_remove("m1")
        clock.advance(WEEK - 1)
        within = refusal(storage, ask())
        clock.advance(1)

        assert within is Refusal.DUPLICATE
        assert grant(storage, ask()).crashes == 0

    def test_a_dead_message_is_known_while_its_letter_is_listed(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
        clock.advance(100 * WEEK)

        assert refusal(storage, ask()) is Refusal.DUPLICATE

    def test_what_died_again_after_its_letter_was_removed_is_known_for_longer(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        claim = ask()
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
        storage.dead_remove("m1")
        again = ask(copy=1)
        assert storage.commit(settle(Step.DEAD, again, grant(storage, again)))
        clock.advance(2 * WEEK)

        assert refusal(storage, again) is Refusal.DUPLICATE

    # -- waiting

    @pytest.mark.parametrize("seconds", [0, 30, 60, 1000])
    def test_the_waiting_copy_is_granted_with_its_progress(
        self, storage: Storage, clock: ManualClock, seconds: int
    ) -> None:
        claim = ask()
        assert storage.commit(settle(Step.RETRY, claim, grant(storage, claim), delay=60, blob=b"progress"))
        clock.advance(seconds)

        granted = grant(storage, ask(copy=1))

        assert (granted.copy, granted.progress, granted.crashes) == (1, b"progress", 0)

    def test_an_older_copy_is_busy_until_the_waiting_one_is_overdue_by_a_lease(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        claim = ask()
        assert storage.commit(settle(Step.RETRY, claim, grant(storage, claim), delay=60, blob=b"progress"))

        first = wait(storage, ask(copy=0))
        clock.advance(60 + LEASE - 1)
        second = wait(storage, ask(copy=0))

        assert [first, second] == pytest.approx([60 + LEASE, 1])

    def test_then_it_is_taken_as_that_copy(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.RETRY, claim, grant(storage, claim), delay=60, blob=b"progress"))
        clock.advance(60 + LEASE)

        granted = grant(storage, ask(copy=0))

        assert (granted.copy, granted.progress) == (1, b"progress")

    def test_the_delivery_that_stands_in_is_never_stale(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.RETRY, claim, grant(storage, claim)))
        clock.advance(LEASE)
        grant(storage, ask(copy=0))

        again = wait(storage, ask(copy=0))
        clock.advance(LEASE)

        assert again == pytest.approx(LEASE)
        assert grant(storage, ask(copy=0)).copy == 1

    def test_a_waiting_message_never_expires(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.SNOOZED, claim, grant(storage, claim), delay=20 * WEEK, blob=b"progress"))
        clock.advance(20 * WEEK)

        assert grant(storage, ask(copy=1)).progress == b"progress"

    # -- running

    @pytest.mark.parametrize("worker", ["w1", "w2"])
    def test_the_same_copy_is_busy_while_its_lease_lasts(
        self, storage: Storage, clock: ManualClock, worker: str
    ) -> None:
        grant(storage, ask())
        clock.advance(5)

        assert wait(storage, ask(worker=worker)) == pytest.approx(LEASE - 5)

    def test_a_newer_copy_is_busy_while_the_lease_of_the_older_lasts(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        grant(storage, ask())

        assert refusal(storage, ask(copy=1, worker="w2")) is Refusal.BUSY

        clock.advance(LEASE)
        granted = grant(storage, ask(copy=1, worker="w2"))
        assert (granted.copy, granted.crashes) == (1, 0)

    @pytest.mark.parametrize("seconds", [0, 2 * LEASE])
    def test_a_copy_older_than_a_claimed_one_is_stale(
        self, storage: Storage, clock: ManualClock, seconds: float
    ) -> None:
        grant(storage, ask(copy=2))
        clock.advance(seconds)

        assert refusal(storage, ask(copy=1)) is Refusal.STALE

    def test_after_its_lease_it_is_taken_over_and_the_crash_is_counted(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        first = grant(storage, ask())
        clock.advance(LEASE)

        second = grant(storage, ask(worker="w2"))
        clock.advance(LEASE)
        third = grant(storage, ask(worker="w3"))

        assert first.token < second.token < third.token
        assert (second.crashes, third.crashes) == (1, 2)

    def test_a_crash_before_its_handlers_started_counts_nothing(self, storage: Storage, clock: ManualClock) -> None:
        grant(storage, ask(started=False))
        clock.advance(LEASE)

        assert grant(storage, ask()).crashes == 0

    # -- once="index"

    def test_once_index_a_handled_index_makes_later_messages_duplicates(self, storage: Storage) -> None:
        handle(storage, "m1", once="index")

        assert refusal(storage, ask("m2", once="index")) is Refusal.DUPLICATE

    def test_once_index_other_data_is_a_conflict_and_no_duplicate(self, storage: Storage) -> None:
        handle(storage, "m1", once="index")

        assert refusal(storage, ask("m2", once="index", digest="d2")) is Refusal.CONFLICT
        assert storage.counters(TOPIC).duplicates == 0

    def test_once_index_a_running_message_makes_others_wait(self, storage: Storage, clock: ManualClock) -> None:
        grant(storage, ask("m1", once="index"))
        clock.advance(3)

        assert wait(storage, ask("m2", once="index")) == pytest.approx(LEASE - 3)

    def test_once_index_after_its_lease_another_message_may_run_and_the_first_is_fenced(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        first, second = ask("m1", once="index"), ask("m2", once="index", worker="w2")
        lost = grant(storage, first)
        clock.advance(LEASE)
        held = grant(storage, second)

        assert not storage.commit(settle(Step.HANDLED, first, lost))
        assert storage.renew("w1", ["m1"], LEASE) == set()
        finish(storage, second, held)

    @pytest.mark.parametrize("step", [Step.RETRY, Step.SNOOZED, Step.RELEASED, Step.DEAD])
    def test_once_index_what_waits_or_is_dead_holds_nothing(self, storage: Storage, step: Step) -> None:
        claim = ask("m1", once="index")
        assert storage.commit(settle(step, claim, grant(storage, claim), delay=60))

        assert grant(storage, ask("m2", once="index"))

    def test_once_index_the_retry_of_an_overtaken_message_is_a_duplicate(self, storage: Storage) -> None:
        claim = ask("m1", once="index")
        assert storage.commit(settle(Step.RETRY, claim, grant(storage, claim)))
        handle(storage, "m2", once="index")

        assert refusal(storage, ask("m1", once="index", copy=1)) is Refusal.DUPLICATE

    def test_once_index_ends_with_the_retention(self, storage: Storage, clock: ManualClock) -> None:
        handle(storage, "m1", once="index")
        clock.advance(WEEK + 1)

        assert grant(storage, ask("m2", once="index"))

    def test_once_index_ends_with_the_removal_of_the_record(self, storage: Storage) -> None:
        handle(storage, "m1", once="index")
        storage.remove(TOPIC, "order-1")

        assert grant(storage, ask("m2", once="index"))

    def test_once_index_holds_for_one_topic_and_one_index(self, storage: Storage) -> None:
        grant(storage, ask("m1", once="index"))

        assert grant(storage, ask("m2", once="index", index="order-2"))
        assert grant(storage, ask("m3", once="index", topic="alarms"))

    def test_once_message_holds_no_index(self, storage: Storage) -> None:
        grant(storage, ask("m1"))

        assert grant(storage, ask("m2"))

    # -- many at once

    def test_many_claims_are_answered_in_order_each_after_those_before(self, storage: Storage) -> None:
        handle(storage, "done", index="done")

        answers = storage.claim_many([ask("m1"), ask("done", index="done"), ask("m1"), ask("m2", index="b")])

        assert [type(answer) for answer in answers] == [Granted, Refused, Refused, Granted]
        assert [answer.why for answer in answers if isinstance(answer, Refused)] == [Refusal.DUPLICATE, Refusal.BUSY]

    def test_a_thousand_claims_and_commits_in_one_call(self, storage: Storage) -> None:
        claims = [ask(f"m{number}", index=f"order-{number}") for number in range(1001)]

        answers = [answer for answer in storage.claim_many(claims) if isinstance(answer, Granted)]
        commits = [settle(Step.HANDLED, claim, answer) for claim, answer in zip(claims, answers, strict=True)]

        assert len({answer.token for answer in answers}) == 1001
        assert storage.commit_many(commits) == [True] * 1001
        assert storage.len(TOPIC) == 1001

    def test_nothing_asked_is_nothing_answered(self, storage: Storage) -> None:
        assert storage.claim_many([]) == []
        assert storage.commit_many([]) == []
        assert storage.renew("w1", [], LEASE) == set()
        assert storage.release("w1", []) == []

    def test_of_many_that_claim_a_message_at_once_one_is_granted(self, storage: Storage) -> None:
        for number in range(_ROUNDS):
            answers = _race(storage, [ask(f"m{number}", worker=f"w{worker}") for worker in range(_THREADS)])

            assert sum(isinstance(answer, Granted) for answer in answers) == 1

    def test_of_many_that_claim_an_index_at_once_one_is_granted(self, storage: Storage) -> None:
        for number in range(_ROUNDS):
            index = f"order-{number}"
            answers = _race(storage, [ask(f"m{number}-{one}", index=index, once="index") for one in range(_THREADS)])

            assert sum(isinstance(answer, Granted) for answer in answers) == 1

    def test_another_opener_of_the_same_storage_sees_the_claim(
        self, storage: Storage, shared: Callable[[], Storage]
    ) -> None:
        grant(storage, ask())

        with shared() as other:
            assert refusal(other, ask()) is Refusal.BUSY
            assert other.renew("w1", ["m1"], LEASE) == {"m1"}

    # -- its story

    def test_claims_are_told_in_the_story(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        granted = grant(storage, claim)
        storage.claim(ask(worker="w2"))
        finish(storage, claim, granted)
        storage.claim(ask())

        events = list(storage.explain(TOPIC, "order-1"))

        assert [event.event for event in events] == ["sent", "attempt", "busy", "handled", "suppressed"]
        assert {event.id for event in events} == {"m1"}
        assert [event.worker for event in events[:3]] == ["w1", "w1", "w2"]
        assert events[0].at.timestamp() == claim.sent_at
        assert events[1].at.timestamp() == pytest.approx(clock(), abs=1e-5)

    def test_the_sending_of_a_message_is_told_once_though_it_is_busy_often(self, storage: Storage) -> None:
        first = ask("m1", once="index")
        granted = grant(storage, first)
        storage.claim(ask("m2", once="index"))
        storage.claim(ask("m2", once="index"))
        assert storage.commit(settle(Step.RELEASED, first, granted))
        grant(storage, ask("m2", once="index"))

        told = [event.event for event in storage.explain(TOPIC, "order-1") if event.id == "m2"]

        assert told == ["busy", "busy", "sent", "attempt"]

    def test_the_sending_of_what_is_never_granted_is_not_told(self, storage: Storage) -> None:
        handle(storage, "m1", once="index")
        storage.claim(ask("m2", once="index"))
        storage.claim(ask("m2", once="index"))
        storage.claim(ask("m3", once="index", digest="d2"))

        told = [event.event for event in storage.explain(TOPIC, "order-1") if event.id != "m1"]

        assert told == ["suppressed", "suppressed"]

    def test_a_conflict_is_left_to_the_burial_to_tell(self, storage: Storage) -> None:
        handle(storage, "m1", once="index")
        storage.claim(ask("m2", once="index", digest="d2"))
        storage.commit(unclaimed(Step.DEAD, "m2"))

        assert "suppressed" not in kinds(storage)


def _race(storage: Storage, claims: Sequence[Claim]) -> list[Granted | Refused]:
    """Make all claims from threads of their own, as nearly at once as a machine can."""
    start = threading.Barrier(len(claims))

    def run(claim: Claim) -> Granted | Refused:
        start.wait(10)
        return storage.claim(claim)

    with ThreadPoolExecutor(len(claims)) as pool:
        return list(pool.map(run, claims))
