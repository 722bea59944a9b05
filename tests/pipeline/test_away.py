"""A storage that does not answer: nothing is handled twice for it, and nothing is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from watch_tasks import (
    Busy,
    Dead,
    Discard,
    Handled,
    Message,
    Outcome,
    Reason,
    Retry,
    RetryPolicy,
    Snooze,
    Snoozed,
)
from watch_tasks.errors import StorageError, StorageUnavailableError
from watch_tasks.pipeline import Pipeline
from watch_tasks.testing import ManualClock

from .driver import LEASE, Function, done, fails, letter_of, raising
from .trouble import TroubledStorage


class Pauses(list[float]):
    """Waits for nothing; at the third pause the storage is back."""

    def __init__(self, storage: TroubledStorage) -> None:
        self._storage = storage

    def __call__(self, seconds: float) -> None:
        self.append(seconds)
        if len(self) == 3:
            self._storage.away.clear()


class TestAway:
    """A storage that does not answer is asked again until it does, and no handler runs twice for it."""

    @pytest.mark.parametrize("asked", ["claim", "mark", "handled"])
    def test_at_any_step_the_message_is_handled_in_the_end(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        noting: Callable[[str], Function],
        asked: str,
    ) -> None:
        storage.away, pauses = {asked}, Pauses(storage)
        pipeline = pipe(noting("a"), noting("b"), settings={"pause": pauses})

        outcome = pipeline.handle(Message(1, "t", max_retries=0))

        assert isinstance(outcome, Handled)
        assert [entry for entry in storage.log if entry.endswith("runs")] == ["a runs", "b runs"]
        assert storage.log.count(asked) == 4  # thrice in vain

    @pytest.mark.parametrize(
        ("handler", "asked", "kind"),
        [
            (fails, "retry", Retry),
            (raising(Snooze(1)), "snoozed", Snoozed),
            (raising(Discard("no")), "dead", Dead),
        ],
    )
    def test_so_is_any_other_end(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        handler: Function,
        asked: str,
        kind: type[Outcome],
    ) -> None:
        storage.away, pauses = {asked}, Pauses(storage)
        assert isinstance(pipe(handler, settings={"pause": pauses}).handle(Message(1, "t")), kind)
        assert storage.counters("t").retries == (kind is Retry)

    def test_what_was_never_work_is_buried_when_it_is_back(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        storage.away, pauses = {"dead"}, Pauses(storage)
        outcome = pipe(done, settings={"pause": pauses}).bury(Reason.EXPIRED, "late", id="m")
        assert outcome == Dead(Reason.EXPIRED)
        assert letter_of(storage).id == "m"

    def test_the_pauses_grow_and_are_told(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 8:
                storage.away.clear()

        storage.away = {"claim"}
        pipe(done, settings={"pause": pause}).handle(Message(1, "t"))
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
        assert caplog.text.count("the storage is away, trying again") == 8

    def test_the_timeout_counts_from_the_answer_to_the_claim(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        now, deadlines = ManualClock(1000.0), list[datetime | None]()

        def pause(seconds: float) -> None:
            now.advance(500)
            storage.away.clear()

        storage.away = {"claim"}
        monkeypatch.setattr(time, "monotonic", now)
        pipeline = pipe(lambda message: deadlines.append(message.deadline), timeout=60.0, settings={"pause": pause})
        pipeline.handle(Message(1, "t"))

        assert deadlines == [datetime.fromtimestamp(clock.now + 60.0, UTC)]


class TestStoppedWhileAway:
    """Asked to stop, a worker cannot wait for the storage: it leaves copies behind that carry what is known."""

    def after(
        self, pipe: Callable[..., Pipeline], clock: ManualClock, outcome: Outcome, *handlers: Function
    ) -> Outcome:
        """Another worker gets the carrier, when the lease of the one that stopped has ended."""
        assert isinstance(outcome, Retry | Snoozed)
        other = pipe(*handlers, worker="other")
        assert isinstance(other.handle(outcome.message), Busy)
        clock.advance(LEASE + 1)
        return other.handle(outcome.message)

    def test_before_the_claim_nothing_is_handled_and_the_same_copy_goes_back(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, noting: Callable[[str], Function]
    ) -> None:
        storage.away = {"claim"}
        pipeline = pipe(noting("a"), settings={"stopping": lambda: True})
        assert pipeline.handle(Message(1, "t")) == Busy(0.0)
        assert storage.log == ["claim"]

    def test_between_two_handlers_the_carrier_names_the_first(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        clock: ManualClock,
        noting: Callable[[str], Function],
    ) -> None:
        handlers = noting("a"), noting("b")
        storage.away = {"mark", "released"}

        outcome = pipe(*handlers, settings={"stopping": lambda: True}).handle(Message(1, "t"))

        assert isinstance(outcome, Snoozed)
        assert (outcome.delay, outcome.message.copy, outcome.message.handled) == (0.0, 1, ("h0",))
        storage.away = set()
        assert isinstance(self.after(pipe, clock, outcome, *handlers), Handled)
        assert [entry for entry in storage.log if entry.endswith("runs")] == ["a runs", "b runs"]

    def test_if_it_is_back_in_time_the_same_copy_goes_back_with_its_mark_stored(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, noting: Callable[[str], Function]
    ) -> None:
        handlers, message = (noting("a"), noting("b")), Message(1, "t")
        storage.away = {"mark"}

        assert pipe(*handlers, settings={"stopping": lambda: True}).handle(message) == Busy(0.0)

        storage.away = set()
        assert isinstance(pipe(*handlers, worker="other").handle(message), Handled)
        assert [entry for entry in storage.log if entry.endswith("runs")] == ["a runs", "b runs"]

    def test_after_the_last_handler_the_carrier_names_all(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        clock: ManualClock,
        noting: Callable[[str], Function],
    ) -> None:
        handlers = noting("a"), noting("b")
        storage.away = {"handled"}

        outcome = pipe(*handlers, settings={"stopping": lambda: True}).handle(Message(1, "t", index="i"))

        assert isinstance(outcome, Snoozed)
        assert outcome.message.handled == ("h0", "h1")
        storage.away = set()
        assert isinstance(self.after(pipe, clock, outcome, *handlers), Handled)
        assert [entry for entry in storage.log if entry.endswith("runs")] == ["a runs", "b runs"]
        assert storage.get("t", "i")

    def test_a_retry_carries_its_count(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, clock: ManualClock
    ) -> None:
        storage.away = {"retry"}
        policy = RetryPolicy(2, backoff=7.0, jitter=False)

        outcome = pipe(done, fails, retry=policy, settings={"stopping": lambda: True}).handle(Message(1, "t"))

        assert isinstance(outcome, Retry)
        assert (outcome.delay, outcome.message.retries, outcome.message.handled) == (7.0, 1, ("h0",))
        storage.away = set()
        again = self.after(pipe, clock, outcome, done, fails)
        assert isinstance(again, Retry)
        assert again.message.retries == 2

    def test_the_dead_is_tried_once_more_and_dies_then(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, clock: ManualClock
    ) -> None:
        storage.away = {"dead"}
        message = Message(1, "t", max_retries=0)

        outcome = pipe(done, fails, settings={"stopping": lambda: True}).handle(message)

        assert isinstance(outcome, Snoozed)
        assert (outcome.message.retries, outcome.message.handled) == (0, ("h0",))
        storage.away = set()
        assert self.after(pipe, clock, outcome, done, fails) == Dead(Reason.EXHAUSTED)

    def test_what_was_never_work_goes_back_as_it_came(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        storage.away = {"dead"}
        pipeline = pipe(done, settings={"stopping": lambda: True})
        assert pipeline.bury(Reason.MALFORMED, "no message", id="m", raw=b"?") == Busy(0.0)

    @pytest.mark.parametrize("error", [StorageUnavailableError("away"), StorageError("no room"), ValueError("a bug")])
    def test_an_interrupted_handler_ends_all_the_same(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
    ) -> None:
        caplog.set_level(logging.WARNING, "watch_tasks")

        def fail(commit: object) -> None:
            raise error

        monkeypatch.setattr(storage, "commit", fail)
        pipeline = pipe(raising(SystemExit()), settings={"interrupts": lambda error: True, "stopping": lambda: True})
        with pytest.raises(SystemExit):
            pipeline.handle(Message(1, "t", id="m"))
        assert "could not give message m back" in caplog.text


class TestLostAnswers:
    """The storage did it, but its answer was lost: asked again it must not count twice."""

    def test_a_claim_is_granted_again_and_counts_no_crash(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, noting: Callable[[str], Function]
    ) -> None:
        storage.loses = {"claim"}
        pipeline = pipe(noting("a"), settings={"pause": lambda seconds: None, "max_crashes": 1})
        assert isinstance(pipeline.handle(Message(1, "t")), Handled)
        assert storage.log == ["claim", "claim", "a runs", "handled"]

    def test_not_even_if_its_lease_ended_meanwhile(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, clock: ManualClock
    ) -> None:
        storage.loses = {"claim"}
        settings = {"pause": lambda seconds: clock.advance(LEASE + 1), "max_crashes": 1}
        assert isinstance(pipe(done, settings=settings).handle(Message(1, "t")), Handled)

    def test_many_claims_are_granted_again_each(self, pipe: Callable[..., Pipeline], storage: TroubledStorage) -> None:
        storage.loses = {"claim"}
        pipeline = pipe(done, settings={"pause": lambda seconds: None, "max_crashes": 1})
        outcomes = pipeline.handle_many([Message(number, "t") for number in range(3)])
        assert [type(outcome) for outcome in outcomes] == [Handled] * 3

    @pytest.mark.parametrize(
        ("handlers", "asked", "kind"),
        [
            ((done,), "handled", Handled),
            ((done, done), "mark", Handled),
            ((fails,), "retry", Retry),
            ((raising(Snooze(1)),), "snoozed", Snoozed),
            ((raising(Discard("no")),), "dead", Dead),
        ],
    )
    def test_a_commit_is_accepted_again_and_counts_once(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        handlers: tuple[Function, ...],
        asked: str,
        kind: type[Outcome],
    ) -> None:
        storage.loses = {asked}

        outcome = pipe(*handlers, settings={"pause": lambda seconds: None}).handle(Message(1, "t"))

        assert isinstance(outcome, kind)
        assert storage.log.count(asked) == 2
        counters = storage.counters("t")
        assert (counters.handled, counters.retries, counters.dead) == (kind is Handled, kind is Retry, kind is Dead)
