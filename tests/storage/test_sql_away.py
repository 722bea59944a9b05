"""The SQL storage when its database is away, locked, full or refuses: bounded waits, and errors of ours."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import psycopg
import pytest
from psycopg import errors
from sqlalchemy import exc

from tests.postgres import PostgresServer
from watch_tasks.errors import StorageError, StorageUnavailableError, TransactionLostError
from watch_tasks.record import Counters
from watch_tasks.storage.base import Storage
from watch_tasks.storage.protocol import Step
from watch_tasks.storage.sql import SqlStorage, open_url
from watch_tasks.testing.storage_values import LEASE, TOPIC, ask, grant, handle, settle, unclaimed

from .test_sql import run_sql


def _verbs(storage: Storage) -> list[Callable[[], object]]:
    claim = ask("m2", index="order-2")
    return [
        lambda: storage.claim(claim),
        lambda: storage.get(TOPIC, "order-1"),
        lambda: storage.commit(unclaimed(Step.DEAD, "m3")),
        lambda: storage.renew("w1", ["m1"], LEASE),
        storage.len,
        storage.tend,
    ]


# -- servers that are away


@pytest.mark.integration
def test_everything_survives_a_killed_server_and_the_next_verb_works(own_postgres: PostgresServer) -> None:
    with open_url(own_postgres.url) as storage:
        done = handle(storage, "done", index="done")
        running = ask("running", index="running")
        held = grant(storage, running)
        storage.commit(unclaimed(Step.DEAD, "dead"))

        own_postgres.stop(SIGKILL)
        begun = time.monotonic()
        for verb in _verbs(storage):
            with pytest.raises(StorageUnavailableError):
                verb()
        assert time.monotonic() - begun < 5
        own_postgres.start()

        assert storage.commit(settle(Step.HANDLED, running, held))
        assert storage.get(TOPIC, "done")
        assert storage.dead_get("dead")
        assert storage.counters(TOPIC) == Counters(handled=2, dead=1)
        assert grant(storage, ask("next")).token > max(done.token, held.token)


@pytest.mark.integration
def test_connections_that_a_restart_broke_are_replaced_unseen(own_postgres: PostgresServer) -> None:
    with open_url(own_postgres.url) as storage:
        handle(storage)
        threads = [threading.Thread(target=storage.len) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        own_postgres.stop()
        own_postgres.start()

        assert grant(storage, ask("m2"))
        assert storage.len() == 1


@pytest.mark.integration
def test_a_frozen_server_is_unavailable_after_the_timeout(own_postgres: PostgresServer) -> None:
    with open_url(own_postgres.url) as storage:
        handle(storage)
        own_postgres.signal(SIGSTOP)
        try:
            for verb in (lambda: storage.claim(ask("m2", index="order-2")), storage.len):
                begun = time.monotonic()
                with pytest.raises(StorageUnavailableError):
                    verb()
                assert time.monotonic() - begun < 6.5
        finally:
            own_postgres.signal(SIGCONT)

        assert storage.get(TOPIC, "order-1")
        assert grant(storage, ask("m2", index="order-2"))


@pytest.mark.integration
def test_a_server_that_may_not_write_is_unavailable_until_it_may(own_postgres: PostgresServer) -> None:
    with open_url(own_postgres.url) as storage, own_postgres.client() as client:
        claim = ask()
        granted = grant(storage, claim)
        client.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        client.execute("SELECT pg_reload_conf()")
        _until(lambda: run_sql(own_postgres.url, "SHOW default_transaction_read_only") == [("on",)])
        storage._backend.engine.dispose()

        for step in (Step.HANDLED, Step.DEAD):
            with pytest.raises(StorageUnavailableError, match="read-only"):
                storage.commit(settle(step, claim, granted))
        assert storage.get(TOPIC, "order-1") is None
        assert storage.dead_get("m1") is None

        client.execute("SET default_transaction_read_only = off")
        client.execute("ALTER SYSTEM RESET default_transaction_read_only")
        client.execute("SELECT pg_reload_conf()")
        _until(lambda: run_sql(own_postgres.url, "SHOW default_transaction_read_only") == [("off",)])
        storage._backend.engine.dispose()
        assert storage.commit(settle(Step.HANDLED, claim, granted))


@pytest.mark.integration
def test_a_server_out_of_connections_is_unavailable(postgres: str) -> None:
    run_sql(postgres, "CREATE ROLE crowd LOGIN PASSWORD 'p4ss' CONNECTION LIMIT 0")
    try:
        theirs = f"postgresql://crowd:p4ss@{postgres.partition('@')[2]}"
        with open_url(theirs) as storage, pytest.raises(StorageUnavailableError, match="too many connections"):
            storage.topics()
    finally:
        run_sql(postgres, "DROP ROLE crowd")


@pytest.mark.integration
def test_a_lock_that_somebody_keeps_makes_unavailable_and_leaves_nobody_waiting(postgres: str) -> None:
    with open_url(postgres) as storage, open_url(postgres) as other:
        grant(storage, ask())
        with other._backend.engine.connect() as holding:
            other._backend.lock(holding, ["m1"], [])
            begun = time.monotonic()

            with pytest.raises(StorageUnavailableError, match="lock timeout"):
                storage.renew("w1", ["m1"], LEASE)

            assert time.monotonic() - begun < 6
            assert run_sql(postgres, "SELECT count(*) FROM pg_locks WHERE NOT granted") == [(0,)]
            stopped = holding.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar_one()
            assert stopped == "10s"
        assert storage.renew("w1", ["m1"], LEASE) == {"m1"}


def test_a_server_that_never_was_is_unavailable() -> None:
    with open_url("postgresql://127.0.0.1:1/none") as storage:
        with pytest.raises(StorageUnavailableError):
            storage.claim(ask())
        with pytest.raises(TransactionLostError), storage.transaction():
            pass


# -- SQLite


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "watch.db"


def test_a_file_that_another_process_keeps_locked_can_be_read_and_is_unavailable_to_write(file: Path) -> None:
    with open_url(f"sqlite:///{file}?timeout=0.2") as storage:
        handle(storage)
        with closing(sqlite3.connect(file, isolation_level=None)) as other, open_url(f"sqlite:///{file}") as late:
            other.execute("BEGIN IMMEDIATE")
            begun = time.monotonic()

            for verb in (lambda: storage.claim(ask("m2")), lambda: storage.commit(unclaimed(Step.DEAD)), storage.tend):
                with pytest.raises(StorageUnavailableError, match="locked"):
                    verb()
            assert storage.get(TOPIC, "order-1")
            assert late.get(TOPIC, "order-1")
            assert time.monotonic() - begun < 4

        assert grant(storage, ask("m2", index="order-2"))


def test_a_full_file_is_unavailable_and_nothing_is_written(file: Path) -> None:
    with open_url(f"sqlite:///{file}") as storage:
        claim = ask()
        granted = grant(storage, claim)
        (pages,) = run_sql(f"sqlite:///{file}", "PRAGMA page_count")[0]
        with storage._backend.engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        with pytest.raises(StorageUnavailableError, match="full"):
            storage.commit(settle(Step.MARK, claim, granted, blob=b"x" * 100_000))

        assert storage.commit(settle(Step.HANDLED, claim, granted))


def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with open_url(f"sqlite:///{tmp_path}/none/watch.db") as storage, pytest.raises(StorageUnavailableError):
        storage.claim(ask())


def test_a_file_that_is_no_database_is_an_error(file: Path) -> None:
    file.write_bytes(b"no database" * 1000)

    with open_url(f"sqlite:///{file}") as storage, pytest.raises(StorageError) as caught:
        storage.claim(ask())

    assert not isinstance(caught.value, StorageUnavailableError)


# -- errors

#: Classes of SQLSTATE of which every code is over when the server is back, free or writable again, and such codes of
#: other classes. https://www.postgresql.org/docs/current/errcodes-appendix.html
_PASSING_CLASSES = {"08", "40", "53", "57", "58"}
_PASSING_CODES = {"25006", "55P03"}
#: All others that psycopg knows. One that is new has to be decided on.
_LASTING_CLASSES = {
    "02", "03", "09", "0A", "0B", "0F", "0L", "0P", "0Z", "10", "20", "21", "22", "23", "24", "25", "26", "27",
    "28", "2B", "2D", "2F", "34", "38", "39", "3B", "3D", "3F", "42", "44", "54", "55", "72", "F0", "HV", "P0", "XX",
}  # fmt: skip
#: Those of psycopg without a code, and whether they mean that the server is away.
_WITHOUT_CODE = {
    "CancellationTimeout": True,
    "ConnectionTimeout": True,
    "DataError": False,
    "DatabaseError": False,
    "Error": False,
    "IntegrityError": False,
    "InterfaceError": False,
    "InternalError": False,
    "NotSupportedError": False,
    "OperationalError": True,
    "PipelineAborted": True,
    "ProgrammingError": False,
}


def _translated(storage: SqlStorage, original: BaseException) -> StorageError:
    wrapped = exc.DBAPIError.instance(
        "SELECT 1",
        {},
        original,
        psycopg.Error if isinstance(original, psycopg.Error) else sqlite3.Error,  # type: ignore[arg-type]
    )
    assert isinstance(wrapped, exc.DBAPIError)
    return storage.translate(wrapped)


def _errors_of_psycopg() -> dict[str, type[psycopg.Error]]:
    return {
        name: error
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, psycopg.Error) and not name.startswith("_")
    }


def test_each_error_of_psycopg_is_decided_on() -> None:
    found = _errors_of_psycopg()

    assert {name for name, error in found.items() if error.sqlstate is None} == _WITHOUT_CODE.keys()
    classes = {error.sqlstate[:2] for error in found.values() if error.sqlstate}
    assert classes == _PASSING_CLASSES | _LASTING_CLASSES


def test_each_error_of_psycopg_becomes_ours() -> None:
    with open_url("postgresql://h/db") as storage:
        for name, error in _errors_of_psycopg().items():
            code = error.sqlstate
            is_away = code in _PASSING_CODES or code[:2] in _PASSING_CLASSES if code else _WITHOUT_CODE[name]
            assert isinstance(_translated(storage, error("said")), StorageUnavailableError) == is_away, name


#: Every primary result code of SQLite that is an error, and whether it passes. https://www.sqlite.org/rescode.html
_SQLITE = {
    "ABORT": False, "AUTH": False, "BUSY": True, "CANTOPEN": True, "CONSTRAINT": False, "CORRUPT": False,
    "EMPTY": False, "ERROR": False, "FORMAT": False, "FULL": True, "INTERNAL": False, "INTERRUPT": True, "IOERR": True,
    "LOCKED": True, "MISMATCH": False, "MISUSE": False, "NOLFS": False, "NOMEM": True, "NOTADB": False,
    "NOTFOUND": False, "PERM": False, "PROTOCOL": True, "RANGE": False, "READONLY": True, "SCHEMA": False,
    "TOOBIG": False,
}  # fmt: skip


def test_each_error_of_sqlite_is_decided_on_and_becomes_ours() -> None:
    codes = {
        name.removeprefix("SQLITE_"): value
        for name, value in vars(sqlite3).items()
        if name.startswith("SQLITE_") and isinstance(value, int)
    }
    assert {codes[name] for name in _SQLITE} == set(range(1, 27))

    with open_url("sqlite:///x.db") as storage:
        for name, passes in _SQLITE.items():
            for value in {codes[name], *(code for one, code in codes.items() if one.startswith(f"{name}_"))}:
                error = sqlite3.OperationalError("said")
                error.sqlite_errorcode = value
                assert isinstance(_translated(storage, error), StorageUnavailableError) == passes, name


def _until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
