"""Fixtures that every test may use: a clean environment, and real servers that each test finds empty."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from watch_tasks.registry import registry

from .postgres import PostgresHome, PostgresServer, find_postgres
from .rabbit import RabbitServer, find_rabbit
from .servers import RedisServer, find_redis, in_ci

pytest_plugins = ["watch_tasks.testing.plugin"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with those that start workers: last and side by side, the longest file would run alone."""
    items.sort(key=lambda item: item.get_closest_marker("worker") is None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many schedules the model of storage ran: here, as of several processes only the first writes."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for report in reports:
        histories = dict(report.user_properties).get("histories") if report.when == "call" else None
        if histories is not None:
            terminalreporter.write_line(f"{report.nodeid}: {histories} histories in {report.duration:.1f} s")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests reaches them, and no topic of one test the next."""
    for name in os.environ:
        if name.startswith(("WATCH_", "CELERY_", "FLOWER_", "PG")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WATCH_DIR", str(tmp_path / "watch"))
    monkeypatch.setattr(registry, "_topics", {})
    monkeypatch.setattr(registry, "_subscribers", [])


@pytest.fixture(scope="session")
def _valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("valkey")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    binary = find_redis()
    if binary is None:
        message = "no redis-server on this machine (Debian: apt-get install redis-server)"
        if in_ci():
            pytest.fail(message)
        pytest.skip(message)
    server = RedisServer(tmp_path_factory.mktemp("redis"), binary).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _postgres_home() -> Iterator[PostgresHome]:
    home = PostgresHome(find_postgres())
    yield home
    home.close()


@pytest.fixture(scope="session")
def _postgres(_postgres_home: PostgresHome) -> Iterator[PostgresServer]:
    # Killed processes lose nothing by it, and no test here cuts the power.
    server = _postgres_home.server(fsync="off").start()
    yield server
    server.stop()


@pytest.fixture
def valkey(_valkey: RedisServer) -> RedisServer:
    """A running Valkey, empty. Do not stop it: other tests share it."""
    with _valkey.client() as client:
        client.flushall()
    return _valkey


@pytest.fixture
def redis_server(_redis: RedisServer) -> RedisServer:
    """A running Redis, empty; skipped where there is none, failed in CI. Do not stop it."""
    with _redis.client() as client:
        client.flushall()
    return _redis


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[RedisServer]:
    """A running Valkey of the test's own, to stop, freeze and start again."""
    server = RedisServer(tmp_path / "valkey").start()
    yield server
    server.stop()


@pytest.fixture
def lasting_valkey(tmp_path: Path) -> Iterator[RedisServer]:
    """As `own_valkey`, to kill as well: it keeps all that it answered for."""
    server = RedisServer.lasting(tmp_path / "lasting").start()
    yield server
    server.stop()


#: Each test has a name for its database.
_databases = count()


@pytest.fixture
def postgres(_postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty database, on a PostgreSQL that other tests share."""
    name = f"test{next(_databases)}"
    yield _postgres.create_database(name)
    _postgres.drop_database(name)


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A running RabbitMQ, with what other tests left in it. Do not stop it: it takes long to start, and is shared."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbit"), find_rabbit())
    try:
        yield server.start()
    finally:
        server.stop(SIGKILL)


@pytest.fixture
def own_postgres(_postgres_home: PostgresHome) -> Iterator[PostgresServer]:
    """A running PostgreSQL of the test's own, to stop, freeze and start again."""
    server = _postgres_home.server().start()
    yield server
    server.remove()
