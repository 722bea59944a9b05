"""What is told of a message: events, error texts, log lines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from watch_tasks import (
    Discard,
    Message,
    RetryPolicy,
    Snooze,
)
from watch_tasks.errors import SchemaError
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage import Storage

from .driver import Function, done, fails, letter_of, raising, to_the_end


class TestStory:
    def test_an_index_tells_what_happened_to_it(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        def fails_once(message: Message[Any]) -> None:
            if not message.retries:
                raise ValueError("first")

        pipeline, message = pipe(done, fails_once), Message(1, "t", index="i", id="m")
        to_the_end(pipeline, message)
        pipeline.handle(message)

        events = [*storage.explain("t", "i")]
        told = [(event.event, event.handler, event.copy, event.error) for event in events]
        assert told == [
            ("sent", None, 0, None),
            ("attempt", None, 0, None),
            ("handler", "h0", 0, None),
            ("retry", "h1", 0, "ValueError: first"),
            ("attempt", None, 1, None),
            ("handler", "h1", 1, None),
            ("handled", None, 1, None),
            ("suppressed", None, 0, None),
        ]
        assert {event.id for event in events} == {"m"}

    @pytest.mark.parametrize(
        ("error", "kind"), [(Discard("no"), "dead"), (Snooze(5), "snoozed"), (ValueError("no"), "retry")]
    )
    def test_each_end_has_its_event(
        self, pipe: Callable[..., Pipeline], storage: Storage, error: Exception, kind: str
    ) -> None:
        pipe(raising(error)).handle(Message(1, "t", index="i"))
        assert [event.event for event in storage.explain("t", "i")] == ["sent", "attempt", kind]


class TestErrorTexts:
    """What a handler raises may be broken in itself."""

    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    def test_an_error_without_a_text_still_is_a_failure(
        self, pipe: Callable[..., Pipeline], storage: Storage, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "watch_tasks")
        to_the_end(pipe(raising(self.Broken())), Message(1, "t", max_retries=1))
        assert letter_of(storage).error == "Broken: <its text raised RuntimeError>"
        assert [record.action for record in caplog.records] == ["retry", "dead"]  # type: ignore[attr-defined]

    def test_half_a_surrogate_pair_is_written_out(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        pipe(raising(Discard("\ud800"))).handle(Message(1, "t"))
        assert letter_of(storage).error == "Discard: \\ud800"

    def test_a_very_long_text_is_cut(self, pipe: Callable[..., Pipeline], storage: Storage) -> None:
        pipe(raising(Discard("x" * 10_000))).handle(Message(1, "t"))
        assert len(letter_of(storage).error) == 2000


class TestLogs:
    FORGED = "\nERROR all orders were deleted"

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            (Message(1, "t"), ValueError(f"no{FORGED}")),
            (Message(1, "t"), Discard(f"no{FORGED}")),
            (Message(1, "t", id=f"m{FORGED}", index="i"), ValueError("no")),
            (Message(1, f"x{FORGED}"), ValueError("no")),
            (Message(1, "t", index="i\\nERROR"), ValueError("no")),
        ],
    )
    def test_nothing_from_outside_forges_a_line(
        self,
        pipe: Callable[..., Pipeline],
        caplog: pytest.LogCaptureFixture,
        message: Message[Any],
        error: Exception,
    ) -> None:
        caplog.set_level(logging.INFO, "watch_tasks")
        to_the_end(pipe(raising(error), retry=RetryPolicy(1), settings={"unknown_grace": 0.0}), message)
        assert caplog.records
        assert not any("\n" in record.getMessage() for record in caplog.records)

    @pytest.mark.parametrize(
        ("function", "level", "action"),
        [
            (done, logging.INFO, "handled"),
            (fails, logging.INFO, "retry"),
            (raising(Snooze(1)), logging.INFO, "snoozed"),
            (raising(Discard("no")), logging.INFO, "dead"),  # a verdict is no error
            (raising(SchemaError("no")), logging.INFO, "retry"),
        ],
    )
    def test_each_outcome_is_one_line_with_its_fields(
        self,
        pipe: Callable[..., Pipeline],
        caplog: pytest.LogCaptureFixture,
        function: Function,
        level: int,
        action: str,
    ) -> None:
        caplog.set_level(logging.INFO, "watch_tasks")
        pipe(function).handle(Message(1, "t", index="i", id="m"))
        (record,) = caplog.records
        fields = vars(record)
        assert (record.levelno, fields["action"]) == (level, action)
        assert (fields["topic"], fields["index"], fields["message_id"]) == ("t", "i", "m")

    def test_what_a_person_should_see_is_an_error(
        self, pipe: Callable[..., Pipeline], caplog: pytest.LogCaptureFixture
    ) -> None:
        pipe(fails).handle(Message(1, "t", max_retries=0))
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
