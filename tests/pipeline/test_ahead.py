"""Messages that are claimed some time before their handlers start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from watch_tasks import Duplicate, Handled, Message, Outcome
from watch_tasks.pipeline import Pipeline
from watch_tasks.testing import ManualClock
from watch_tasks.work import Work

from .driver import LEASE, done
from .trouble import TroubledStorage

MakePipe = Callable[..., Pipeline]


def finish(pipeline: Pipeline, found: list[Work | Outcome | None]) -> list[Outcome]:
    """Handle what was claimed, and settle it together."""
    works = [work for work in found if isinstance(work, Work)]
    return pipeline.settle([pipeline.run(work) for work in works])


def test_many_are_claimed_at_once_and_settled_at_once(pipe: MakePipe, storage: TroubledStorage) -> None:
    pipeline = pipe(done)
    found = pipeline.begin_ahead([Message(number, "t") for number in range(3)])

    assert all(isinstance(outcome, Handled) for outcome in finish(pipeline, found))
    assert storage.log == ["claim claim claim", "handled handled handled"]
    assert storage.len("t") == 3


def test_a_worker_that_dies_meanwhile_counts_against_nobody(pipe: MakePipe, clock: ManualClock) -> None:
    message = Message(1, "t")
    pipe(done, worker="a").begin_ahead([message])

    clock.advance(LEASE + 1)
    (work,) = pipe(done, worker="b").begin([message])

    assert isinstance(work, Work)
    assert work.crashes == 0


def test_what_is_done_is_told_and_what_is_busy_is_left_to_later(pipe: MakePipe) -> None:
    pipeline = pipe(done)
    handled, running = Message(1, "t"), Message(2, "t")
    pipeline.handle(handled)
    pipe(done, worker="other").begin([running])

    assert pipeline.begin_ahead([handled, running]) == [Duplicate(), None]


def test_one_that_took_a_worker_down_is_left_to_later_and_can_be_claimed(pipe: MakePipe, clock: ManualClock) -> None:
    message = Message(1, "t")
    pipe(done, worker="a").begin([message])
    clock.advance(LEASE + 1)
    pipeline = pipe(done, worker="b")

    assert pipeline.begin_ahead([message]) == [None]

    (work,) = pipeline.begin([message])
    assert isinstance(work, Work)
    assert work.crashes == 1


def test_retries_and_unclaimed_and_unreadable_messages_are_not_claimed(
    pipe: MakePipe, storage: TroubledStorage
) -> None:
    pipeline = pipe(done, schema=int)
    retry = Message(1, "t", copy=1, retries=1)
    unclaimed = Message(2, "t", once="none")
    unreadable = Message("no number", "t")

    found = pipeline.begin_ahead([retry, unclaimed, unreadable])

    assert found[:2] == [None, None]
    assert isinstance(found[2], Outcome)
    assert [letter.id for letter in storage.dead()] == [unreadable.id]


def test_the_same_index_twice_leaves_the_second_to_later(pipe: MakePipe) -> None:
    pipeline = pipe(done, once="index")
    messages = [Message(1, "t", index="i", id=name) for name in "ab"]

    first, second = pipeline.begin_ahead(messages)
    assert second is None

    (outcome,) = finish(pipeline, [first])
    assert isinstance(outcome, Handled)
    assert pipeline.handle(messages[1]) == Duplicate()


def test_a_worker_that_stops_while_the_storage_is_away_claims_nothing(pipe: MakePipe, storage: TroubledStorage) -> None:
    pipeline = pipe(done, settings={"stopping": lambda: True})
    storage.away = {"claim"}
    messages: list[Message[Any]] = [Message(number, "t") for number in range(2)]

    assert pipeline.begin_ahead(messages) == [None, None]
