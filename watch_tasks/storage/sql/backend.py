"""What SQLite and PostgreSQL do each in its own way: opening, locking, telling the time, and what their errors mean."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final

from sqlalchemy import URL, BigInteger, Connection, Engine, FromClause, bindparam
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql import ColumnElement

from ..kept import Key
from .statements import Statements
from .tables import Tables

__all__ = ["ANSWER", "CONNECT", "Backend"]

#: Seconds that a connection, and an answer or a lock, may take: a server that hangs must not hang its clients.
CONNECT: Final = 2.0
ANSWER: Final = 5.0


_statements: dict[tuple[type[Backend], str, bool], Statements] = {}


class Backend(ABC):
    """One database. Its engine is opened at the first use, and anew after a fork.

    Args:
        url: as SQLAlchemy has it, with the driver.
        clock: seconds since the epoch, for tests; None: the backend's own clock.
    """

    #: Makes an INSERT that knows ON CONFLICT.
    insert: Callable[[Any], Any]
    #: Execution options of a connection that only reads.
    reading: ClassVar[dict[str, Any]]

    def __init__(self, url: URL, clock: Callable[[], float] | None) -> None:
        self.url, self.clock = url, clock
        self._engine: Engine | None = None
        self._pid = 0
        self._lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine of this process."""
        if self._engine is None or self._pid != os.getpid():
            with self._lock:
                if self._engine is None or self._pid != os.getpid():
                    if self._engine is not None:
                        self._engine.dispose(close=False)  # the parent's connections: let go of, not closed
                    self._engine, self._pid = self._open(), os.getpid()
        return self._engine

    def statements(self, prefix: str) -> Statements:
        """Return the statements for tables of that prefix; the same ones for all backends of this kind."""
        key = type(self), prefix, self.clock is None
        if key not in _statements:
            _statements[key] = Statements(Tables(prefix), self)
        return _statements[key]

    def close(self) -> None:
        """Close all connections. Twice is safe."""
        if self._engine is not None and self._pid == os.getpid():
            self._engine.dispose()

    @abstractmethod
    def _open(self) -> Engine: ...

    @abstractmethod
    def lock(self, connection: Connection, ids: Iterable[str], keys: Iterable[Key]) -> int:
        """Lock messages and indexes until the transaction ends; return the time in µs, read under the locks."""

    @abstractmethod
    def lock_tables(self, connection: Connection) -> None:
        """Lock the making and changing of tables until the transaction ends."""

    def now(self) -> ColumnElement[int]:
        """Return what stands for the time in µs within a statement; its parameter comes from `timing`."""
        return bindparam("now", type_=BigInteger())

    def timing(self) -> dict[str, int]:
        """Return the parameters of `now`."""
        return {"now": self.micros()}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn to write, where the database does not see to that well."""
        yield

    def micros(self) -> int:
        """Return the time in µs, by the clock that was given, else this machine's."""
        return round((self.clock or time.time)() * 1_000_000)

    @abstractmethod
    def listed(self, name: str, width: int) -> FromClause:
        """Return a list of so many columns of names, to join with; its parameter comes from `listing`."""

    @abstractmethod
    def listing(self, name: str, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        """Return the parameters of the list of that name."""

    @abstractmethod
    def tokens(self, connection: Connection, tables: Tables, count: int, least: int) -> int:
        """Return the first of so many new tokens, each at least `least`."""

    @abstractmethod
    def last_token(self, tables: Tables) -> ColumnElement[int]:
        """Return what stands for the newest token within a statement."""

    @abstractmethod
    def extras(self, tables: Tables) -> list[SchemaItem]:
        """Return what there is to create beside the tables."""

    @abstractmethod
    def is_away(self, error: DBAPIError) -> bool:
        """Whether an error passes: it is over when the server is back, free or writable again."""

    def is_forbidden(self, error: DBAPIError) -> bool:
        """Whether an error says that whoever connected may not do that."""
        return False

    def bound(self, connection: Connection, seconds: float | None = ANSWER) -> None:
        """Bound the time that each answer may take on this connection; None: whoever uses it bounds it."""

    def is_aborted(self, error: DBAPIError) -> bool:
        """Whether an error says that the transaction was undone by an earlier one."""
        return False

    @abstractmethod
    def check(self, connection: Connection) -> list[tuple[str, bool, str, str]]:
        """Return what a person should know: (check, ok, detail, fix) each."""

    @abstractmethod
    def free(self, connection: Connection, names: Sequence[Sequence[str]]) -> list[bool]:
        """Lock messages, or indexes, that nobody has locked, until the transaction ends; say of each whether it was."""
