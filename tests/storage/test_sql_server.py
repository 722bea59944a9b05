"""How the SQL storage uses its database: processes, clocks, names, options, and the making of its tables."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psycopg
import pytest
from celery import Celery
from psycopg import sql
from sqlalchemy import event

from tests.postgres import PostgresServer
from watch_tasks.errors import ConfigurationError, StorageError, StorageUnavailableError
from watch_tasks.storage import open_storage
from watch_tasks.storage.base import PAGE
from watch_tasks.storage.protocol import Granted, Step
from watch_tasks.storage.sql import SqlStorage, open_url
from watch_tasks.testing.storage_values import LEASE, TOPIC, ask, grant, handle, record, settle
from watch_tasks.worker import storage_of

from ..cli.conftest import app, runner
from .test_sql import run_sql

__all__ = ["app"]  # a fixture


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("postgres") if request.param == "postgresql" else f"sqlite:///{tmp_path}/watch.db"


@pytest.fixture
def storage(url: str) -> Iterator[SqlStorage]:
    """One that goes by the database's clock."""
    with open_url(url) as storage:
        yield storage


# -- processes

_CLAIMING = """
import sys
from watch_tasks.storage import open_storage
from watch_tasks.storage.base import PAGE
from watch_tasks.storage.protocol import Granted
from watch_tasks.testing.storage_values import ask
storage = open_storage(sys.argv[1])
print('ready', flush=True)
sys.stdin.readline()
answers = [storage.claim(ask(f'm{number}', index=f'i{number % 7}', worker=sys.argv[2])) for number in range(100)]
print(*(f'{number}:{answer.token}' for number, answer in enumerate(answers) if isinstance(answer, Granted)))
"""


def test_of_processes_that_make_the_tables_and_claim_each_message_is_granted_to_one(url: str) -> None:
    patient = f"{url}?timeout=60" if url.startswith("sqlite") else url
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CLAIMING, patient, f"w{number}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60) for process in processes]

    assert [error for _, error in ended] == [""] * 3
    granted = [pair.split(":") for output, _ in ended for pair in output.split()]
    assert sorted(int(number) for number, _ in granted) == list(range(100))
    assert len({token for _, token in granted}) == 100


def test_a_storage_stays_usable_on_both_sides_of_a_fork(storage: SqlStorage) -> None:
    grant(storage, ask("parent", index="parent"))

    child = os.fork()
    if not child:
        granted = [isinstance(storage.claim(ask(f"c{one}", index=f"c{one}")), Granted) for one in range(20)]
        os._exit(0 if all(granted) else 1)
    granted = [isinstance(storage.claim(ask(f"p{one}", index=f"p{one}")), Granted) for one in range(20)]
    _, status = os.waitpid(child, 0)

    assert all(granted)
    assert status == 0
    assert storage.renew("w1", ["c0", "c19", "p19", "parent"], LEASE) == {"c0", "c19", "p19", "parent"}


# -- clocks and tokens


@pytest.mark.integration
def test_times_and_tokens_are_the_servers(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.0)
    with psycopg.connect(postgres) as connection, open_url(postgres) as storage:
        (there,) = connection.execute("SELECT extract(epoch FROM clock_timestamp())").fetchone() or ()

        granted = grant(storage, ask())
        storage.commit(settle(Step.HANDLED, ask(), granted))

        assert 0 <= granted.now - float(there) < 30
        assert granted.token == pytest.approx(granted.now * 1_000_000, abs=2)
        record = storage.get(TOPIC, "order-1")
        assert record
        assert record.handled_at.timestamp() >= granted.now


@pytest.mark.integration
def test_tokens_grow_though_the_sequence_was_lost(postgres: str) -> None:
    with open_url(postgres) as storage:
        first = grant(storage, ask())
        run_sql(postgres, "SELECT setval('watch_token', 1)")
        storage.release("w1", ["m1"])

        assert grant(storage, ask()).token > first.token


