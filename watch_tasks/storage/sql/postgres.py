"""PostgreSQL by psycopg 3. Messages and indexes are locked by advisory locks: they may have no row yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final, TypeVar

import psycopg
from psycopg import errors
from psycopg.abc import PQGen
from sqlalchemy import (
    BigInteger,
    Connection,
    Engine,
    FromClause,
    bindparam,
    column,
    create_engine,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy import Sequence as NumberSequence
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import SchemaItem
from sqlalchemy.sql import ColumnElement

from ..kept import Key
from .backend import ANSWER, CONNECT, Backend
from .tables import Name, Tables
from .transaction import watch_handlers

__all__ = ["Postgres"]

R = TypeVar("R")

#: How soon either side notices that the other is gone, in seconds. The server's side, because what a worker held locked
#: when its machine vanished would stay locked for hours.
_KEEPALIVES: Final[dict[str, Any]] = {
    "connect_timeout": round(CONNECT),
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_NOTICED: Final = "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"

#: For how long a statement waits for a lock, and a transaction for its next statement.
_WAITING: Final = f"{ANSWER - 1:g}s"
_STOPPED: Final = f"{2 * ANSWER:g}s"

_NOW: Final = "CAST(floor(extract(epoch FROM {}) * 1000000) AS bigint)"
#: In one order everywhere, so that nobody waits in a circle; the time is told when all are held.
#: From here on the transaction waits for nobody longer than the answer may take, and one that stops in the middle, with
#: its worker, ends and frees what it locked. A handler's own statements ran before.
_LOCK: Final = text(
    f"SELECT count(locked), {_NOW.format('clock_timestamp()')} FROM (SELECT pg_advisory_xact_lock(name) AS locked FROM "  # noqa: S608 - constants
    f"(SELECT set_config('lock_timeout', '{_WAITING}', true), "
    f"set_config('idle_in_transaction_session_timeout', '{_STOPPED}', true) OFFSET 0) AS bounds, "
    "unnest(:names) AS name) AS held"
).bindparams(bindparam("names", type_=postgresql.ARRAY(BigInteger())))

_TRY: Final = text("SELECT pg_try_advisory_xact_lock(name) FROM unnest(:names) AS name").bindparams(
    bindparam("names", type_=postgresql.ARRAY(BigInteger()))
)

#: Nothing is locked for it until the commit, as a counter's row would be: only while the sequence moves, because two
#: that moved it at the same instant would both get the same tokens.
_TOKENS: Final = text(
    "WITH held AS MATERIALIZED (SELECT pg_advisory_lock(:lock)), moved AS MATERIALIZED (SELECT setval("
    "CAST(:name AS regclass), greatest(nextval(CAST(:name AS regclass)), :least) + :more) AS token FROM held), "
    "freed AS MATERIALIZED (SELECT token, pg_advisory_unlock(:lock) FROM moved) SELECT token FROM freed"
).bindparams(bindparam("lock", type_=BigInteger()))

#: SQLSTATE classes and codes of what passes: no connection; no resources; stopped; system error; deadlock and the like;
#: lock not available; read-only, after a failover.
_PASSING: Final = frozenset({"08", "53", "57", "58", "40", "55P03", "25006"})


class BoundedConnection(psycopg.Connection[Any]):
    """A connection whose server must answer in time: one that hangs counts as away, and the connection as broken."""

    #: Seconds; None: for ever.
    bound: float | None = ANSWER

    def wait(self, gen: PQGen[R], interval: float = 0.1, timeout: float | None = None) -> R:
        """Wait for an answer, as psycopg does, but no longer than `bound`."""
        try:
            return super().wait(gen, interval, self.bound if timeout is None else timeout)
        except errors._WaitTimeout as exc:
            self.pgconn.finish()
            raise errors.OperationalError(f"no answer within {self.bound or timeout} s") from exc


class Postgres(Backend):
    """A PostgreSQL database, 13 or newer."""

    insert = staticmethod(postgresql.insert)
    reading: ClassVar[dict[str, Any]] = {"isolation_level": "AUTOCOMMIT"}

    def _open(self) -> Engine:
        address = self.url.set(drivername="postgresql", query=self.url.query).render_as_string(hide_password=False)

        options = f"{_NOTICED} {self.url.query.get('options', '')}".strip()

        def connect() -> BoundedConnection:
            return BoundedConnection.connect(address, **{**_KEEPALIVES, "options": options})

        # Only at this level does what is read under the locks show what was committed before they were granted.
        engine = create_engine(
            self.url, creator=connect, isolation_level="READ COMMITTED", max_overflow=-1, pool_timeout=ANSWER
        )
        watch_handlers(engine)
        return engine

    def lock(self, connection: Connection, ids: Iterable[str], keys: Iterable[Key]) -> int:
        names = {_number(id) for id in ids} | {_number(*key) for key in keys}
        _, now = connection.execute(_LOCK, {"names": sorted(names)}).one()
        return int(now) if self.clock is None else self.micros()

    def lock_tables(self, connection: Connection) -> None:
        connection.execute(_LOCK, {"names": [_number("making", "its", "tables")]})

    def now(self) -> ColumnElement[int]:
        # Of the statement: the planner uses no index to compare with what changes while it runs.
        now = literal_column(_NOW.format("statement_timestamp()"), BigInteger())
        return now if self.clock is None else super().now()

    def timing(self) -> dict[str, int]:
        return {} if self.clock is None else super().timing()

    def listed(self, name: str, width: int) -> FromClause:
        lists = [bindparam(f"{name}{place}", type_=postgresql.ARRAY(Name())) for place in range(width)]
        columns = [column(f"of{place}", Name()) for place in range(width)]
        return func.unnest(*lists).table_valued(*columns).render_derived(name=name)

    def listing(self, name: str, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
        return {f"{name}{place}": list(column) for place, column in enumerate(zip(*rows, strict=True))}

    def free(self, connection: Connection, names: Sequence[Sequence[str]]) -> list[bool]:
        # In the caller's order: nobody is waited for.
        return list(connection.execute(_TRY, {"names": [_number(*name) for name in names]}).scalars())

    def tokens(self, connection: Connection, tables: Tables, count: int, least: int) -> int:
        name = f"{tables.prefix}token"
        asked = {"lock": _number("the", "sequence", name), "name": name, "least": least, "more": count - 1}
        try:
            return int(connection.execute(_TOKENS, asked).scalar_one()) - count + 1
        except DBAPIError:
            connection.invalidate()  # where the sequence did not move, this lock would stay
            raise

    def last_token(self, tables: Tables) -> ColumnElement[int]:
        sequence = literal_column("last_value", BigInteger())
        return select(sequence).select_from(text(f"{tables.prefix}token")).scalar_subquery()

    def extras(self, tables: Tables) -> list[SchemaItem]:
        return [NumberSequence(f"{tables.prefix}token")]

    def is_away(self, error: DBAPIError) -> bool:
        state = getattr(error.orig, "sqlstate", None)
        if error.connection_invalidated or state is None:
            return error.connection_invalidated or isinstance(error.orig, psycopg.OperationalError)
        return state[:2] in _PASSING or state in _PASSING

    def is_forbidden(self, error: DBAPIError) -> bool:
        return isinstance(error.orig, errors.InsufficientPrivilege)

    def bound(self, connection: Connection, seconds: float | None = ANSWER) -> None:
        driver = connection.connection.driver_connection
        if isinstance(driver, BoundedConnection):
            driver.bound = seconds

    def is_aborted(self, error: DBAPIError) -> bool:
        return isinstance(error.orig, errors.InFailedSqlTransaction)

    def check(self, connection: Connection) -> list[tuple[str, bool, str, str]]:
        said = {
            name: str(connection.execute(text(f"SHOW {name}")).scalar_one())
            for name in ("server_version_num", "fsync", "synchronous_commit")
        }
        version = int(said["server_version_num"]) // 10_000
        is_kept = said["fsync"] == "on" and said["synchronous_commit"] != "off"
        return [
            ("storage version", version >= 13, f"PostgreSQL {version}", "" if version >= 13 else "use 13 or newer"),
            (
                "storage persistence",
                is_kept,
                f"fsync {said['fsync']}, synchronous_commit {said['synchronous_commit']}",
                "" if is_kept else "set both `on`: a crash of the server forgets what was handled",
            ),
        ]


def _number(*names: str) -> int:
    """Return the number of the advisory lock of a message id, or of a topic and an index.

    64 bits of a hash: two names that share one only wait for each other.
    """
    spelled = "\0".join(f"{len(name)}:{name}" for name in names).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(spelled, digest_size=8, person=b"watch_tasks").digest()
    return int.from_bytes(digest, "big", signed=True)
