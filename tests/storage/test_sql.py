"""The SQL storage keeps every promise, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from tests.postgres import PostgresServer
from watch_tasks.storage.sql import SqlStorage, open_url
from watch_tasks.testing import ManualClock, StorageSuite


class SqlSuite(StorageSuite):
    backend = SqlStorage

    @pytest.fixture
    def storage(self, url: str, clock: ManualClock) -> Iterator[SqlStorage]:
        with open_url(url, clock=clock) as storage:
            yield storage

    @pytest.fixture
    def reopen(self, url: str, clock: ManualClock) -> Callable[[], SqlStorage]:
        return lambda: open_url(url, clock=clock)


class TestOnSqlite(SqlSuite):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/watch.db"


@pytest.mark.integration
class TestOnPostgres(SqlSuite):
    @pytest.fixture
    def url(self, database: str) -> str:
        empty(database)
        return database


@pytest.fixture(scope="module")
def database(_postgres: PostgresServer) -> Iterator[str]:
    """The URL of a database that the tests of this module share."""
    yield _postgres.create_database("suite")
    _postgres.drop_database("suite")


def empty(url: str) -> None:
    """Take everything out of the tables, which takes less than making them anew."""
    with open_url(url) as storage:
        storage.topics()  # makes them, the first time
    with psycopg.connect(url, autocommit=True) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        names = [name for (name,) in tables if name != "watch_meta"]
        connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(map(sql.Identifier, names))))
