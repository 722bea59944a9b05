"""A SQL storage, and handlers that write in its transactions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
from sqlalchemy import text

from watch_tasks import (
    Handled,
    Message,
    RetryPolicy,
)
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage.sql import SqlStorage, open_url
from watch_tasks.topics import Topic

from .driver import LEASE, Function


@dataclass
class Bench:
    """A SQL storage, and the table that handlers write to, read by a connection that knows nothing of it."""

    url: str
    storage: SqlStorage
    opened: list[SqlStorage] = field(default_factory=list)

    @property
    def is_postgres(self) -> bool:
        return self.url.startswith("postgres")

    def pipe(self, *functions: Function, worker: str = "w", settings: Any = None, **options: Any) -> Pipeline:
        made: Topic[Any] = Topic("t", **{"transactional": True, "retry": RetryPolicy(2), **options})
        for number, function in enumerate(functions):
            made.handler(name=f"h{number}")(function)
        return Pipeline(self.storage, {"t": made}.get, worker=worker, lease=LEASE, **(settings or {}))

    def ask(self, statement: str) -> list[Any]:
        """Run a statement by a connection of our own."""
        if self.is_postgres:
            with psycopg.connect(self.url, autocommit=True) as postgres:
                cursor = postgres.execute(statement)  # type: ignore[call-overload]
                return cursor.fetchall() if cursor.description else []
        connection = sqlite3.connect(self.url.removeprefix("sqlite:///"), isolation_level=None)
        try:
            return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def effects(self) -> list[str]:
        return sorted(what for (what,) in self.ask("SELECT what FROM effects"))

    def told(self, index: str) -> list[str]:
        return [told.event for told in self.storage.explain("t", index)]


def bench_on(url: str) -> Iterator[Bench]:
    with open_url(url) as storage:
        bench = Bench(url, storage)
        storage.topics()
        bench.ask("CREATE TABLE IF NOT EXISTS effects (what TEXT)")
        yield bench


def write(message: Message[Any], what: str) -> None:
    message.connection.execute(text("INSERT INTO effects VALUES (:what)"), {"what": what})


def writes(what: str, *errors: BaseException) -> Function:
    """Return a handler that writes, and then raises each of these in turn, before it succeeds."""
    left = list(errors)

    def handler(message: Message[Any]) -> None:
        write(message, what)
        if left:
            raise left.pop(0)

    return handler


def is_clean(bench: Bench) -> bool:
    """Whether every connection of the pool can store, and none is lent any more."""
    with bench.storage._backend.engine.connect() as connection:
        driver = connection.connection.driver_connection
        if bench.is_postgres:
            assert driver.info.transaction_status.name == "IDLE"  # type: ignore[union-attr]
            assert driver.bound  # type: ignore[union-attr]
        else:
            assert not driver.in_transaction  # type: ignore[union-attr]
    return isinstance(bench.pipe(lambda message: None, transactional=False).handle(Message(0, "t")), Handled)
