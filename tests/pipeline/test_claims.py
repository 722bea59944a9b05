"""Who may handle a message, and who no longer may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from watch_tasks import (
    Busy,
    Dead,
    Duplicate,
    Fenced,
    Handled,
    Message,
    Outcome,
    Reason,
    Retry,
    RetryPolicy,
)
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage import Storage
from watch_tasks.testing import ManualClock
from watch_tasks.work import Work

from .driver import LEASE, done, fails, letter_of, raising


class TestClaims:
    def test_what_runs_elsewhere_is_busy_until_its_lease_ends(
        self, pipe: Callable[..., Pipeline], clock: ManualClock
    ) -> None:
        message = Message(1, "t")
        pipe(done, worker="a").begin([message])
        clock.advance(3)
        assert pipe(done, worker="b").handle(message) == Busy(LEASE - 3)

    def test_who_was_overtaken_is_fenced_and_records_nothing(
        self, pipe: Callable[..., Pipeline], storage: Storage, clock: ManualClock
    ) -> None:
        def overtaken(message: Message[Any]) -> None:
            clock.advance(LEASE + 1)
            other.begin([Message(1, "t", index="i", id="m")])

        other = pipe(done, worker="b")
        assert pipe(overtaken, worker="a").handle(Message(1, "t", index="i", id="m")) == Fenced()
        assert storage.len() == 0

    def test_who_was_overtaken_between_two_handlers_starts_no_second(
        self, pipe: Callable[..., Pipeline], clock: ManualClock
    ) -> None:
        calls: list[Any] = []

        def overtaken(message: Message[Any]) -> None:
            clock.advance(LEASE + 1)
            other.begin([Message(1, "t", id="m")])

        other = pipe(done, worker="b")
        assert pipe(overtaken, calls.append, worker="a").handle(Message(1, "t", id="m")) == Fenced()
        assert calls == []

    def test_an_old_copy_is_a_duplicate(self, pipe: Callable[..., Pipeline]) -> None:
        pipeline, message = pipe(fails), Message(1, "t")
        retry = pipeline.handle(message)
        assert isinstance(retry, Retry)
        pipeline.handle(retry.message)
        assert pipeline.handle(message) == Duplicate()

    def test_a_retry_that_was_never_published_is_taken_up_by_a_redelivery(
        self, pipe: Callable[..., Pipeline], clock: ManualClock
    ) -> None:
        policy = RetryPolicy(backoff=30.0, jitter=False)
        pipeline, message = pipe(fails, retry=policy), Message(1, "t")
        pipeline.handle(message)

        assert pipeline.handle(message) == Busy(30.0 + LEASE)
        clock.advance(30.0 + LEASE)
        outcome = pipeline.handle(message)

        assert isinstance(outcome, Retry)
        assert (outcome.message.copy, outcome.message.retries) == (2, 2)

    def test_under_none_nothing_is_claimed_and_every_delivery_runs(
        self, pipe: Callable[..., Pipeline], storage: Storage
    ) -> None:
        tokens: list[int | None] = []
        pipeline = pipe(lambda message: tokens.append(message.token), done, once="none")
        message = Message(1, "t", index="i")
        assert all(isinstance(pipeline.handle(message), Handled) for _ in range(2))
        assert tokens == [None, None]

    def test_a_messages_own_once_rule_wins(self, pipe: Callable[..., Pipeline]) -> None:
        calls: list[Any] = []
        pipeline = pipe(calls.append, once="index")
        for once in (None, None, "message", "none"):
            pipeline.handle(Message(1, "t", index="i", once=once))
        assert len(calls) == 3  # the second is a duplicate


class TestCrashes:
    def crash(self, pipeline: Pipeline, message: Message[Any], clock: ManualClock) -> Work | Outcome:
        """Begin, and be gone."""
        (work,) = pipeline.begin([message])
        clock.advance(LEASE + 1)
        return work

    def test_a_handler_that_takes_its_worker_down_too_often_is_given_up(
        self, pipe: Callable[..., Pipeline], storage: Storage, clock: ManualClock
    ) -> None:
        calls: list[Any] = []
        message = Message({"a": 1}, "t", index="i")
        for number in range(3):
            assert isinstance(self.crash(pipe(done, worker=f"w{number}"), message, clock), Work)

        assert pipe(calls.append, worker="last").handle(message) == Dead(Reason.KILLED_WORKER)

        letter = letter_of(storage)
        assert (letter.crashes, letter.data, calls) == (3, {"a": 1}, [])
        assert letter.error == "DeadLetterError: its handler took the worker down 3 times"

    def test_one_that_comes_through_before_that_is_handled(
        self, pipe: Callable[..., Pipeline], clock: ManualClock
    ) -> None:
        message = Message(1, "t")
        for number in range(2):
            self.crash(pipe(done, worker=f"w{number}"), message, clock)
        assert isinstance(pipe(done, worker="last").handle(message), Handled)

    def test_a_handler_that_ends_its_process_by_a_signal_is_a_crash(
        self, pipe: Callable[..., Pipeline], clock: ManualClock
    ) -> None:
        message = Message(1, "t")
        with pytest.raises(KeyboardInterrupt):
            pipe(raising(KeyboardInterrupt()), worker="a", settings={"interrupts": lambda error: True}).handle(message)
        clock.advance(LEASE + 1)

        outcome = pipe(done, worker="b", settings={"max_crashes": 1}).handle(message)

        assert outcome == Dead(Reason.KILLED_WORKER)

    def test_a_worker_that_stops_and_ends_its_process_gives_the_message_back_at_no_cost(
        self, pipe: Callable[..., Pipeline]
    ) -> None:
        calls: list[str] = []
        message = Message(1, "t")
        ending = pipe(
            lambda message: calls.append("first"),
            raising(KeyboardInterrupt()),
            worker="a",
            settings={"interrupts": lambda error: isinstance(error, KeyboardInterrupt), "stopping": lambda: True},
        )
        with pytest.raises(KeyboardInterrupt):
            ending.handle(message)

        outcome = pipe(done, lambda message: calls.append("second"), worker="b", settings={"max_crashes": 1}).handle(
            message
        )

        assert isinstance(outcome, Handled)
        assert calls == ["first", "second"]
