"""The command line against a real server, run in this process under an app of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from celery import Celery
from click.testing import CliRunner, Result

from tests.servers import RedisServer
from watch_tasks.cli import group
from watch_tasks.storage import Storage
from watch_tasks.worker import install, storage_of

Run = Callable[..., Result]


@dataclass(frozen=True)
class Order:
    number: int

    def index(self) -> str:
        return f"order-{self.number}"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def app(valkey: RedisServer) -> Iterator[Celery]:
    app = install(Celery("cli", broker=valkey.url, set_as_current=False))
    yield app
    app.close()


@pytest.fixture
def storage(app: Celery) -> Iterator[Storage]:
    with storage_of(app) as storage:
        yield storage


@pytest.fixture
def run(app: Celery, storage: Storage) -> Run:
    return runner(app)


def runner(app: Celery) -> Run:
    """Return what runs a command line as `celery -A app watch …` does."""

    def run(*args: str, input: str | bytes | IO[bytes] | None = None) -> Result:
        return CliRunner().invoke(group, args, input=input, obj=SimpleNamespace(app=app))

    return run


def lines(result: Result) -> list[dict[str, Any]]:
    """Return the JSON lines of stdout."""
    return [json.loads(line) for line in result.stdout.splitlines()]
