"""The storage suite: how a message is settled, by whom, and how often."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ..record import Counters
from ..storage.base import Storage
from ..storage.protocol import STORY_LENGTH, Step
from ..storage.stored import encode_letter
from ..topics import WEEK
from .clock import ManualClock
from .storage_values import LEASE, TOPIC, ask, finish, grant, handle, kinds, letter, record, settle, unclaimed

__all__ = ["CommitPromises"]

_STEPS = list(Step)


class CommitPromises:
    """Protocol §1 (record, mark, first token), §2 (fencing, repeated commits) and dead letters."""

    # -- each step

    def test_a_handled_message_is_recorded(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        granted = grant(storage, claim)
        clock.advance(2)
        finish(storage, claim, granted)

        found = storage.get(TOPIC, "order-1")

        assert found is not None
        assert (found.topic, found.index, found.id, found.digest) == (TOPIC, "order-1", "m1", "d1")
        assert found.handled_at.timestamp() == pytest.approx(clock(), abs=1e-5)
        assert storage.counters(TOPIC) == Counters(handled=1)

    @pytest.mark.parametrize("step", [Step.RETRY, Step.SNOOZED])
    def test_a_put_off_message_waits_as_its_next_copy(self, storage: Storage, step: Step) -> None:
        claim = ask(copy=4)
        assert storage.commit(settle(step, claim, grant(storage, claim), blob=b"progress"))

        granted = grant(storage, ask(copy=5))

        assert (granted.copy, granted.progress) == (5, b"progress")
        assert storage.counters(TOPIC).retries == (step is Step.RETRY)

    def test_a_mark_is_there_for_whoever_takes_over(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        granted = grant(storage, claim)
        assert storage.commit(settle(Step.MARK, claim, granted, blob=b"one"))
        assert storage.commit(settle(Step.MARK, claim, granted, blob=b"two"))
        clock.advance(LEASE)

        assert grant(storage, ask(worker="w2")).progress == b"two"

    def test_a_mark_keeps_the_claim(self, storage: Storage) -> None:
        claim = ask()
        granted = grant(storage, claim)
        storage.commit(settle(Step.MARK, claim, granted, blob=b"one"))

        assert storage.renew("w1", ["m1"], LEASE) == {"m1"}
        finish(storage, claim, granted)

    def test_a_released_message_is_claimed_as_the_same_copy(self, storage: Storage) -> None:
        claim = ask(copy=2)
        assert storage.commit(settle(Step.RELEASED, claim, grant(storage, claim), blob=b"progress"))

        granted = grant(storage, ask(copy=2, worker="w2"))

        assert (granted.copy, granted.progress, granted.crashes) == (2, b"progress", 0)

    def test_a_dead_message_is_kept_whole(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))

        found = storage.dead_get("m1")

        assert found is not None
        assert (found.id, found.topic, found.index, found.error) == ("m1", TOPIC, "order-1", "ValueError: no")
        assert found.dead_at.timestamp() == pytest.approx(clock(), abs=1e-5)
        assert storage.counters(TOPIC).dead == 1
        assert storage.get(TOPIC, "order-1") is None

    # -- fencing

    @pytest.mark.parametrize("step", _STEPS)
    def test_the_newest_token_counts_after_its_lease_where_nobody_took_over(
        self, storage: Storage, clock: ManualClock, step: Step
    ) -> None:
        claim = ask()
        granted = grant(storage, claim)
        clock.advance(100 * LEASE)

        assert storage.commit(settle(step, claim, granted))

    @pytest.mark.parametrize("step", _STEPS)
    def test_an_older_token_changes_nothing(self, storage: Storage, clock: ManualClock, step: Step) -> None:
        claim = ask()
        lost = grant(storage, claim)
        clock.advance(LEASE)
        held = grant(storage, ask(worker="w2"))

        assert not storage.commit(settle(step, claim, lost, blob=b"{}"))

        assert storage.len(TOPIC) == 0
        assert storage.dead_get("m1") is None
        assert storage.counters(TOPIC) == Counters()
        assert kinds(storage)[-1:] == ["fenced"]
        finish(storage, ask(worker="w2"), held)

    @pytest.mark.parametrize("step", [Step.HANDLED, Step.DEAD, Step.MARK])
    @pytest.mark.parametrize("first", [Step.RETRY, Step.SNOOZED, Step.RELEASED])
    def test_a_message_that_was_let_go_is_not_settled_by_its_old_token(
        self, storage: Storage, first: Step, step: Step
    ) -> None:
        claim = ask()
        granted = grant(storage, claim)
        assert storage.commit(settle(first, claim, granted))

        assert not storage.commit(settle(step, claim, granted))

    @pytest.mark.parametrize("step", _STEPS)
    def test_a_token_of_a_message_never_claimed_is_refused(self, storage: Storage, step: Step) -> None:
        granted = grant(storage, ask("m1"))

        assert not storage.commit(settle(step, ask("m2"), granted))

    def test_a_duplicate_finished_elsewhere_is_refused(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        lost = grant(storage, claim)
        clock.advance(LEASE)
        handle(storage, worker="w2")

        assert not storage.commit(settle(Step.HANDLED, claim, lost))
        assert storage.counters(TOPIC).handled == 1

    def test_many_commits_are_accepted_or_refused_each_alone(self, storage: Storage, clock: ManualClock) -> None:
        claims = [ask(f"m{number}", index=f"order-{number}") for number in range(3)]
        granted = [grant(storage, claim) for claim in claims]
        clock.advance(LEASE)
        grant(storage, ask("m1", index="order-1", worker="w2"))

        commits = [settle(Step.HANDLED, *pair) for pair in zip(claims, granted, strict=True)]

        assert storage.commit_many(commits) == [True, False, True]
        assert storage.len(TOPIC) == 2

    # -- the same again, because the answer was lost

    @pytest.mark.parametrize("step", _STEPS)
    def test_the_same_commit_again_is_accepted_and_changes_nothing(self, storage: Storage, step: Step) -> None:
        claim = ask()
        commit = settle(step, claim, grant(storage, claim), delay=5)
        assert storage.commit(commit)
        counters = storage.counters(TOPIC)

        assert storage.commit_many([commit, commit]) == [True, True]
        assert storage.counters(TOPIC) == counters

    def test_a_repeated_commit_is_known_by_its_mark_too(self, storage: Storage) -> None:
        claim = ask("m1")
        commit = settle(Step.HANDLED, claim, grant(storage, claim))
        assert storage.commit(commit)
        handle(storage, "m2")

        assert storage.commit(commit)
        found = storage.get(TOPIC, "order-1")
        assert found is not None
        assert found.id == "m2"

    def test_a_repeated_retry_after_the_next_claim_is_refused(self, storage: Storage) -> None:
        claim = ask()
        commit = settle(Step.RETRY, claim, grant(storage, claim))
        assert storage.commit(commit)
        grant(storage, ask(copy=1))

        assert not storage.commit(commit)

    # -- who writes the record

    def test_the_message_claimed_last_has_the_record(self, storage: Storage) -> None:
        old, new = ask("m1"), ask("m2")
        first, second = grant(storage, old), grant(storage, new)

        finish(storage, new, second)
        finish(storage, old, first)

        found = storage.get(TOPIC, "order-1")
        assert found is not None
        assert found.id == "m2"
        assert storage.len(TOPIC) == 1
        assert storage.counters(TOPIC).handled == 2

    def test_an_older_message_finishing_late_leaves_its_mark(self, storage: Storage) -> None:
        old, new = ask("m1"), ask("m2")
        first, second = grant(storage, old), grant(storage, new)
        finish(storage, new, second)
        finish(storage, old, first)

        answers = [type(answer).__name__ for answer in storage.claim_many([ask("m1"), ask("m2")])]

        assert answers == ["Refused", "Refused"]

    def test_a_retry_keeps_the_first_token(self, storage: Storage) -> None:
        old = ask("m1")
        assert storage.commit(settle(Step.RETRY, old, grant(storage, old)))
        handle(storage, "m2")
        handle(storage, "m1", copy=1)

        found = storage.get(TOPIC, "order-1")

        assert found is not None
        assert found.id == "m2"

    def test_a_takeover_keeps_the_first_token(self, storage: Storage, clock: ManualClock) -> None:
        grant(storage, ask("m1"))
        handle(storage, "m2")
        clock.advance(LEASE)
        handle(storage, "m1", worker="w2")

        found = storage.get(TOPIC, "order-1")

        assert found is not None
        assert found.id == "m2"

    def test_a_put_record_is_newer_than_what_was_claimed_before(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask("m1")
        granted = grant(storage, claim)
        storage.put(record("order-1", id="by hand", at=clock()))
        finish(storage, claim, granted)

        found = storage.get(TOPIC, "order-1")

        assert found is not None
        assert found.id == "by hand"

    # -- unclaimed

    def test_an_unclaimed_message_is_recorded_each_time(self, storage: Storage) -> None:
        assert storage.commit_many([unclaimed(Step.HANDLED, "m1"), unclaimed(Step.HANDLED, "m2")]) == [True, True]

        found = storage.get(TOPIC, "order-1")
        assert found is not None
        assert found.id == "m2"
        assert storage.len(TOPIC) == 1
        assert storage.counters(TOPIC).handled == 2

    def test_an_unclaimed_retry_is_counted(self, storage: Storage) -> None:
        assert storage.commit(unclaimed(Step.RETRY))

        assert storage.counters(TOPIC).retries == 1

    def test_an_unclaimed_step_does_not_touch_a_claim(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        granted = grant(storage, claim)
        storage.commit(settle(Step.MARK, claim, granted, blob=b"progress"))
        for step in (Step.RETRY, Step.SNOOZED, Step.MARK, Step.RELEASED):
            assert storage.commit(unclaimed(step))
        clock.advance(LEASE)

        taken = grant(storage, ask(worker="w2"))

        assert (taken.copy, taken.progress) == (0, b"progress")

    def test_an_unclaimed_message_is_buried_once(self, storage: Storage, clock: ManualClock) -> None:
        assert storage.commit(unclaimed(Step.DEAD, error="first"))
        clock.advance(5)
        assert storage.commit(unclaimed(Step.DEAD, error="second"))

        found = storage.dead_get("m1")

        assert found is not None
        assert found.error == "first"
        assert storage.counters(TOPIC).dead == 1

    def test_what_was_handled_is_not_buried(self, storage: Storage) -> None:
        handle(storage, "replaced")
        handle(storage, "recorded")

        for id in ("replaced", "recorded"):
            assert storage.commit(unclaimed(Step.DEAD, id))
            assert storage.dead_get(id) is None

    def test_a_burial_without_claim_leaves_a_live_claim_alone(self, storage: Storage) -> None:
        claim = ask()
        granted = grant(storage, claim)
        assert storage.commit(unclaimed(Step.DEAD))

        finish(storage, claim, granted)

    def test_a_burial_without_claim_takes_over_what_nobody_renewed(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        lost = grant(storage, claim)
        clock.advance(LEASE)
        assert storage.commit(unclaimed(Step.DEAD, error="first"))

        assert not storage.commit(settle(Step.HANDLED, claim, lost))
        assert not storage.commit(settle(Step.DEAD, claim, lost))
        found = storage.dead_get("m1")
        assert found is not None
        assert found.error == "first"

    def test_what_is_handled_after_its_burial_is_listed_no_more(self, storage: Storage) -> None:
        claim = ask()
        granted = grant(storage, claim)
        assert storage.commit(unclaimed(Step.DEAD))
        assert storage.dead_get("m1")
        finish(storage, claim, granted)

        assert storage.dead_get("m1") is None
        assert list(storage.dead()) == []
        assert storage.counters(TOPIC) == Counters(handled=1)

    def test_what_is_put_as_handled_is_listed_no_more(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
        storage.put(record("order-1", id="m1", at=clock()))

        assert storage.dead_get("m1") is None

    def test_what_is_put_with_its_retention_over_stays_listed(self, storage: Storage, clock: ManualClock) -> None:
        claim = ask()
        assert storage.commit(settle(Step.DEAD, claim, grant(storage, claim)))
        storage.put(record("order-1", id="m1", at=clock() - WEEK))

        assert storage.dead_get("m1")

    def test_a_removed_letter_is_not_written_again_by_a_redelivery(self, storage: Storage) -> None:
        assert storage.commit(unclaimed(Step.DEAD))
        assert storage.dead_remove("m1")
        assert storage.commit(unclaimed(Step.DEAD))

        assert storage.dead_get("m1") is None

    def test_a_letter_may_have_neither_topic_nor_index(self, storage: Storage) -> None:
        assert storage.commit(unclaimed(Step.DEAD, "hash", None, topic=""))

        (found,) = storage.dead()

        assert (found.id, found.topic, found.index) == ("hash", None, None)
        assert storage.topics() == set()

    def test_a_letter_of_a_name_that_is_no_topic_reaches_no_other(self, storage: Storage) -> None:
        handle(storage, "m1", index="b:c", topic="a")
        for name in ("a:b", "a%3ab", "A b"):
            assert storage.commit(unclaimed(Step.DEAD, name, "c", topic=name))

        assert storage.topics() == {"a", "a:b", "a%3ab", "A b"}
        assert [found.id for found in storage.dead("a:b")] == ["a:b"]
        assert storage.counters("a") == Counters(handled=1)

    # -- dead letters

    def test_dead_letters_come_newest_first(self, storage: Storage, clock: ManualClock) -> None:
        for number in range(450):
            topic = TOPIC if number % 2 else "alarms"
            assert storage.commit(unclaimed(Step.DEAD, f"m{number}", topic=topic))
            clock.advance(1)

        everything = [found.id for found in storage.dead()]

        assert everything == [f"m{number}" for number in reversed(range(450))]
        assert [found.id for found in storage.dead(TOPIC)] == everything[::2]
        assert storage.counters(TOPIC).dead == 225

    def test_dead_letters_since(self, storage: Storage, clock: ManualClock) -> None:
        for number in range(4):
            assert storage.commit(unclaimed(Step.DEAD, f"m{number}"))
            clock.advance(1)
        third = storage.dead_get("m2")
        assert third is not None

        assert [found.id for found in storage.dead(since=third.dead_at)] == ["m3", "m2"]
        assert [found.id for found in storage.dead(TOPIC, since=third.dead_at)] == ["m3", "m2"]

    def test_a_removed_letter_is_gone(self, storage: Storage) -> None:
        storage.commit(unclaimed(Step.DEAD))

        assert storage.dead_remove("m1", by="operator")
        assert not storage.dead_remove("m1")

        assert storage.dead_get("m1") is None
        assert list(storage.dead()) == []
        assert storage.counters(TOPIC).dead == 0
        (event,) = storage.explain(TOPIC, "order-1")
        assert (event.event, event.by) == ("removed", "operator")

    def test_there_is_no_letter_of_a_message_that_never_died(self, storage: Storage) -> None:
        assert storage.dead_get("m1") is None
        assert not storage.dead_remove("m1")
        assert list(storage.dead()) == []

    def test_raw_bytes_of_any_kind_are_kept(self, storage: Storage) -> None:
        raw = bytes(range(256)) * 4000
        commit = replace(unclaimed(Step.DEAD), blob=encode_letter(letter("m1", raw=raw)))
        assert storage.commit(commit)

        found = storage.dead_get("m1")

        assert found is not None
        assert found.raw == raw

    def test_a_letter_outlives_every_retention(self, storage: Storage, clock: ManualClock) -> None:
        storage.commit(unclaimed(Step.DEAD))
        clock.advance(100 * WEEK)

        assert storage.dead_get("m1")
        assert storage.counters(TOPIC).dead == 1

    # -- the story

    def test_a_story_keeps_its_newest_events(self, storage: Storage, clock: ManualClock) -> None:
        notes = tuple(("retry", b'{"copy":%d}' % number) for number in range(STORY_LENGTH + 50))
        for start in range(0, len(notes), 50):
            storage.commit(replace(unclaimed(Step.RETRY), notes=notes[start : start + 50]))

        copies = [event.copy for event in storage.explain(TOPIC, "order-1")]

        assert copies == list(range(50, STORY_LENGTH + 50))

    def test_a_story_ends_a_retention_after_its_last_event(self, storage: Storage, clock: ManualClock) -> None:
        handle(storage)
        clock.advance(WEEK - 10)
        storage.claim(ask())
        clock.advance(20)

        assert kinds(storage)[-1] == "suppressed"

        clock.advance(WEEK)
        assert kinds(storage) == []

    def test_an_index_without_a_story_has_none(self, storage: Storage) -> None:
        assert kinds(storage) == []
