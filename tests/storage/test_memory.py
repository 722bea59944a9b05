"""The memory storage keeps every promise that a process can."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from watch_tasks.storage import open_storage
from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.testing import ManualClock, StorageSuite


class TestMemoryStorage(StorageSuite):
    backend = MemoryStorage
    is_shared = False
    survives_restart = False

    @pytest.fixture
    def storage(self, clock: ManualClock) -> Iterator[MemoryStorage]:
        with MemoryStorage(clock=clock) as storage:
            yield storage


def test_each_opening_is_a_new_and_empty_one() -> None:
    first, second = open_storage("memory://"), open_storage("memory://")

    assert isinstance(first, MemoryStorage)
    assert first is not second
    assert not first.is_shared
