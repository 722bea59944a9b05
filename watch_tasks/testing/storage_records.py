"""The storage suite: records, names, retention, and the life of a storage."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import islice
from uuid import uuid4

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ..errors import MessageError, StorageClosedError, TopicError
from ..record import Counters
from ..storage.base import Storage
from ..storage.protocol import Granted, Refusal, Step
from ..topics import WEEK
from .clock import ManualClock
from .storage_values import LEASE, TOPIC, ask, grant, handle, kinds, record, refusal, settle, unclaimed

__all__ = ["RecordPromises"]

_NASTY = [
    "a:b", ":", "::", "%", "%3A", "*", "?", "[a]", "{a}", "a/b", "../x", "'", '"', "\\", ";--", "\u00e9", "e\u0301",
    "日本語", "🦊", "ß", "SS", "ss", "a", "A", "x" * 512, "0", "None", "orders", "r:orders:a", "token", "letters",
    "_", "a_", "%s", "%(of)s", ":of", "$1", "\\0", "\\\\", "'; DROP TABLE watch_records; --", "' OR '1'='1",
    "\u212b", "\u00c5",
]  # fmt: skip
_INDEXES = st.one_of(
    st.sampled_from(_NASTY),
    st.text(min_size=1, max_size=40).filter(str.isprintable),
    st.text(alphabet="ab:%*{}", min_size=1, max_size=4),
)
_TOPICS = st.one_of(
    st.sampled_from(["a", "a.b", "a-b", "a_b", "ab"]), st.from_regex(r"[a-z0-9._-]{1,6}", fullmatch=True)
)
_PLACES = st.tuples(_TOPICS.filter(lambda name: name[0].isalnum()), _INDEXES)

#: All examples of a test meet the same storage; and each backend's suite runs the same test.
_ON_ONE_STORAGE = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


class RecordPromises:
    """What was handled can be read, listed, counted and forgotten; and everything else stays apart from it."""

    # -- one record

    def test_there_is_no_record_of_what_was_never_handled(self, storage: Storage) -> None:
        assert storage.get(TOPIC, "order-1") is None
        assert not storage.remove(TOPIC, "order-1")
        assert storage.len() == storage.len(TOPIC) == 0
        assert list(storage.range()) == list(storage.range(TOPIC)) == []
        assert storage.topics() == set()
        assert storage.counters(TOPIC) == Counters()

    def test_a_put_record_is_kept_as_it_is(self, storage: Storage, clock: ManualClock) -> None:
        given = record("order-1", at=clock() - 10.25, data={"total": [1, 2.5, None, "ü"]})
        kept = msgspec.structs.replace(given, expires_at=given.handled_at + timedelta(seconds=WEEK))

        storage.put(given)
        storage.put(given)

        assert storage.get(TOPIC, "order-1") == kept
        assert list(storage.range(TOPIC)) == [kept]
        assert storage.len() == 1

    def test_a_put_record_replaces_the_one_there_is(self, storage: Storage, clock: ManualClock) -> None:
        handle(storage, "m1")
        storage.put(record("order-1", id="m2", at=clock()), retention=None)

        assert storage.get(TOPIC, "order-1") == record("order-1", id="m2", at=clock())
        assert storage.len() == 1
        assert not isinstance(storage.claim(ask("m1")), Granted)

    def test_a_removed_record_is_gone(self, storage: Storage) -> None:
        handle(storage)

        assert storage.remove(TOPIC, "order-1", by="operator")
        assert not storage.remove(TOPIC, "order-1")

        assert storage.get(TOPIC, "order-1") is None
        assert storage.len(TOPIC) == 0
        assert list(storage.range(TOPIC)) == []
        assert [event.by for event in storage.explain(TOPIC, "order-1") if event.event == "removed"] == ["operator"]

    @pytest.mark.parametrize("data", [None, "", {}, [], 0, False, "x" * 1_000_000])
    def test_data_of_any_size_comes_back(self, storage: Storage, clock: ManualClock, data: object) -> None:
        storage.put(record("order-1", at=clock(), data=data))

        found = storage.get(TOPIC, "order-1")

        assert found is not None
        assert found.data == data

    # -- records of another storage

    def test_records_are_restored_with_what_is_left_of_their_time(self, storage: Storage, clock: ManualClock) -> None:
        handled_at = datetime.fromtimestamp(clock(), UTC)
        given = [
            record("for ever", id="m1", at=clock(), data=[1]),
            msgspec.structs.replace(
                record("a day", id="m2", at=clock()), expires_at=handled_at + timedelta(days=1), retries=2, worker="w"
            ),
            msgspec.structs.replace(record("over", id="m3", at=clock() - WEEK), expires_at=handled_at),
        ]

        assert storage.restore(iter(given)) == 2
        assert storage.restore(iter(given)) == 0

        assert {one.index: one for one in storage.range()} == {one.index: one for one in given[:2]}
        assert refusal(storage, ask("m2", index="a day")) is Refusal.DUPLICATE
        clock.advance(86400)
        assert [one.index for one in storage.range()] == ["for ever"]

    def test_a_restored_record_leaves_the_newer_one_alone(self, storage: Storage, clock: ManualClock) -> None:
        storage.put(record("order-1", id="old", at=clock() - 10))
        handle(storage, "new", index="order-2")

        kept = storage.restore([record(f"order-{number}", id="m", at=clock() - 5) for number in (1, 2)])

        assert kept == 1
        assert {one.index: one.id for one in storage.range()} == {"order-1": "m", "order-2": "new"}

    def test_records_are_restored_in_any_order(self, storage: Storage, clock: ManualClock) -> None:
        times = [clock() - 1000 + (number * 337) % 1000 for number in range(450)]

        storage.restore(record(f"order-{at:.0f}", id=f"m{at:.0f}", at=at) for at in times)

        assert [one.handled_at.timestamp() for one in storage.range(newest_first=False)] == sorted(times)
        assert storage.len(TOPIC) == 450

    # -- names

    @_ON_ONE_STORAGE
    @given(places=st.lists(_PLACES, min_size=2, max_size=8, unique=True))
    @example(places=[("a", "b:c"), ("a", "b"), ("a.b", "c"), ("a", "c"), ("ab", "c")])
    @example(places=[("a", index) for index in _NASTY])
    def test_no_two_names_share_a_record(self, storage: Storage, places: list[tuple[str, str]]) -> None:
        for number, (topic, index) in enumerate(places):
            storage.put(record(index, topic=topic, id=f"m{number}"))

        for number, (topic, index) in enumerate(places):
            found = storage.get(topic, index)
            assert found is not None
            assert (found.id, found.index) == (f"m{number}", index)
        assert storage.clear() == len(places)

    @_ON_ONE_STORAGE
    @given(ids=st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=8, unique=True))
    @example(ids=["m:1", "m", "1", "\x00", "\n", " ", "m\x00", *_NASTY])
    def test_no_two_ids_share_a_claim(self, storage: Storage, clock: ManualClock, ids: list[str]) -> None:
        granted = storage.claim_many([ask(id, index="order-1") for id in ids])

        assert all(isinstance(answer, Granted) for answer in granted)
        assert storage.renew("w1", ids, LEASE) == set(ids)
        storage.commit_many([unclaimed(Step.HANDLED, id) for id in ids])
        clock.advance(WEEK)  # so that the next example finds them free

    @_ON_ONE_STORAGE
    @given(places=st.lists(_PLACES, min_size=2, max_size=6, unique=True))
    def test_no_two_names_share_a_story(self, storage: Storage, places: list[tuple[str, str]]) -> None:
        before = {place: len(list(storage.explain(*place))) for place in places}

        for topic, index in places:
            storage.commit(replace(unclaimed(Step.RETRY, "m1", index, topic=topic), notes=(("retry", b"{}"),)))

        assert {place: len(list(storage.explain(*place))) - before[place] for place in places} == dict.fromkeys(
            places, 1
        )

    @_ON_ONE_STORAGE
    @given(topics=st.lists(st.sampled_from(_NASTY) | st.text(max_size=20), min_size=2, max_size=6, unique=True))
    @example(topics=["", "\x00", "\\0", "a\x00", "a", "\n", "%", "*", "null"])
    def test_no_two_names_share_their_dead_letters(self, storage: Storage, topics: list[str]) -> None:
        """A message that cannot be read may name any topic."""
        ids = {topic: str(uuid4()) for topic in topics}
        for topic, id in ids.items():
            storage.commit(unclaimed(Step.DEAD, id, topic, topic=topic))

        assert {topic: [letter.id for letter in storage.dead(topic)] for topic in topics if topic} == {
            topic: [id] for topic, id in ids.items() if topic
        }
        assert {letter.id for letter in storage.dead()} == set(ids.values())
        assert [storage.counters(topic).dead for topic in topics if topic] == [1] * sum(map(bool, topics))
        assert {topic for topic in topics if topic} <= storage.topics()
        assert all(storage.dead_remove(id) for id in ids.values())

    @pytest.mark.parametrize("index", ["", "a\nb", "x" * 513])
    def test_an_index_that_is_none_is_refused(self, storage: Storage, index: str) -> None:
        with pytest.raises(MessageError):
            storage.get(TOPIC, index)

    @pytest.mark.parametrize("topic", ["", "a:b", "A", "_x", "x" * 65])
    def test_a_topic_that_is_none_is_refused(self, storage: Storage, topic: str) -> None:
        with pytest.raises(TopicError):
            storage.get(topic, "order-1")

    # -- all records

    @pytest.mark.parametrize("newest_first", [True, False])
    def test_records_come_by_the_time_they_were_handled(
        self, storage: Storage, clock: ManualClock, newest_first: bool
    ) -> None:
        storage.restore(
            record(f"order-{number}", id=f"m{number}", topic=("a", "b")[number % 2], at=clock() + number)
            for number in range(430)
        )
        clock.advance(430)
        for number in range(430, 450):
            handle(storage, f"m{number}", index=f"order-{number}", topic=("a", "b")[number % 2])
            clock.advance(1)
        expected = list(range(450))[:: -1 if newest_first else 1]

        everything = [found.id for found in storage.range(newest_first=newest_first)]
        one = [found.id for found in storage.range("a", newest_first=newest_first)]

        assert everything == [f"m{number}" for number in expected]
        assert one == [f"m{number}" for number in expected if number % 2 == 0]

    @pytest.mark.parametrize("newest_first", [True, False])
    def test_records_of_the_same_moment_all_come(
        self, storage: Storage, clock: ManualClock, newest_first: bool
    ) -> None:
        storage.restore(record(f"order-{number}", id=f"m{number}", at=clock()) for number in range(450))

        found = [one.id for one in storage.range(TOPIC, newest_first=newest_first)]

        assert len(found) == len(set(found)) == 450

    @pytest.mark.parametrize("newest_first", [True, False])
    @pytest.mark.parametrize("topic", [None, TOPIC])
    def test_records_since(self, storage: Storage, clock: ManualClock, newest_first: bool, topic: str | None) -> None:
        storage.restore(record(f"order-{number}", id=f"m{number}", at=clock() + number) for number in range(450))
        since = datetime.fromtimestamp(clock() + 440, UTC)

        found = [one.id for one in storage.range(topic, since=since, newest_first=newest_first)]

        expected = [f"m{number}" for number in range(440, 450)]
        assert found == (expected[::-1] if newest_first else expected)

    @pytest.mark.parametrize("newest_first", [True, False])
    def test_no_record_comes_twice_though_it_is_handled_again_meanwhile(
        self, storage: Storage, clock: ManualClock, newest_first: bool
    ) -> None:
        late = [ask(f"late{number}", index=f"order-{number}") for number in range(100)]
        granted = [one for one in storage.claim_many(late) if isinstance(one, Granted)]
        storage.restore(record(f"order-{number}", id=f"m{number}", at=clock()) for number in range(450))
        clock.advance(1)

        found = []
        for place, one in enumerate(storage.range(TOPIC, newest_first=newest_first)):
            found.append(one.index)
            if place == 10:
                clock.advance(1)
                storage.commit_many([settle(Step.HANDLED, *pair) for pair in zip(late, granted, strict=True)])
                again = [ask(f"again{number}", index=f"order-{number}") for number in range(100, 400)]
                granted = [one for one in storage.claim_many(again) if isinstance(one, Granted)]
                storage.commit_many([settle(Step.HANDLED, *pair) for pair in zip(again, granted, strict=True)])
            if place == 20:
                storage.remove(TOPIC, found[-1])

        assert len(found) == len(set(found))
        assert {f"order-{number}" for number in range(400, 450)} <= set(found)

    def test_records_are_read_as_they_are_asked_for(self, storage: Storage, clock: ManualClock) -> None:
        storage.restore(record(f"order-{number}", at=clock() + number) for number in range(450))

        first = list(islice(storage.range(TOPIC), 3))

        assert [one.index for one in first] == ["order-449", "order-448", "order-447"]

    def test_clear_removes_records_only(self, storage: Storage) -> None:
        for number in range(250):
            storage.put(record(f"order-{number}", id=f"m{number}"))
        handle(storage, "a1", index="1", topic="alarms")
        storage.commit(unclaimed(Step.DEAD, "dead"))

        assert storage.clear(TOPIC) == 250
        assert storage.clear(TOPIC) == 0

        assert (storage.len(TOPIC), storage.len("alarms"), storage.len()) == (0, 1, 1)
        assert storage.dead_get("dead")
        assert storage.clear() == 1
        assert storage.counters("alarms").handled == 1

    def test_topics_with_anything_to_tell_are_known(self, storage: Storage) -> None:
        handle(storage, "m1", topic="handled")
        storage.put(record("order-1", topic="put"))
        storage.commit(unclaimed(Step.DEAD, "m2", topic="dead"))
        storage.commit(unclaimed(Step.RETRY, "m3", topic="retried"))

        assert storage.topics() == {"handled", "put", "dead", "retried"}

    # -- retention

    def test_a_record_ends_with_its_retention(self, storage: Storage, clock: ManualClock) -> None:
        handle(storage, "m1", index="long", retention=2 * WEEK)
        handle(storage, "m2", index="short", retention=WEEK)
        clock.advance(WEEK)

        assert storage.get(TOPIC, "short") is None
        assert not storage.remove(TOPIC, "short")
        assert storage.len(TOPIC) == 1
        assert [found.index for found in storage.range(TOPIC)] == ["long"]
        assert grant(storage, ask("m2", index="short"))

    def test_a_record_is_there_until_then(self, storage: Storage, clock: ManualClock) -> None:
        handle(storage)
        clock.advance(WEEK - 1)

        assert storage.get(TOPIC, "order-1")
        assert storage.len() == 1

    def test_a_mark_ends_with_its_retention(self, storage: Storage, clock: ManualClock) -> None:
        handle(storage, "m1")
        clock.advance(WEEK / 2)
        handle(storage, "m2")
        clock.advance(WEEK / 2)

        answers = storage.claim_many([ask("m1"), ask("m2")])

        assert [isinstance(answer, Granted) for answer in answers] == [True, False]

    def test_without_a_retention_records_are_kept_for_ever(self, storage: Storage, clock: ManualClock) -> None:
        handle(storage, retention=None)
        storage.put(record("order-2"), retention=None)
        clock.advance(1000 * WEEK)

        assert storage.get(TOPIC, "order-1")
        assert storage.get(TOPIC, "order-2")
        assert storage.len(TOPIC) == 2
        assert kinds(storage)

    def test_the_retention_of_a_put_record_counts_from_when_it_was_handled(
        self, storage: Storage, clock: ManualClock
    ) -> None:
        storage.put(record("gone", at=clock() - WEEK))
        storage.put(record("there", at=clock() - WEEK + 10))

        assert storage.get(TOPIC, "gone") is None
        assert storage.get(TOPIC, "there")
        assert storage.len(TOPIC) == 1

    def test_a_replaced_record_lives_by_the_new_retention(self, storage: Storage, clock: ManualClock) -> None:
        storage.put(record("order-1", at=clock()), retention=None)
        storage.put(record("order-1", at=clock()), retention=WEEK)
        storage.put(record("order-2", at=clock()), retention=WEEK)
        storage.put(record("order-2", at=clock()), retention=None)
        clock.advance(WEEK)

        assert storage.get(TOPIC, "order-1") is None
        assert storage.get(TOPIC, "order-2")
        assert storage.len(TOPIC) == 1

    def test_expired_records_are_counted_no_more_however_many(self, storage: Storage, clock: ManualClock) -> None:
        for number in range(300):
            storage.put(record(f"order-{number}", at=clock()))
        clock.advance(WEEK)
        handle(storage, "new", index="new")

        assert storage.len(TOPIC) == 1
        assert [found.index for found in storage.range(TOPIC)] == ["new"]

    # -- life

    def test_after_close_every_verb_says_so(self, storage: Storage) -> None:
        claim = ask()
        granted = grant(storage, claim)
        storage.close()
        storage.close()

        verbs: list[Callable[[], object]] = [
            lambda: storage.claim(claim),
            lambda: storage.commit(settle(Step.HANDLED, claim, granted)),
            lambda: storage.renew("w1", ["m1"], LEASE),
            lambda: storage.release("w1", ["m1"]),
            lambda: storage.get(TOPIC, "order-1"),
            lambda: storage.put(record("order-1")),
            lambda: storage.remove(TOPIC, "order-1"),
            lambda: storage.len(),
            lambda: storage.len(TOPIC),
            lambda: list(storage.range(TOPIC)),
            lambda: storage.clear(),
            lambda: list(storage.dead()),
            lambda: storage.dead_get("m1"),
            lambda: storage.dead_remove("m1"),
            lambda: list(storage.explain(TOPIC, "order-1")),
            lambda: storage.counters(TOPIC),
            lambda: storage.topics(),
        ]
        for verb in verbs:
            with pytest.raises(StorageClosedError):
                verb()

    def test_a_storage_closes_with_its_block(self, storage: Storage) -> None:
        with storage as same:
            assert same is storage

        with pytest.raises(StorageClosedError):
            storage.get(TOPIC, "order-1")

    def test_everything_is_there_after_a_restart(
        self, storage: Storage, restarted: Callable[[], Storage], clock: ManualClock
    ) -> None:
        done = handle(storage, "done", index="done")
        waiting = ask("waiting", index="waiting")
        storage.commit(settle(Step.RETRY, waiting, grant(storage, waiting), blob=b"progress"))
        storage.commit(unclaimed(Step.DEAD, "dead"))
        storage.close()

        with restarted() as again:
            assert again.get(TOPIC, "done")
            assert again.dead_get("dead")
            assert again.counters(TOPIC) == Counters(handled=1, retries=1, dead=1)
            assert list(again.explain(TOPIC, "done"))
            granted = grant(again, ask("waiting", index="waiting", copy=1))
            assert granted.progress == b"progress"
            assert granted.token > done.token

    def test_what_should_be_known_is_told(self, storage: Storage) -> None:
        for check, ok, detail, fix in storage.check():
            assert check
            assert detail
            assert ok or fix
