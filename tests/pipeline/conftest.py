from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.postgres import PostgresServer
from watch_tasks import Message
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage import Storage
from watch_tasks.storage.sql import open_url
from watch_tasks.testing import ManualClock
from watch_tasks.topics import Topic

from .bench import Bench, bench_on
from .driver import LEASE, Function
from .trouble import TroubledStorage


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def storage(clock: ManualClock) -> Iterator[TroubledStorage]:
    with TroubledStorage(clock) as storage:
        yield storage


@pytest.fixture
def pipe(storage: Storage) -> Callable[..., Pipeline]:
    """Makes a pipeline for a topic `t` with these handlers, called h0, h1, …; options are the topic's."""

    def make(
        *functions: Function, worker: str = "w", settings: dict[str, Any] | None = None, **options: Any
    ) -> Pipeline:
        topic: Topic[Any] = Topic("t", **options)
        for number, function in enumerate(functions):
            topic.handler(name=f"h{number}")(function)
        return Pipeline(storage, {"t": topic}.get, worker=worker, lease=LEASE, **(settings or {}))

    return make


@pytest.fixture
def noting(storage: TroubledStorage) -> Callable[[str], Function]:
    """Makes a handler that notes its call between those of the storage."""

    def make(name: str) -> Function:
        def handler(message: Message[Any]) -> None:
            storage.log.append(f"{name} runs")

        return handler

    return make


@pytest.fixture(scope="module")
def database(_postgres: PostgresServer) -> Iterator[str]:
    yield _postgres.create_database("transactions")
    _postgres.drop_database("transactions")


@pytest.fixture
def postgres_bench(database: str) -> Iterator[Bench]:
    with open_url(database) as storage:
        storage.topics()
    with psycopg.connect(database, autocommit=True) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        # Which takes less than TRUNCATE where there is little.
        for (name,) in tables:
            if name != "watch_meta":
                connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(name)))
    yield from bench_on(database)


@pytest.fixture
def sqlite_bench(tmp_path: Path) -> Iterator[Bench]:
    yield from bench_on(f"sqlite:///{tmp_path}/watch.db")


@pytest.fixture(params=["sqlite", "postgres"])
def bench(request: pytest.FixtureRequest) -> Bench:
    found: Bench = request.getfixturevalue(f"{request.param}_bench")
    return found
