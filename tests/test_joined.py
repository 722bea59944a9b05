"""Calls of several threads that become one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from watch_tasks.errors import StorageError, StorageUnavailableError
from watch_tasks.joined import Joined


class Slow:
    """Answers each question with its double, when it is let; the first call waits until others have come."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.go = threading.Event()
        self.is_in = threading.Event()
        self.error: Exception | None = None
        self.joined = Joined(self)

    def __call__(self, questions: Sequence[int]) -> list[int]:
        self.calls.append(list(questions))
        if len(self.calls) == 1:
            self.is_in.set()
            assert self.go.wait(10)
        if self.error and 13 in questions:
            raise self.error
        return [2 * question for question in questions]

    def ask(self, pool: ThreadPoolExecutor, *groups: list[int]) -> list[Future[list[int]]]:
        """Ask the first alone, and the others while its call is under way."""
        first = pool.submit(self.joined, groups[0])
        assert self.is_in.wait(10)
        asked = [first]
        for number, group in enumerate(groups[1:], 1):
            asked.append(pool.submit(self.joined, group))
            while len(self.joined._waiting) < number:
                assert not asked[-1].done()
        self.go.set()
        return asked


def test_who_comes_alone_goes_at_once() -> None:
    slow = Slow()
    slow.go.set()

    assert slow.joined([1, 2]) == [2, 4]
    assert slow.joined([3]) == [6]
    assert slow.calls == [[1, 2], [3]]


def test_nothing_is_asked_for_nothing() -> None:
    slow = Slow()

    assert slow.joined([]) == []
    assert slow.calls == []


def test_those_who_come_meanwhile_go_together_and_each_gets_its_own_answers() -> None:
    slow = Slow()
    with ThreadPoolExecutor(4) as pool:
        asked = slow.ask(pool, [1], [2, 3], [4], [5, 6])

    assert [one.result(10) for one in asked] == [[2], [4, 6], [8], [10, 12]]
    assert slow.calls == [[1], [2, 3, 4, 5, 6]]


def test_a_storage_that_is_away_is_so_for_each() -> None:
    slow = Slow()
    slow.error = StorageUnavailableError("away")
    with ThreadPoolExecutor(3) as pool:
        first, *others = slow.ask(pool, [1], [13], [2])

    assert first.result(10) == [2]
    for other in others:
        with pytest.raises(StorageUnavailableError, match="away"):
            other.result(10)
    assert slow.calls == [[1], [13, 2]]


def test_what_the_storage_stumbles_over_is_only_its_askers_trouble() -> None:
    slow = Slow()
    slow.error = StorageError("no such thing")
    with ThreadPoolExecutor(3) as pool:
        _, bad, good = slow.ask(pool, [1], [13], [2])

    assert good.result(10) == [4]
    with pytest.raises(StorageError, match="no such thing"):
        bad.result(10)


def test_after_an_error_the_next_one_goes() -> None:
    slow = Slow()
    slow.go.set()
    slow.error = StorageError("no such thing")

    with pytest.raises(StorageError):
        slow.joined([13])
    assert slow.joined([1]) == [2]


def test_many_threads_are_all_answered() -> None:
    joined = Joined[int, int](lambda questions: [2 * question for question in questions])
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda number: joined([number, -number]), range(2000)))

    assert found == [[2 * number, -2 * number] for number in range(2000)]