@pytest.mark.integration
def test_a_sequence_that_is_gone_is_an_error_and_locks_nothing(postgres: str) -> None:
    with open_url(postgres) as storage, open_url(postgres) as other:
        grant(storage, ask())
        run_sql(postgres, "ALTER SEQUENCE watch_token RENAME TO away")
        with pytest.raises(StorageError):
            storage.claim(ask("m2", index="order-2"))
        run_sql(postgres, "ALTER SEQUENCE away RENAME TO watch_token")

        assert grant(other, ask("m2", index="order-2"))
        assert grant(storage, ask("m3", index="order-3"))


# -- round trips


def test_a_batch_takes_no_more_statements_than_a_few(storage: SqlStorage) -> None:
    handle(storage, "known", index="known")
    statements: list[str] = []
    event.listen(
        storage._backend.engine, "before_cursor_execute", lambda *about: statements.append(about[2]), named=False
    )
    claims = [ask(f"m{number}", index=f"order-{number}") for number in range(100)]

    granted = storage.claim_many(claims)
    claiming, statements[:] = len(statements), []
    storage.commit_many([settle(Step.HANDLED, *pair) for pair in zip(claims, granted, strict=True)])  # type: ignore[arg-type]

    assert claiming <= 9
    assert len(statements) <= 9


# -- names and options


def test_a_prefix_keeps_storages_apart(url: str) -> None:
    with open_storage(f"{url}?prefix=a_") as first, open_storage(f"{url}?prefix=b_") as second:
        handle(first)

        assert second.topics() == set()
        assert second.len() == 0
        assert first.len() == 1


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///x.db?prefix=a-b", "`prefix` must be"),
        ("sqlite:///x.db?prefix=A", "`prefix` must be"),
        ("sqlite:///x.db?isolation_level=DEFERRED", "knows the options"),
        ("sqlite:///x.db?timeout=soon", "`timeout` must be seconds"),
        ("sqlite:///x.db?prefix=watch_;DROP", "`prefix` must be"),
        ("sqlite:///x.db?prefix=a&prefix=b", "`prefix` must be"),
        ("postgresql://user:s3cret@h:port/db", "cannot be read"),
        ("postgresql://h/db?prefix=" + "a" * 22, "`prefix` must be"),
    ],
)
def test_a_url_with_a_mistake_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        open_storage(url)

    assert "s3cret" not in str(caught.value)


def test_an_option_that_the_driver_does_not_know_is_an_error_of_ours() -> None:
    with open_storage("postgresql://h/db?sokcet_timeout=1") as storage, pytest.raises(StorageError) as caught:
        storage.topics()

    assert not isinstance(caught.value, StorageUnavailableError)


