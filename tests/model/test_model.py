"""Random schedules against the storages: what is promised holds, whatever fails when."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.servers import RedisServer
from watch_tasks.storage.base import Storage
from watch_tasks.storage.redis import RedisStorage

from .machine import StorageMachine

#: Schedules of the default run, and actions in each.
ON_MEMORY, ON_REDIS, STEPS = 100, 60, 50
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

    class OnValkey(StorageMachine):
        @classmethod
        def open(cls, clock: Callable[[], float]) -> Storage:
            return Shared(client, clock=clock, prefix=f"{next(prefixes)}:")

    with valkey.client() as client:
        yield OnValkey


def test_memory_storage_keeps_its_promises(record_property: Tell) -> None:
    explore(StorageMachine, ON_MEMORY, record_property)


@pytest.mark.integration
def test_redis_storage_keeps_its_promises(on_valkey: type[StorageMachine], record_property: Tell) -> None:
    explore(on_valkey, ON_REDIS, record_property)


@pytest.mark.chaos
def test_memory_storage_keeps_its_promises_for_long(record_property: Tell) -> None:
    explore(StorageMachine, 10 * LONG, record_property)


@pytest.mark.chaos
@pytest.mark.integration
def test_redis_storage_keeps_its_promises_for_long(on_valkey: type[StorageMachine], record_property: Tell) -> None:
    explore(on_valkey, LONG, record_property)
