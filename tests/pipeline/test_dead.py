"""Every reason for which a message is dead."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from watch_tasks import (
    Busy,
    Dead,
    Discard,
    Duplicate,
    Message,
    Reason,
    RetryPolicy,
)
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage import Storage
from watch_tasks.testing import ManualClock

from .driver import done, fails, letter_of, raising, to_the_end


@dataclass(frozen=True)
class Alarm:
    host: str
    level: int = 1


class TestDead:
    @pytest.mark.parametrize(
        ("error", "policy", "reason"),
        [
            (ValueError("no"), RetryPolicy(0), Reason.EXHAUSTED),
            (ValueError("no"), RetryPolicy(give_up_for=(ValueError,)), Reason.FATAL),
            (ValueError("no"), RetryPolicy(retry_for=(OSError,)), Reason.FATAL),
            (Discard("no"), RetryPolicy(), Reason.DISCARDED),
        ],
    )
    def test_a_handler_decides(
        self,
        pipe: Callable[..., Pipeline],
        storage: Storage,
        error: Exception,
        policy: RetryPolicy,
        reason: Reason,
    ) -> None:
        message = Message({"a": 1}, "t", index="i")

        assert pipe(done, raising(error), retry=policy).handle(message) == Dead(reason)

        letter = letter_of(storage)
        assert (letter.id, letter.index, letter.reason) == (message.id, "i", reason)
        assert (letter.error, letter.handler) == (f"{type(error).__name__}: no", "h1")
        assert (letter.data, letter.handled) == ({"a": 1}, ("h0",))

    def test_every_failed_try_is_kept(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        to_the_end(pipe(fails), Message(1, "t", max_retries=2))
        letter = letter_of(storage)
        assert (letter.retries, letter.max_retries) == (2, 2)
        assert [(attempt.handler, attempt.error) for attempt in letter.attempts] == [("h0", "ValueError: no luck")] * 3

    def test_of_very_many_the_newest_hundred(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        def counts(message: Message[Any]) -> None:
            raise ValueError(message.retries)

        to_the_end(pipe(counts), Message(1, "t", max_retries=104))
        attempts = letter_of(storage).attempts
        assert (len(attempts), attempts[0].error, attempts[-1].error) == (100, "ValueError: 5", "ValueError: 104")

    @pytest.mark.parametrize("data", [{"hots": "a"}, {"host": 5}, "text", None])
    def test_data_that_does_not_fit_is_undecodable(
        self, pipe: Callable[..., Pipeline], storage: Storage, data: Any
    ) -> None:
        assert pipe(done, schema=Alarm).handle(Message(data, "t")) == Dead(Reason.UNDECODABLE)
        letter = letter_of(storage)
        assert letter.data == data
        assert letter.error.startswith("SchemaError: topic `t`: ")

    def test_data_without_a_json_form_is_kept_as_it_looks(
        self, pipe: Callable[..., Pipeline], storage: Storage
    ) -> None:
        assert pipe(done).handle(Message({1, 2j}, "t")) == Dead(Reason.UNDECODABLE)
        letter = letter_of(storage)
        assert (letter.data, letter.raw) == (None, repr({1, 2j}).encode())

    def test_not_even_data_that_cannot_be_shown_are_lost_track_of(
        self, pipe: Callable[..., Pipeline], storage: Storage
    ) -> None:
        data: list[Any] = []
        for _ in range(100_000):
            data = [data]
        assert pipe(done).handle(Message(data, "t")) == Dead(Reason.UNDECODABLE)
        assert letter_of(storage).raw == b"<its text raised RecursionError>"

    def test_data_that_name_no_index_are_malformed(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        assert pipe(done, index=lambda data: data["key"]).handle(Message({}, "t")) == Dead(Reason.MALFORMED)
        assert "finding the index failed: KeyError" in letter_of(storage).error

    def test_other_data_under_a_handled_index_are_a_conflict(
        self, pipe: Callable[..., Pipeline], storage: Storage
    ) -> None:
        pipeline = pipe(done, once="index")
        pipeline.handle(Message({"a": 1}, "t", index="order-17"))

        assert pipeline.handle(Message({"a": 1}, "t", index="order-17")) == Duplicate()
        assert pipeline.handle(Message({"a": 2}, "t", index="order-17")) == Dead(Reason.INDEX_CONFLICT)

        assert "index `order-17` of topic `t` was handled with other data" in letter_of(storage).error

    @pytest.mark.parametrize("reason", Reason)
    def test_a_driver_buries_what_never_was_work(
        self, pipe: Callable[..., Pipeline], storage: Storage, reason: Reason
    ) -> None:
        """Too large, expired, revoked, undecodable: what only those who speak with the broker can tell."""
        pipeline = pipe(done)
        for _ in range(2):
            assert pipeline.bury(reason, "why", id="m", topic="t", raw=b"\xff\x00", crashes=2) == Dead(reason)
        letter = letter_of(storage)
        assert (letter.reason, letter.error, letter.raw, letter.crashes) == (reason, "why", b"\xff\x00", 2)

    def test_a_dead_message_redelivered_is_a_duplicate(self, pipe: Callable[..., Pipeline]) -> None:
        pipeline, message = pipe(raising(Discard("no"))), Message(1, "t")
        pipeline.handle(message)
        assert pipeline.handle(message) == Duplicate()


class TestUnknownTopics:
    @pytest.fixture
    def now(self, monkeypatch: pytest.MonkeyPatch) -> ManualClock:
        now = ManualClock(1000.0)
        monkeypatch.setattr(time, "monotonic", now)
        return now

    def test_one_is_put_back_for_the_grace_and_then_dead(
        self, pipe: Callable[..., Pipeline], storage: Storage, now: ManualClock
    ) -> None:
        pipeline, message = pipe(done, settings={"unknown_grace": 60.0}), Message({"a": 1}, "other", index="i")
        for _ in range(6):
            outcome = pipeline.handle(message)
            assert isinstance(outcome, Busy)
            assert 0 < outcome.until <= 5
            now.advance(10)

        assert pipeline.handle(message) == Dead(Reason.UNKNOWN_TOPIC)

        letter = letter_of(storage)
        assert (letter.topic, letter.index, letter.data) == ("other", "i", {"a": 1})
        assert "no worker knows topic `other`: load the module that defines it" in letter.error

    def test_each_message_has_its_own_grace(self, pipe: Callable[..., Pipeline], now: ManualClock) -> None:
        pipeline = pipe(done, settings={"unknown_grace": 60.0})
        pipeline.handle(Message(1, "other"))
        now.advance(61)
        assert isinstance(pipeline.handle(Message(2, "other")), Busy)

    def test_it_does_not_come_back_after_its_grace_only(self, pipe: Callable[..., Pipeline], now: ManualClock) -> None:
        pipeline, message = pipe(done, settings={"unknown_grace": 1.0}), Message(1, "other")
        outcome = pipeline.handle(message)
        assert isinstance(outcome, Busy)
        assert outcome.until <= 1.0

    def test_a_topic_without_handlers_is_as_good_as_unknown(
        self, pipe: Callable[..., Pipeline], storage: Storage
    ) -> None:
        """Handled by nobody and recorded as handled, it would be lost."""
        assert pipe(settings={"unknown_grace": 0.0}).handle(Message(1, "t")) == Dead(Reason.UNKNOWN_TOPIC)
        assert storage.len() == 0
