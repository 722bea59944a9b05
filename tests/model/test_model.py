"""Random schedules against the storages: what is promised holds, whatever fails when."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.servers import RedisServer
from tests.storage.test_sql import empty
from watch_tasks.storage.base import Storage
from watch_tasks.storage.redis import RedisStorage
from watch_tasks.storage.sql import SqlStorage, open_url

from .machine import StorageMachine

#: Schedules of the default run, and actions in each.
ON_MEMORY, ON_REDIS, ON_SQL, STEPS = 100, 60, 5, 50
#: Schedules of the long run on a server; in memory ten times as many.
LONG = int(os.environ.get("MODEL_HISTORIES", "1000"))

Tell = Callable[[str, object], None]


def explore(machine: type[StorageMachine], histories: int, tell: Tell) -> None:
    """Run at least that many schedules, and tell how many were run."""

    class Counted(machine):  # type: ignore[valid-type, misc]
        histories = 0

    try:
        run_state_machine_as_test(
            Counted,
            settings=settings(
                max_examples=histories,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        tell("histories", Counted.histories)
    assert Counted.histories >= histories


@pytest.fixture
def on_valkey(valkey: RedisServer) -> Iterator[type[StorageMachine]]:
    """The machine on a server: each history has keys of its own."""
    prefixes = itertools.count()

    class Shared(RedisStorage):
        def close(self) -> None:
            """The next history goes on with the same connection."""
            while self._idle:
                client.connection_pool.release(self._idle.pop())

    class OnValkey(StorageMachine):
        @classmethod
        def open(cls, clock: Callable[[], float]) -> Storage:
            return Shared(client, clock=clock, prefix=f"{next(prefixes)}:")

    with valkey.client() as client:
        yield OnValkey


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def on_sql(request: pytest.FixtureRequest, tmp_path: Path) -> type[StorageMachine]:
    """The machine on a database: each history finds its tables empty."""
    url = request.getfixturevalue("postgres") if request.param == "postgresql" else f"sqlite:///{tmp_path}/watch.db"

    class Tended(SqlStorage):
        def _step(self, *arguments: Any) -> Any:
            """Forget what is over as often as can be: nobody may see a difference."""
            answer = super()._step(*arguments)
            if next(steps) % 7 == 0:
                self.tend()
            return answer

    steps = itertools.count()

    class OnSql(StorageMachine):
        @classmethod
        def open(cls, clock: Callable[[], float]) -> Storage:
            empty(url)
            opened = open_url(url, clock=clock)
            opened.__class__ = Tended
            return opened

    return OnSql


def test_memory_storage_keeps_its_promises(record_property: Tell) -> None:
    explore(StorageMachine, ON_MEMORY, record_property)


@pytest.mark.integration
def test_redis_storage_keeps_its_promises(on_valkey: type[StorageMachine], record_property: Tell) -> None:
    explore(on_valkey, ON_REDIS, record_property)


def test_sql_storage_keeps_its_promises(on_sql: type[StorageMachine], record_property: Tell) -> None:
    explore(on_sql, ON_SQL, record_property)


@pytest.mark.chaos
def test_memory_storage_keeps_its_promises_for_long(record_property: Tell) -> None:
    explore(StorageMachine, 10 * LONG, record_property)


@pytest.mark.chaos
@pytest.mark.integration
def test_redis_storage_keeps_its_promises_for_long(on_valkey: type[StorageMachine], record_property: Tell) -> None:
    explore(on_valkey, LONG, record_property)


@pytest.mark.chaos
def test_sql_storage_keeps_its_promises_for_long(on_sql: type[StorageMachine], record_property: Tell) -> None:
    explore(on_sql, LONG, record_property)
