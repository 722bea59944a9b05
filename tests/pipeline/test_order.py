"""What the pipeline asks of its storage, in which order, and for many messages at once."""

from __future__ import annotations

from collections.abc import Callable

from watch_tasks import (
    Busy,
    Dead,
    Discard,
    Duplicate,
    Handled,
    Message,
    Retry,
    Snooze,
    Snoozed,
)
from watch_tasks.pipeline import Pipeline
from watch_tasks.testing import ManualClock

from .driver import LEASE, Function, done, fails
from .trouble import TroubledStorage


class TestOrder:
    def test_each_mark_is_stored_before_the_next_handler_starts(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, noting: Callable[[str], Function]
    ) -> None:
        pipe(noting("a"), noting("b"), noting("c")).handle(Message(1, "t"))
        assert storage.log == ["claim", "a runs", "mark", "b runs", "mark", "c runs", "handled"]

    def test_a_crash_between_two_handlers_repeats_neither(
        self,
        pipe: Callable[..., Pipeline],
        storage: TroubledStorage,
        clock: ManualClock,
        noting: Callable[[str], Function],
    ) -> None:
        """The process ends as the second handler starts; somebody else takes over."""
        message = Message(1, "t")
        crashing = pipe(noting("a"), fails, worker="a")
        (work,) = crashing.begin([message])
        crashing.run(work)  # type: ignore[arg-type]  # and never settled
        clock.advance(LEASE + 1)

        pipe(noting("a"), noting("b"), worker="b").handle(message)

        assert [entry for entry in storage.log if entry.endswith("runs")] == ["a runs", "b runs"]

    def test_under_none_there_is_neither_claim_nor_mark(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage, noting: Callable[[str], Function]
    ) -> None:
        pipe(noting("a"), noting("b"), once="none").handle(Message(1, "t"))
        assert storage.log == ["a runs", "b runs", "handled"]


class TestMany:
    def test_they_are_claimed_in_one_round_trip_and_settled_in_one(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        def by_data(message: Message[str]) -> None:
            match message.data:
                case "retry":
                    raise ValueError
                case "dead":
                    raise Discard("no")
                case "snoozed":
                    raise Snooze(1)

        kinds = ["handled", "retry", "dead", "snoozed"]
        outcomes = pipe(by_data).handle_many([Message(kind, "t") for kind in kinds])

        assert [type(outcome) for outcome in outcomes] == [Handled, Retry, Dead, Snoozed]
        assert storage.log == ["claim claim claim claim", "handled retry dead snoozed"]

    def test_outcomes_stand_in_the_order_of_their_messages(self, pipe: Callable[..., Pipeline]) -> None:
        pipeline = pipe(done, schema=int)
        first, unreadable, last = Message(1, "t"), Message("x", "t"), Message(2, "t", once="none")
        outcomes = pipeline.handle_many([first, unreadable, first, last])
        assert [type(outcome) for outcome in outcomes] == [Handled, Dead, Busy, Handled]

    def test_nothing_to_do_asks_nothing(self, pipe: Callable[..., Pipeline], storage: TroubledStorage) -> None:
        assert pipe(done).handle_many([]) == []
        assert storage.log == []

    def test_under_index_the_second_of_an_index_waits_for_the_first(self, pipe: Callable[..., Pipeline]) -> None:
        pipeline = pipe(done, once="index")
        first, second = (Message(1, "t", index="i") for _ in range(2))

        outcomes = pipeline.handle_many([first, second])

        assert isinstance(outcomes[0], Handled)
        assert outcomes[1] == Busy(LEASE)
        assert pipeline.handle(second) == Duplicate()

    def test_under_message_both_are_handled_and_the_later_has_the_record(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        first, second = (Message(number, "t", index="i") for number in range(2))
        outcomes = pipe(done).handle_many([first, second])
        assert [type(outcome) for outcome in outcomes] == [Handled, Handled]
        record = storage.get("t", "i")
        assert record
        assert record.id == second.id
        assert storage.len() == 1

    def test_a_dead_letter_that_cannot_be_stored_now_is_no_reason_to_hold_up_claims(
        self, pipe: Callable[..., Pipeline], storage: TroubledStorage
    ) -> None:
        """Asked to stop with a storage that is away: each goes back as it came."""
        storage.away = {"claim", "dead"}
        pipeline = pipe(done, schema=int, settings={"stopping": lambda: True})
        assert pipeline.handle_many([Message("x", "t"), Message(1, "t")]) == [Busy(0.0), Busy(0.0)]