@pytest.mark.integration
def test_options_reach_the_server(postgres: str) -> None:
    with open_url(f"{postgres}?application_name=ours&options=-c%20work_mem%3D3MB") as storage:
        storage.topics()

        assert run_sql(postgres, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ours'") == [(1,)]
        with storage._backend.engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW work_mem").scalar_one() == "3MB"
            assert connection.exec_driver_sql("SHOW tcp_keepalives_idle").scalar_one() == "10"


def test_errors_and_repr_never_show_the_password() -> None:
    with open_storage("postgresql://user:s3cret@127.0.0.1:1/db?password=s4cret") as storage:
        with pytest.raises(StorageUnavailableError) as caught:
            storage.claim(ask())

        told = f"{caught.value} {caught.value.__cause__} {storage!r}"
        assert "s3cret" not in told
        assert "s4cret" not in told
        assert "user:***@127.0.0.1" in str(caught.value)


# -- check


def test_a_database_fit_for_its_task_is_said_to_be(tmp_path: Path) -> None:
    with open_url(f"sqlite:///{tmp_path}/watch.db") as storage:
        checks = {check: (ok, detail) for check, ok, detail, _ in storage.check()}

    assert checks["storage version"][0]
    assert checks["storage version"][1].startswith("SQLite 3.")
    assert checks["storage persistence"] == (True, "journal_mode wal")


@pytest.mark.integration
def test_a_server_that_forgets_is_told_of(postgres: str) -> None:
    with open_url(f"{postgres}?options=-c%20synchronous_commit%3Doff") as storage:
        checks = {check: (ok, detail, fix) for check, ok, detail, fix in storage.check()}

    assert checks["storage version"][:2] == (True, "PostgreSQL 18")
    ok, detail, fix = checks["storage persistence"]
    assert (ok, detail) == (False, "fsync off, synchronous_commit off")
    assert "set both `on`" in fix


# -- tables


def test_migrate_makes_the_tables_once_and_a_dry_run_makes_none(url: str) -> None:
    with open_url(url) as storage:
        planned = storage.migrations()
        assert storage.migrations() == planned
        assert any(step.startswith("CREATE TABLE watch_records") for step in planned)

        assert storage.migrate() == planned
        assert storage.migrate() == storage.migrations() == []
        handle(storage)
        assert storage.len() == 1


def test_the_command_migrates(url: str, app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCH_STORAGE_BACKEND", url)
    run = runner(app)
    with storage_of(app):
        dry, done, again = [run("storage", "migrate", *options) for options in (["--dry-run"], [], [])]

    assert dry.stdout == done.stdout
    assert "CREATE TABLE watch_meta" in dry.stdout
    assert again.stdout == "nothing to do: the storage is up to date\n"


@pytest.mark.parametrize(
    ("version", "complaint"), [(0.5, "run `watch-tasks storage migrate`"), (99, "use the newer watch-tasks")]
)
def test_tables_of_another_version_are_not_touched(
    url: str, version: float, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_url(url) as storage:
        handle(storage)
    if version < 1:  # there is no older one yet: this release is made the second
        monkeypatch.setattr("watch_tasks.storage.sql.migrations.VERSION", 2)
    else:
        run_sql(url, f"UPDATE watch_meta SET value = {version} WHERE name = 'version'")

    with open_url(url) as storage:
        for verb in (lambda: storage.claim(ask()), lambda: storage.get(TOPIC, "order-1"), storage.tend):
            with pytest.raises(ConfigurationError, match=complaint):
                verb()
        assert storage.migrations() == [] or version < 1


@pytest.mark.integration
def test_a_role_that_may_not_make_tables_is_told_who_may(request: pytest.FixtureRequest, postgres: str) -> None:
    server: PostgresServer = request.getfixturevalue("_postgres")
    run_sql(server.url, "DROP ROLE IF EXISTS app", "CREATE ROLE app LOGIN PASSWORD 'p4ss'")
    name = postgres.rpartition("/")[2]
    theirs = f"postgresql://app:p4ss@127.0.0.1:{server.port}/{name}"
    with open_url(theirs) as storage, open_url(postgres) as owner:
        with pytest.raises(ConfigurationError, match="run `watch-tasks storage migrate` as their owner"):
            storage.claim(ask())

        owner.migrate()
        grants = "GRANT {} ON ALL {} IN SCHEMA public TO app"
        run_sql(postgres, grants.format("SELECT, INSERT, UPDATE, DELETE", "TABLES"), grants.format("ALL", "SEQUENCES"))
        handle(storage)
        storage.tend()

        assert storage.len() == 1
    run_sql(postgres, "DROP OWNED BY app")
    run_sql(server.url, "DROP ROLE app")


@pytest.mark.integration
def test_names_of_tables_are_those_of_the_prefix(postgres: str) -> None:
    with open_url(f"{postgres}?prefix=mine_") as storage:
        handle(storage)

    names = sql.SQL("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").as_string(None)
    assert all(name.startswith("mine_") for (name,) in run_sql(postgres, names))


@pytest.mark.parametrize("newest_first", [True, False])
def test_a_late_page_costs_sqlite_no_more_than_an_early_one(tmp_path: Path, newest_first: bool) -> None:
    with open_url(f"sqlite:///{tmp_path}/watch.db") as storage:
        storage.restore(record(f"order-{number}", id=f"m{number}", at=1e9 + number) for number in range(20 * PAGE))
        steps = [0]

        def step() -> None:
            steps[-1] += 1

        @event.listens_for(storage._backend.engine, "checkout")
        def counted(connection: sqlite3.Connection, *about: object) -> None:
            connection.set_progress_handler(step, 10)

        records = storage.range(TOPIC, newest_first=newest_first)
        while list(islice(records, PAGE)):
            steps.append(0)

    assert len(steps) == 21
    assert max(steps[2:20]) <= 2 * steps[1]
