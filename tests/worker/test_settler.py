"""The thread that stores what became of messages."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from watch_tasks.errors import StorageError
from watch_tasks.outcome import Handled, Outcome
from watch_tasks.storage.protocol import Commit, Step
from watch_tasks.work import Settlement
from watch_tasks.worker.settler import Settler


def handled(number: int) -> Settlement:
    commit = Commit(step=Step.HANDLED, topic="t", index=str(number), id=str(number), copy=0, token=number)
    return Settlement(commit, Handled(float(number)))


class Storage:
    """Keeps the groups that it is given; the first waits to be let through."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.go = threading.Event()
        self.is_in = threading.Event()
        self.told = 0
        self.refuses: str | None = None

    def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        self.groups.append([settlement.commit.id for settlement in settlements])
        if len(self.groups) == 1:
            self.is_in.set()
            assert self.go.wait(10)
        if self.refuses in self.groups[-1]:
            raise StorageError("no such thing")
        return [settlement.outcome for settlement in settlements]

    def tell(self) -> None:
        self.told += 1


def test_what_comes_while_one_is_under_way_goes_with_the_next() -> None:
    storage = Storage()
    settler: Settler[int] = Settler(storage.settle, storage.tell)
    settler.put(0, handled(0))
    assert storage.is_in.wait(10)
    for number in (1, 2, 3):
        settler.put(number, handled(number))
    assert settler.take() == []

    storage.go.set()
    settler.drain()

    assert settler.take() == [(number, Handled(float(number))) for number in range(4)]
    assert storage.groups == [["0"], ["1", "2", "3"]]
    assert settler.take() == []
    settler.close()
    assert storage.told == 2


def test_one_that_cannot_be_stored_keeps_none_of_the_others() -> None:
    storage = Storage()
    storage.refuses = "2"
    settler: Settler[int] = Settler(storage.settle, storage.tell)
    settler.put(0, handled(0))
    assert storage.is_in.wait(10)
    for number in (1, 2, 3):
        settler.put(number, handled(number))

    storage.go.set()
    settler.close()

    found = dict(settler.take())
    assert [found[number] for number in (0, 1, 3)] == [Handled(0.0), Handled(1.0), Handled(3.0)]
    assert isinstance(found[2], StorageError)


def test_its_age_is_that_of_the_oldest_that_waits() -> None:
    storage = Storage()
    settler: Settler[int] = Settler(storage.settle, storage.tell)
    assert settler.age() == 0.0
    settler.put(0, handled(0))
    assert storage.is_in.wait(10)
    assert settler.age() > 0.0

    storage.go.set()
    settler.drain()

    assert settler.age() == 0.0
    settler.close()


def test_after_its_close_it_begins_anew() -> None:
    storage = Storage()
    storage.go.set()
    settler: Settler[int] = Settler(storage.settle, storage.tell)
    for number in (0, 1):
        settler.put(number, handled(number))
        settler.close()
        settler.close()
        assert [ticket for ticket, _ in settler.take()] == [number]


def test_who_is_to_keep_up_waits_for_the_oldest() -> None:
    storage = Storage()
    settler: Settler[int] = Settler(storage.settle, storage.tell, moment=0.0)
    settler.put(1, handled(1))
    assert storage.is_in.wait(10)
    settler.keep_up(10)  # it is younger than that
    kept_up = threading.Event()

    def wait() -> None:
        settler.keep_up(0)
        kept_up.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not kept_up.wait(0.1)
    storage.go.set()

    waiting.join(10)
    assert kept_up.is_set()
    settler.close()
