"""The SQL storage keeps every promise, on SQLite and on PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

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
    if url.startswith("sqlite"):
        tables = run_sql(url, "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE 'watch_%'")
        run_sql(url, "BEGIN", *(f"DELETE FROM {name}" for (name,) in tables if name != "watch_meta"), "COMMIT")
        return
    with psycopg.connect(url, autocommit=True) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        names = [name for (name,) in tables if name != "watch_meta"]
        connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(map(sql.Identifier, names))))


def run_sql(url: str, *statements: str) -> list[Any]:
    """Run statements beside the storage; return the rows of the last."""
    rows: list[Any] = []
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            for statement in statements:
                rows = connection.execute(statement).fetchall()
        return rows
    with psycopg.connect(url, autocommit=True) as client:
        for statement in statements:
            cursor = client.execute(statement.encode())
            rows = cursor.fetchall() if cursor.description else []
    return rows
