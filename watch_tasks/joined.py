"""Joins calls that several threads make at the same time into one: one round trip to a storage instead of many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .errors import StorageUnavailableError

__all__ = ["Joined"]

Q = TypeVar("Q")
A = TypeVar("A")


class Joined(Generic[Q, A]):
    """A call with many questions, each answered as if asked after those before it. For any number of threads.

    Who comes alone goes at once. Who comes while a call is under way waits for its end; then one of those that wait
    goes for all of them. Each waits for its own answers only.

    Args:
        call: returns an answer for each question.
    """

    def __init__(self, call: Callable[[Sequence[Q]], list[A]]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._waiting: list[_Part[Q, A]] = []
        self._is_led = False

    def __call__(self, questions: Sequence[Q]) -> list[A]:
        """Return the answers to these.

        Raises:
            StorageUnavailableError: no answer came, to nobody of those that were joined.
            Exception: whatever else the call raises for these questions alone.
        """
        if not questions:
            return []
        part: _Part[Q, A] = _Part(questions)
        with self._lock:
            self._waiting.append(part)
            is_first, self._is_led = not self._is_led, True
        if not is_first:
            part.turn.wait()
        if part.leads or is_first:
            self._lead()
        if part.away:
            raise StorageUnavailableError(str(part.away)) from part.away
        # Without answers: one of the others may be what the storage stumbles over.
        return self._call(questions) if part.answers is None else part.answers

    def _lead(self) -> None:
        with self._lock:
            parts, self._waiting = self._waiting, []
        try:
            answers = iter(self._call([question for part in parts for question in part.questions]))
            for part in parts:
                part.answers = [next(answers) for _ in part.questions]
        except StorageUnavailableError as exc:
            for part in parts:
                part.away = exc
        except Exception:
            if len(parts) == 1:
                raise
        finally:
            with self._lock:
                if self._waiting:
                    self._waiting[0].leads = True
                    self._waiting[0].turn.set()
                else:
                    self._is_led = False
            for part in parts:
                part.turn.set()


class _Part(Generic[Q, A]):
    """What one thread asks."""

    def __init__(self, questions: Sequence[Q]) -> None:
        self.questions = questions
        self.answers: list[A] | None = None
        self.away: StorageUnavailableError | None = None
        #: Set when it is answered, or is to go for all.
        self.turn = threading.Event()
        self.leads = False
