from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

import pytest

from watch_tasks import MemoryStorage, StorageUnavailableError
from watch_tasks.leases import LeaseKeeper
from watch_tasks.storage.protocol import Claim, Granted

#: Seconds in which everything here must be done.
PATIENCE = 10.0


class NotingStorage(MemoryStorage):
    """A storage that notes the renewals it is asked for, and can be away."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        super().__init__(clock=lambda: self.now)
        self.is_away = False
        self.asked: list[set[str]] = []
        self.came = threading.Condition()

    def _renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]:
        with self.came:
            self.asked.append(set(ids))
            self.came.notify_all()
        if self.is_away:
            raise StorageUnavailableError("away")
        return super()._renew(worker, ids, lease)

    def wait_for(self, count: int) -> None:
        with self.came:
            assert self.came.wait_for(lambda: len(self.asked) >= count, PATIENCE)


@pytest.fixture
def storage() -> Iterator[NotingStorage]:
    with NotingStorage() as storage:
        yield storage


@pytest.fixture
def keeper(storage: NotingStorage) -> Iterator[LeaseKeeper]:
    keeper = LeaseKeeper(storage, "w", lease=8.0, every=0.01)
    yield keeper
    keeper.stop()


def claim(storage: NotingStorage, id: str, worker: str = "w") -> bool:
    answer = storage.claim(
        Claim(
            topic="t",
            index=id,
            id=id,
            copy=0,
            once="message",
            worker=worker,
            lease=8.0,
            digest="",
            retention=None,
            sent_at=0.0,
        )
    )
    return isinstance(answer, Granted)


def test_what_is_held_is_renewed_until_it_is_dropped(storage: NotingStorage, keeper: LeaseKeeper) -> None:
    assert claim(storage, "m")
    keeper.hold("m")
    storage.now += 7
    assert keeper.renew() == {"m"}
    storage.now += 7
    assert not claim(storage, "m", "other")

    keeper.drop("m")

    assert keeper.renew() == set()
    storage.now += 2
    assert claim(storage, "m", "other")


def test_what_is_held_twice_is_dropped_twice(storage: NotingStorage, keeper: LeaseKeeper) -> None:
    claim(storage, "m")
    keeper.hold("m")
    keeper.hold("m")
    keeper.drop("m")
    assert keeper.renew() == {"m"}


def test_a_claim_may_be_made_after_it_is_held(storage: NotingStorage, keeper: LeaseKeeper) -> None:
    keeper.hold("m")
    assert keeper.renew() == set()
    claim(storage, "m")
    assert keeper.renew() == {"m"}


def test_what_another_took_over_is_not_renewed(storage: NotingStorage, keeper: LeaseKeeper) -> None:
    claim(storage, "m")
    keeper.hold("m")
    storage.now += 9
    assert claim(storage, "m", "other")
    assert keeper.renew() == set()


def test_dropping_what_is_not_held_is_safe(keeper: LeaseKeeper) -> None:
    keeper.drop("m")
    keeper.hold("m")
    keeper.drop("m")


def test_its_thread_renews_all_in_one_call(storage: NotingStorage, keeper: LeaseKeeper) -> None:
    keeper.hold("a")
    keeper.hold("b")
    keeper.start()
    keeper.start()
    storage.wait_for(2)
    assert storage.asked[-1] == {"a", "b"}


def test_a_storage_that_is_away_is_asked_again(
    storage: NotingStorage, keeper: LeaseKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "watch_tasks.leases")
    claim(storage, "m")
    keeper.hold("m")
    storage.is_away = True
    keeper.start()
    storage.wait_for(2)

    storage.is_away = False
    storage.wait_for(len(storage.asked) + 2)

    assert "could not renew leases" in caplog.text


def test_stopping_ends_the_thread_and_starting_begins_anew(storage: NotingStorage, keeper: LeaseKeeper) -> None:
    keeper.hold("m")
    keeper.start()
    storage.wait_for(1)
    keeper.stop()
    keeper.stop()
    count = len(storage.asked)
    assert not any(thread.name == "watch-leases" for thread in threading.enumerate())

    keeper.start()

    storage.wait_for(count + 1)
