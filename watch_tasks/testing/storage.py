"""The promises of a storage as tests: a backend's own tests are a subclass with one fixture.

class TestMyStorage(StorageSuite):
    @pytest.fixture
    def storage(self, clock):
        with MyStorage(..., clock=clock) as storage:
            yield storage

    @pytest.fixture
    def reopen(self, clock):
        return lambda: MyStorage(..., clock=clock)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from ..storage.base import Storage
from .clock import ManualClock
from .storage_claims import ClaimPromises
from .storage_commits import CommitPromises
from .storage_leases import LeasePromises
from .storage_records import RecordPromises
from .storage_replays import ReplayPromises

__all__ = ["StorageSuite"]


class StorageSuite(ClaimPromises, LeasePromises, CommitPromises, RecordPromises, ReplayPromises):
    """Every promise of `Storage`. Promises that a backend does not make are flags here, and skip their tests."""

    #: Whether another object on the same data sees what this one wrote.
    is_shared: ClassVar[bool] = True
    #: Whether what was kept is still there after `close`, for whoever opens the storage again.
    survives_restart: ClassVar[bool] = True

    @pytest.fixture
    def clock(self) -> ManualClock:
        """The time that the storage goes by."""
        return ManualClock()

    @pytest.fixture
    def storage(self, clock: ManualClock) -> Any:
        """An empty storage that goes by `clock`."""
        raise NotImplementedError("a suite needs a fixture `storage`")

    @pytest.fixture
    def reopen(self) -> Callable[[], Storage]:
        """Opens the same storage once more, as another process would."""
        if self.is_shared or self.survives_restart:
            raise NotImplementedError("a suite needs a fixture `reopen`, or `is_shared = survives_restart = False`")
        pytest.skip("promise not made: is_shared, survives_restart")

    @pytest.fixture
    def shared(self, request: pytest.FixtureRequest) -> Any:
        """`reopen`, for a storage that promises `is_shared`."""
        if not self.is_shared:
            pytest.skip("promise not made: is_shared")
        return request.getfixturevalue("reopen")

    @pytest.fixture
    def restarted(self, request: pytest.FixtureRequest) -> Any:
        """`reopen`, for a storage that promises `survives_restart`."""
        if not self.survives_restart:
            pytest.skip("promise not made: survives_restart")
        return request.getfixturevalue("reopen")
