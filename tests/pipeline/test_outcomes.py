"""What becomes of a message by its handlers."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec.structs import replace

from watch_tasks import (
    Duplicate,
    Handled,
    Message,
    Retry,
    RetryPolicy,
    Snooze,
    Snoozed,
)
from watch_tasks.errors import HandlerExitError
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage import Storage
from watch_tasks.testing import ManualClock
from watch_tasks.topics import DAY

from .driver import Function, done, fails, raising, to_the_end


@dataclass(frozen=True)
class Alarm:
    host: str
    level: int = 1


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is freed but what nothing refers to."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("max_retries", [0, 1])
def test_what_a_failed_handler_held_is_let_go_of(pipe: Callable[..., Pipeline], max_retries: int) -> None:
    held: list[weakref.ref[Any]] = []

    def fails_with_much(message: Message[Any]) -> None:
        much = Alarm("web-1")
        held.append(weakref.ref(much))
        raise ValueError("no luck")

    pipe(fails_with_much, retry=RetryPolicy(max_retries=max_retries)).handle(Message(1, "t"))

    assert [much() for much in held] == [None]


class TestHandled:
    def test_it_is_recorded_with_what_people_ask_for(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        message = Message({"b": 1, "a": 2}, "t", index="i", max_retries=7)

        assert isinstance(pipe(done).handle(message), Handled)

        record = storage.get("t", "i")
        assert record
        assert (record.id, record.retries, record.max_retries) == (message.id, 0, 7)
        assert (record.worker, record.data, record.sent_at) == ("w", {"b": 1, "a": 2}, message.sent_at)

    def test_redelivered_it_is_a_duplicate_and_not_run(self, pipe: Callable[..., Pipeline]) -> None:
        calls: list[Any] = []
        pipeline, message = pipe(calls.append), Message(1, "t")
        pipeline.handle(message)
        assert pipeline.handle(message) == Duplicate()
        assert len(calls) == 1

    def test_without_keep_data_only_the_digest_is_kept(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        pipe(done, keep_data=False).handle(Message({"secret": 1}, "t", index="i"))
        record = storage.get("t", "i")
        assert record
        assert (record.data, len(record.digest)) == (None, 32)

    def test_the_digest_does_not_depend_on_the_order_of_keys(
        self, pipe: Callable[..., Pipeline], storage: Storage
    ) -> None:
        pipeline = pipe(done)
        for index, data in [("x", {"a": 1, "b": 2}), ("y", {"b": 2, "a": 1}), ("z", {"a": 2, "b": 1})]:
            pipeline.handle(Message(data, "t", index=index))
        x, y, z = (record.digest for record in storage.range("t", newest_first=False))
        assert x == y != z

    @pytest.mark.parametrize("retention", [2 * DAY, None])
    def test_the_record_is_kept_as_long_as_the_topic_says(
        self, pipe: Callable[..., Pipeline], storage: Storage, clock: ManualClock, retention: float | None
    ) -> None:
        pipe(done, retention=retention).handle(Message(1, "t", index="i"))
        clock.advance(2 * DAY - 1)
        assert storage.get("t", "i")
        clock.advance(2)
        assert (storage.get("t", "i") is None) == (retention is not None)

    def test_data_reaches_the_handler_in_the_shape_of_the_schema(self, pipe: Callable[..., Pipeline]) -> None:
        seen: list[Any] = []
        pipeline = pipe(lambda message: seen.append(message.data), schema=Alarm)
        pipeline.handle(Message({"host": "a"}, "t"))
        pipeline.handle(Message(Alarm("b"), "t"))
        assert seen == [Alarm("a"), Alarm("b")]

    def test_a_bare_message_is_named_by_what_its_data_say(
        self, pipe: Callable[..., Pipeline], storage: Storage
    ) -> None:
        """One from a producer that knows nothing of indexes."""
        pipeline = pipe(done, schema=Alarm, index=lambda alarm: alarm.host)
        pipeline.handle(Message({"host": "web-1"}, "t"))
        pipeline.handle(Message({"host": "web-1"}, "t", index="named"))
        assert {record.index for record in storage.range("t")} == {"web-1", "named"}


class TestRetry:
    def test_the_next_copy_is_published_after_the_backoff(self, pipe: Callable[..., Pipeline]) -> None:
        policy = RetryPolicy(backoff=4.0, jitter=False)
        message = Message(1, "t", index="i")

        outcome = pipe(fails, retry=policy).handle(message)

        assert outcome == Retry(4.0, replace(message, retries=1, copy=1), ValueError())

    def test_it_resumes_at_the_handler_that_failed(self, pipe: Callable[..., Pipeline]) -> None:
        calls: list[str] = []

        def second(message: Message[Any]) -> None:
            calls.append("second")
            if message.retries < 2:
                raise ValueError

        pipeline = pipe(lambda message: calls.append("first"), second, lambda message: calls.append("third"))

        assert isinstance(to_the_end(pipeline, Message(1, "t"))[-1], Handled)
        assert calls == ["first", "second", "second", "second", "third"]

    def test_a_retry_that_forgot_what_was_handled_is_told_by_the_storage(self, pipe: Callable[..., Pipeline]) -> None:
        calls: list[str] = []
        pipeline = pipe(lambda message: calls.append("first"), fails)
        retry = pipeline.handle(Message(1, "t"))
        assert isinstance(retry, Retry)

        pipeline.handle(replace(retry.message, handled=(), retries=0))

        assert calls == ["first"]

    def test_a_messages_own_limit_does_not_leak_to_the_next(self, pipe: Callable[..., Pipeline]) -> None:
        calls: Counter[str] = Counter()

        def counts_and_fails(message: Message[str]) -> None:
            calls[message.data] += 1
            raise ValueError

        pipeline = pipe(counts_and_fails, retry=RetryPolicy(2))
        for data, limit in [("own", 5), ("next", None), ("none", 0)]:
            to_the_end(pipeline, Message(data, "t", max_retries=limit))

        assert calls == {"own": 6, "next": 3, "none": 1}

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("odd")])
    def test_a_handler_that_would_end_its_worker_has_failed(
        self, pipe: Callable[..., Pipeline], error: BaseException
    ) -> None:
        outcome = pipe(raising(error)).handle(Message(1, "t"))
        assert isinstance(outcome, Retry)
        assert isinstance(outcome.error, HandlerExitError)


class TestSnooze:
    def test_it_travels_on_at_no_cost(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        message = Message(1, "t", index="i", max_retries=0)
        outcome = pipe(raising(Snooze(30))).handle(message)
        assert outcome == Snoozed(30.0, replace(message, copy=1))
        assert storage.counters("t").retries == 0

    def test_the_same_handler_runs_again_then(self, pipe: Callable[..., Pipeline]) -> None:
        calls: list[str] = []

        def snoozes_once(message: Message[Any]) -> None:
            calls.append("second")
            if calls.count("second") == 1:
                raise Snooze(0)

        to_the_end(pipe(lambda message: calls.append("first"), snoozes_once), Message(1, "t"))
        assert calls == ["first", "second", "second"]


class TestWhatHandlersGet:
    def test_the_token_grows_with_each_takeover_and_the_key_stays(self, pipe: Callable[..., Pipeline]) -> None:
        seen: list[Message[Any]] = []

        def notes_and_fails(message: Message[Any]) -> None:
            seen.append(message)
            raise ValueError

        to_the_end(pipe(seen.append, notes_and_fails), Message(1, "t", id="m", max_retries=2))

        assert [message.idempotency_key for message in seen] == ["m:h0", "m:h1", "m:h1", "m:h1"]
        tokens = [message.token for message in seen if message.token is not None]
        assert tokens[0] == tokens[1] < tokens[2] < tokens[3]

    def test_they_see_retries_and_who_is_done(self, pipe: Callable[..., Pipeline]) -> None:
        seen: list[tuple[int, tuple[str, ...]]] = []

        def notes_and_fails(message: Message[Any]) -> None:
            seen.append((message.retries, message.handled))
            raise ValueError

        to_the_end(pipe(done, notes_and_fails), Message(1, "t", max_retries=1))
        assert seen == [(0, ("h0",)), (1, ("h0",))]

    def test_the_deadline_is_one_for_all_handlers_by_the_storages_clock(
        self, pipe: Callable[..., Pipeline], clock: ManualClock
    ) -> None:
        seen: list[datetime | None] = []
        notes: Function = lambda message: seen.append(message.deadline)  # noqa: E731
        pipe(notes, notes, timeout=100.0).handle(Message(1, "t"))
        first, second = seen
        assert first == second
        assert first
        assert first.timestamp() == pytest.approx(clock.now + 100.0, abs=5)
        assert first.tzinfo is UTC

    def test_without_a_timeout_there_is_no_deadline(self, pipe: Callable[..., Pipeline]) -> None:
        seen: list[Message[Any]] = []
        pipe(seen.append).handle(Message(1, "t"))
        assert seen[0].deadline is None

    def test_nothing_of_the_attempt_travels_on(self, pipe: Callable[..., Pipeline]) -> None:
        outcome = pipe(fails, timeout=100.0).handle(Message(1, "t"))
        assert isinstance(outcome, Retry)
        assert (outcome.message.token, outcome.message.deadline, outcome.message.idempotency_key) == (None, None, "")
