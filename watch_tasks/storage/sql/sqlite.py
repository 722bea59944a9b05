"""SQLite, in one file, in WAL mode. Whoever writes has the whole file: that is the lock."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final

from sqlalchemy import URL, Connection, Engine, FromClause, bindparam, create_engine, event, func, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql import ColumnElement

from ..kept import Key
from .backend import ANSWER, Backend
from .forks import ForkGate
from .tables import Name, Tables, spell
from .transaction import watch_handlers

__all__ = ["Sqlite"]

#: Execution option of connections that only read.
_READS: Final = "watch_reads"

#: In the `info` of a connection that is in use: what the gate wants to know.
_USED: Final = "watch_used"

#: Of what passes: another writer, a full disk, a file that is not there or may not be written just now.
_PASSING: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    }
)


class Sqlite(Backend):
    """A SQLite file, which the processes of one machine share. Its clock is the machine's.

    Args:
        url: names the file.
        clock: seconds since the epoch, for tests; None: the machine's.
        timeout: seconds to wait for others that write.
    """

    insert = staticmethod(sqlite.insert)
    reading: ClassVar[dict[str, Any]] = {_READS: True}

    def __init__(self, url: URL, clock: Callable[[], float] | None, *, timeout: float = ANSWER) -> None:
        super().__init__(url, clock)
        self._timeout = timeout

    def _open(self) -> Engine:
        self._turn = threading.Lock()
        engine = create_engine(
            self.url,
            connect_args={"timeout": self._timeout, "check_same_thread": False},
            max_overflow=-1,
            pool_timeout=ANSWER,
        )
        gate = self._gate = ForkGate(engine.dispose)

        @event.listens_for(engine, "do_connect")
        def connect(dialect: Any, record: object, args: Any, options: Any) -> sqlite3.Connection:
            with gate.used():
                connection: sqlite3.Connection = dialect.connect(*args, **options)
                connection.isolation_level = None  # we begin transactions, not the driver
                # Readers and one writer do not wait for each other; what was committed survives a loss of power.
                _use_wal(connection, self._timeout)
                connection.execute("PRAGMA synchronous = FULL")
            return connection

        @event.listens_for(engine, "checkout")
        def take(connection: object, record: Any, fairy: object) -> None:
            record.info[_USED] = gate.enter()

        @event.listens_for(engine, "checkin")
        def give(connection: object, record: Any) -> None:
            thread = record.info.pop(_USED, None)
            if thread is not None:
                gate.leave(thread)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A transaction that read first could not write any more once another wrote.
            only_reads = connection.get_execution_options().get(_READS)
            connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

        watch_handlers(engine)
        return engine

    @contextmanager
    def turn(self) -> Iterator[None]:
        # SQLite asks again and again after ever longer pauses; the threads of one process need not.
        _ = self.engine
        has_turn = self._turn.acquire(timeout=self._timeout)
        try:
            yield
        finally:
            if has_turn:
                self._turn.release()

    def lock(self, connection: Connection, ids: Iterable[str], keys: Iterable[Key]) -> int:
        return self.micros()

    def lock_tables(self, connection: Connection) -> None:
        """Nothing to do: the transaction has the file."""

    def listed(self, name: str, width: int) -> FromClause:
        rows = func.json_each(bindparam(name)).table_valued("value", name=f"{name}_of")
        columns = [
            func.json_extract(rows.c.value, f"$[{place}]", type_=Name()).label(f"of{place}") for place in range(width)
        ]
        return select(*columns).select_from(rows).subquery(name)

    def listing(self, name: str, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        return {name: json.dumps([[spell(value) for value in row] for row in rows])}

    def free(self, connection: Connection, names: Sequence[Sequence[str]]) -> list[bool]:
        return [True] * len(names)

    def tokens(self, connection: Connection, tables: Tables, count: int, least: int) -> int:
        meta = tables.meta
        added = sqlite.insert(meta).values(name="token", value=least + count - 1)
        taken = added.on_conflict_do_update(
            index_elements=["name"], set_={"value": func.max(meta.c.value + count, added.excluded.value)}
        )
        return int(connection.execute(taken.returning(meta.c.value)).scalar_one()) - count + 1

    def last_token(self, tables: Tables) -> ColumnElement[int]:
        return select(tables.meta.c.value).where(tables.meta.c.name == "token").scalar_subquery()

    def extras(self, tables: Tables) -> list[SchemaItem]:
        return []

    def is_away(self, error: DBAPIError) -> bool:
        # The lower half is the error, the upper one tells more of it: https://www.sqlite.org/rescode.html
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _PASSING

    def check(self, connection: Connection) -> list[tuple[str, bool, str, str]]:
        version, mode = sqlite3.sqlite_version, connection.exec_driver_sql("PRAGMA journal_mode").scalar_one()
        is_new = sqlite3.sqlite_version_info >= (3, 35)
        return [
            ("storage version", is_new, f"SQLite {version}", "" if is_new else "use SQLite 3.35 or newer"),
            (
                "storage persistence",
                mode == "wal",
                f"journal_mode {mode}",
                "" if mode == "wal" else "keep the file on a local disk: a network file system has no WAL",
            ),
        ]


def _use_wal(connection: sqlite3.Connection, timeout: float) -> None:
    """Put a new file into WAL mode; of several that do so at once, SQLite has some fail without any wait."""
    end = time.monotonic() + timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
