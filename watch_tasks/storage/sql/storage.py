"""A storage on SQL: PostgreSQL, or SQLite for the processes of one machine.

Each request is one transaction: lock its messages and indexes, load what is kept of them, let the rules decide, write
back. The rules are those of `rules.py`; the tables are in `tables.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final, TypeVar

from sqlalchemy import Connection, Executable, RowMapping, Table, delete, literal, select, tuple_, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ...errors import (
    ConfigurationError,
    StorageClosedError,
    StorageError,
    StorageUnavailableError,
    TransactionLostError,
)
from ...record import Counters
from ..base import PAGE, Storage, Transaction
from ..kept import Key
from ..protocol import Claim, Commit, Granted, Put, Refused, Replay, Replayed, Settled
from ..rules import Rules
from ..stored import Stored, StoredRecord
from . import migrations
from .backend import Backend
from .kept import SqlKept, micros, seconds
from .statements import COUNTERS, FORGOTTEN
from .transaction import SqlTransaction

__all__ = ["SqlStorage"]

R = TypeVar("R")
T = TypeVar("T")

#: Messages that one transaction takes at most: each holds two locks, of which a server has some thousand.
_MOST: Final = 100
#: A time after all others, in µs.
_FOREVER: Final = 2**62
#: Seconds that the steps of one `tend` take together.
_TENDING: Final = 0.1
#: Seconds within which a broken connection is replaced by another; later, the server is away.
_AT_ONCE: Final = 1.0


class SqlStorage(Storage):
    """Keeps everything in the tables of a database, which every process that opens it shares.

    It connects at its first use, makes its tables in an empty database, may be used by any number of threads, and
    stays usable in a forked child.

    Args:
        backend: the database.
        prefix: of the tables' names; storages under different prefixes know nothing of each other.
    """

    is_transactional: ClassVar[bool] = True
    #: What decides.
    rules: ClassVar[type[Rules]] = Rules

    def __init__(self, backend: Backend, *, prefix: str = "watch_") -> None:
        self._backend = backend
        self._statements = backend.statements(prefix)
        self._tables = self._statements.tables
        # Without the options: a password may be among them.
        self._name = backend.url.set(query={}).render_as_string(hide_password=True)
        self._closed = False
        self._is_ready = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._backend.close()

    # -- the protocol

    def _claim(self, claims: Sequence[Claim]) -> list[Granted | Refused]:
        return self._in_parts(
            claims,
            lambda part: self._step(
                [claim.id for claim in part],
                [(claim.topic, claim.index) for claim in part],
                lambda rules: [rules.claim(claim) for claim in part],
            ),
        )

    def _commit(self, commits: Sequence[Commit]) -> list[bool]:
        return self._in_parts(commits, lambda part: self._step(*_named(part), _settling(part)))

    def _renew(self, worker: str, ids: Sequence[str], lease: float) -> set[str]:
        def renew(connection: Connection, part: Sequence[str]) -> list[str]:
            # Unlocked, a commit meanwhile would write the end of the lease that it had read, or wait in a circle.
            self._backend.lock(connection, part, [])
            asked = {"of": worker, "lease": micros(lease), **self._backend.listing("ids", [(id,) for id in part])}
            return list(connection.execute(self._statements.renew, {**asked, **self._backend.timing()}).scalars())

        return set(self._in_parts(ids, lambda part: self._transact(lambda connection: renew(connection, part))))

    def _release(self, worker: str, ids: Sequence[str], crashed: bool) -> list[int]:
        return self._in_parts(
            ids,
            lambda part: self._step(part, None, lambda rules: [rules.release(worker, id, crashed) for id in part]),
        )

    def _replay(self, replays: Sequence[Replay]) -> list[tuple[Replayed, int]]:
        return self._in_parts(
            replays,
            lambda part: self._step(
                [replay.id for replay in part], None, lambda rules: [rules.replay(replay) for replay in part]
            ),
        )

    # -- handlers' transactions

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        with self._translated(TransactionLostError):
            self._make_ready()
            lent = SqlTransaction(self._backend.engine.connect(), self._backend, self._settle_lent)
        try:
            yield lent
        except BaseException as exc:
            lent.end(exc)
            if lent.is_lost(exc):
                raise TransactionLostError(f"storage `{self._name}`: {type(exc).__name__}: {exc}") from exc
            raise
        lent.end(None)

    def _settle_lent(self, connection: Connection, commit: Commit) -> Settled:
        return self._decide(connection, *_named([commit]), lambda rules: rules.commit(commit))

    def was_accepted(self, commit: Commit) -> bool:
        return self._step(*_named([commit]), lambda rules: rules.was_accepted(commit))

    # -- records

    def _get(self, topic: str, index: str) -> StoredRecord | None:
        rows = self._fetch(self._statements.get, {"of": topic, "named": index})
        return _stored(rows[0]) if rows else None

    def _put(self, puts: Sequence[Put]) -> list[bool]:
        return self._in_parts(
            puts,
            lambda part: self._step(
                [put.id for put in part],
                [(put.topic, put.index) for put in part],
                lambda rules: [rules.put(put) for put in part],
            ),
        )

    def _remove(self, topic: str, indexes: Sequence[str], note: bytes) -> int:
        removed = self._in_parts(
            [(topic, index) for index in indexes],
            lambda part: self._step([], part, lambda rules: [rules.remove(key, note) for key in part]),
        )
        return sum(removed)

    def _scan(self, topic: str, since: float | None, newest_first: bool) -> Iterator[StoredRecord]:
        # What is written meanwhile is left out: by its token where it was claimed after the start, else by its time.
        (newest,) = self._fetch(self._statements.newest, {"of": topic})
        end = newest["at"]
        bounds = {"of": topic, "since": 0 if since is None else micros(since), "until": end, "newest": newest["token"]}
        after = None
        while end is not None:
            page = self._fetch(self._statements.page(newest_first, after), bounds)
            yield from map(_stored, page)
            if len(page) < PAGE:
                return
            after = page[-1]["at"], page[-1]["token"]
            # SQLite finds the start of a page by this bound alone, and would read all that came before.
            bounds["until" if newest_first else "since"] = page[-1]["at"]

    def _len(self, topic: str) -> int:
        (sizes,) = self._fetch(self._statements.sizes, {"of": topic})
        return max(int(sizes["there"]) - int(sizes["over"]), 0)

    # -- dead letters

    def _letters(self, topic: str | None, since: float | None) -> Iterator[Stored]:
        bounds, after = {"since": 0 if since is None else micros(since), "until": _FOREVER}, None
        while True:
            page = self._fetch(self._statements.letters(topic, after), bounds)
            for row in page:
                yield Stored(seconds(row["at"]), row["blob"])
            if len(page) < PAGE:
                return
            after = page[-1]["at"], page[-1]["id"]
            bounds["until"] = page[-1]["at"]

    def _letter(self, id: str) -> Stored | None:
        rows = self._fetch(self._statements.letter, {"of": id})
        return Stored(seconds(rows[0]["at"]), rows[0]["blob"]) if rows else None

    def _drop_letter(self, id: str, topic: str, index: str | None, note: bytes) -> bool:
        key = (topic, index) if index is not None else None
        return self._step([id], [key] if key else [], lambda rules: rules.drop_letter(id, key, note))

    # -- what happened

    def _story(self, topic: str, index: str) -> Iterator[tuple[float, str, bytes]]:
        for row in reversed(self._fetch(self._statements.story, {"of": topic, "named": index})):
            yield seconds(row["at"]), row["kind"], row["note"]

    def _counters(self, topic: str) -> Counters:
        (counts,) = self._fetch(self._statements.counts, {"of": topic})
        return Counters(**{name: int(count) for name, count in counts.items()})

    def _topics(self) -> set[str]:
        return {row["topic"] for row in self._fetch(self._statements.topics, {}) if row["topic"]}

    # -- life

    def tend(self) -> None:
        """Forget rows whose time is over, some hundred in a step, for at most a tenth of a second."""
        end = time.monotonic() + _TENDING
        for table in self._tables.ending:
            while self._transact(lambda connection: self._forget(connection, table)):  # noqa: B023
                if time.monotonic() > end:
                    return

    def _forget(self, connection: Connection, table: Table) -> bool:
        """Forget some rows that are over and that nobody has in hand; return whether there may be more."""
        is_over = table.c.expires <= literal(
            connection.execute(self._statements.now, self._backend.timing()).scalar_one()
        )
        is_by_index = table in (self._tables.records, self._tables.indexes)
        names = [table.c.topic, table.c.index] if is_by_index else [table.c.id]
        found = connection.execute(select(*names).where(is_over).order_by(table.c.expires).limit(FORGOTTEN)).all()
        free = self._backend.free(connection, found) if found else []
        rows = [tuple(row) for row, is_free in zip(found, free, strict=True) if is_free]
        gone = [tuple_(*names).in_(rows) if is_by_index else table.c.id.in_([id for (id,) in rows]), is_over]
        if rows and table is self._tables.indexes:
            events = self._tables.events
            connection.execute(delete(events).where(events.c.number.in_(select(table.c.number).where(*gone))))
            # Who holds an index is told by its row, story or not.
            connection.execute(update(table).where(*gone, table.c.holder.is_not(None)).values(events=0, expires=None))
            connection.execute(delete(table).where(*gone))
        elif rows and is_by_index:
            topics = connection.execute(delete(table).where(*gone).returning(table.c.topic)).scalars()
            for topic, count in sorted(Counter(topics).items()):
                nothing = dict.fromkeys(COUNTERS, 0)
                connection.execute(self._statements.count, {**nothing, "topic": topic, "slot": 0, "records": -count})
        elif rows:
            connection.execute(delete(table).where(*gone))
        return len(found) == FORGOTTEN

    def check(self) -> list[tuple[str, bool, str, str]]:
        """Return whether the database is new enough, and keeps what it acknowledged."""
        with self._translated():
            return self._connected(self._backend.check)

    def migrations(self) -> list[str]:
        """Return the statements that `migrate` would run; none: the tables are those of this release."""
        with self._translated():
            return self._connected(lambda connection: migrations.pending(connection, self._backend, self._tables))

    def migrate(self) -> list[str]:
        """Bring the tables to this release's version, and return the statements that were run. Twice is safe."""
        with self._translated():
            return self._connected(self._migrate, commits=True)

    # -- the seam to SQLAlchemy

    def _in_parts(self, items: Sequence[T], step: Callable[[Sequence[T]], list[R]]) -> list[R]:
        return [answer for part in _parts(items) for answer in step(part)]

    def _step(self, ids: Sequence[str], keys: Sequence[Key] | None, decide: Callable[[Rules], R]) -> R:
        """Take one atomic step of the protocol, in a transaction of its own. `keys` None: those of the messages."""
        return self._transact(
            lambda connection: self._decide(
                connection, ids, self._keys_of(connection, ids) if keys is None else keys, decide
            )
        )

    def _decide(
        self, connection: Connection, ids: Sequence[str], keys: Sequence[Key], decide: Callable[[Rules], R]
    ) -> R:
        """Lock, load, decide and write back, within a transaction."""
        now = seconds(self._backend.lock(connection, ids, keys))
        kept = SqlKept(connection, self._tables, self._statements, self._backend, now=now, ids=ids, keys=keys)
        answer = decide(self.rules(kept))
        kept.flush()
        return answer

    def _keys_of(self, connection: Connection, ids: Sequence[str]) -> list[Key]:
        asked = self._backend.listing("ids", [(id,) for id in ids])
        return [(topic, index) for topic, index in connection.execute(self._statements.keys_of, asked)]

    def _transact(self, work: Callable[[Connection], R]) -> R:
        """Do something in a transaction of its own."""
        with self._translated():
            self._make_ready()
            with self._backend.turn():
                return self._connected(work, commits=True)

    def _fetch(self, statement: Executable, asked: Mapping[str, Any]) -> Sequence[RowMapping]:
        """Return what a statement finds."""
        with self._translated():
            self._make_ready()
            asked = {**asked, **self._backend.timing()}
            return self._connected(lambda connection: connection.execute(statement, asked).mappings().all())

    def _connected(self, work: Callable[[Connection], R], *, commits: bool = False) -> R:
        """Do something on a connection; once more, where that is found broken at once: an idle one, by a restart."""
        begun = time.monotonic()
        for tries in (1, 2):
            options = {} if commits else self._backend.reading
            with self._backend.engine.connect().execution_options(**options) as connection:
                try:
                    answer = work(connection)
                except DBAPIError as exc:
                    if tries == 1 and exc.connection_invalidated and time.monotonic() - begun < _AT_ONCE:
                        continue
                    raise
                if commits:
                    connection.commit()
                return answer
        raise AssertionError("not reached: the second try returns or raises")

    def _make_ready(self) -> None:
        if self._is_ready:
            return
        if not self._connected(lambda connection: migrations.is_made(connection, self._tables)):
            try:
                with self._backend.turn():
                    self._connected(self._migrate, commits=True)
            except DBAPIError as exc:
                if self._backend.is_forbidden(exc):
                    raise ConfigurationError(
                        f"the tables of storage `{self._name}` are not there, and its role may not make them: run "
                        "`watch-tasks storage migrate` as their owner, and grant this role their use"
                    ) from exc
                raise
        self._is_ready = True

    def _migrate(self, connection: Connection) -> list[str]:
        return migrations.migrate(connection, self._backend, self._tables)

    @contextmanager
    def _translated(self, away: type[StorageUnavailableError] = StorageUnavailableError) -> Iterator[None]:
        """Turn every error of SQLAlchemy into one of ours; one that passes into `away`."""
        if self._closed:
            raise StorageClosedError(f"{self!r} was closed")
        try:
            yield
        except SQLAlchemyError as exc:
            raise self.translate(exc, away) from exc

    def translate(
        self, error: SQLAlchemyError, away: type[StorageUnavailableError] = StorageUnavailableError
    ) -> StorageError:
        """Return the error of ours that says the same as one of SQLAlchemy's."""
        is_away = isinstance(error, PoolTimeoutError) or (
            isinstance(error, DBAPIError) and self._backend.is_away(error)
        )
        return (away if is_away else StorageError)(self._text(error))

    def _text(self, error: SQLAlchemyError) -> str:
        cause = getattr(error, "orig", None) or error
        return f"storage `{self._name}`: {type(cause).__name__}: {cause}".rstrip()


def _named(commits: Sequence[Commit]) -> tuple[list[str], list[Key]]:
    """Return the ids and the keys that commits concern."""
    keys = [(commit.topic, commit.index) for commit in commits if commit.index is not None]
    return [commit.id for commit in commits], keys


def _settling(commits: Sequence[Commit]) -> Callable[[Rules], list[bool]]:
    return lambda rules: [rules.commit(commit) is not Settled.REFUSED for commit in commits]


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Cut what is too much for one transaction; usually it is one part."""
    for start in range(0, len(items), _MOST):
        yield items[start : start + _MOST]


def _stored(row: RowMapping) -> StoredRecord:
    return StoredRecord(
        topic=row["topic"],
        index=row["index"],
        id=row["id"],
        digest=row["digest"],
        at=seconds(row["at"]),
        expires=None if row["expires"] is None else seconds(row["expires"]),
        blob=row["blob"],
    )
