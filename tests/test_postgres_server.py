"""The PostgreSQL that other tests run on: what it must do before they can rely on it."""

from __future__ import annotations

import select
from contextlib import closing
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import psutil
import psycopg
import pytest

from .postgres import PostgresServer

pytestmark = pytest.mark.integration


def test_it_answers(postgres: str) -> None:
    with psycopg.connect(postgres) as client:
        version = client.info.server_version

    assert version >= 180000


@pytest.mark.parametrize("_round", range(2))
def test_each_test_finds_an_empty_database(postgres: str, _round: int) -> None:
    with psycopg.connect(postgres) as client:
        client.execute("CREATE TABLE left_over ()")
        tables = client.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()

    assert tables == [("left_over",)]


def test_a_wrong_password_is_refused(postgres: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres, password="wrong")


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGKILL])
def test_data_survives_an_end_and_a_restart(own_postgres: PostgresServer, number: int) -> None:
    url = own_postgres.create_database("kept")
    client = psycopg.connect(url)
    client.execute("CREATE TABLE kept AS SELECT 1 AS value")
    client.commit()
    client.execute("INSERT INTO kept VALUES (2)")

    own_postgres.stop(number)
    own_postgres.start()

    client.close()
    with psycopg.connect(url) as again:
        assert again.execute("SELECT value FROM kept").fetchall() == [(1,)]


def test_a_kill_leaves_no_process(own_postgres: PostgresServer) -> None:
    assert own_postgres.process is not None
    children = psutil.Process(own_postgres.process.pid).children(recursive=True)

    own_postgres.stop(SIGKILL)

    assert children
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_frozen_one_accepts_nobody_until_it_goes_on(own_postgres: PostgresServer) -> None:
    own_postgres.signal(SIGSTOP)

    with pytest.raises(psycopg.errors.ConnectionTimeout):
        psycopg.connect(own_postgres.url, connect_timeout=2)
    own_postgres.signal(SIGCONT)

    with own_postgres.client() as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_a_frozen_one_answers_no_open_connection_until_it_goes_on(own_postgres: PostgresServer) -> None:
    with closing(own_postgres.client()) as client:
        own_postgres.signal(SIGSTOP)
        client.pgconn.send_query(b"SELECT 1")
        client.pgconn.flush()
        early, _, _ = select.select([client], [], [], 0.5)
        own_postgres.signal(SIGCONT)
        late, _, _ = select.select([client], [], [], 20)

    assert not early
    assert late


def test_a_frozen_one_can_be_ended(own_postgres: PostgresServer) -> None:
    own_postgres.signal(SIGSTOP)

    own_postgres.stop()

    with pytest.raises(psycopg.OperationalError, match="refused"):
        own_postgres.client()
