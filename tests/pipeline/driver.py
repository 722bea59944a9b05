"""Handlers that do little, and the little that a driver does with a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from watch_tasks import DeadLetter, Message, Outcome, Retry, Snoozed
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage import Storage

#: Seconds that a pipeline claims for.
LEASE: Final = 8.0

Function = Callable[[Message[Any]], Any]


def done(message: Message[Any]) -> None:
    """Succeed."""


def fails(message: Message[Any]) -> None:
    """Fail in a way that another try might cure."""
    raise ValueError("no luck")


def raising(error: BaseException) -> Function:
    """Return a handler that raises this."""

    def handler(message: Message[Any]) -> None:
        raise error

    return handler


def to_the_end(pipeline: Pipeline, message: Message[Any]) -> list[Outcome]:
    """Handle a message and the copies that come of it, as a driver would, without their delays."""
    outcomes = [pipeline.handle(message)]
    while isinstance(last := outcomes[-1], Retry | Snoozed):
        outcomes.append(pipeline.handle(last.message))
    return outcomes


def letter_of(storage: Storage) -> DeadLetter:
    """Return the one dead letter there is."""
    (letter,) = storage.dead()
    return letter
