"""pytest-celery's nodes on processes: only what it would run in containers is replaced."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pytest_celery import CELERY_REDIS_BROKER, CeleryTestBroker, CeleryTestWorker, CeleryWorkerCluster

from ..servers import RedisServer
from .processes import ServerProcess, WorkerProcess
from .suite import CONFIG, REDIS_CONFIG, TOPICS, WORKER


@pytest.fixture
def default_redis_broker(own_valkey: RedisServer) -> ServerProcess:
    return ServerProcess(own_valkey)


@pytest.fixture(params=[CELERY_REDIS_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> CeleryTestBroker:
    return request.getfixturevalue(request.param)


@pytest.fixture
def celery_backend_cluster() -> None:
    """The broker is the storage as well."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "topics_here.py").write_text(TOPICS)
    (tmp_path / "celeryconfig.py").write_text(CONFIG + REDIS_CONFIG)
    return tmp_path


@pytest.fixture
def default_worker_container(folder: Path, celery_broker_cluster_config: dict[str, Any]) -> WorkerProcess:
    return _worker("w1", folder, celery_broker_cluster_config)


@pytest.fixture
def second_worker(
    folder: Path, celery_broker_cluster_config: dict[str, Any], default_worker_app: Celery
) -> Iterator[CeleryTestWorker]:
    worker = CeleryTestWorker(_worker("w2", folder, celery_broker_cluster_config), default_worker_app)
    yield worker
    worker.teardown()


@pytest.fixture
def celery_worker_cluster(celery_worker: CeleryTestWorker, second_worker: CeleryTestWorker) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(celery_worker, second_worker)


def _worker(name: str, folder: Path, broker: dict[str, Any]) -> WorkerProcess:
    environment = {
        **os.environ,
        "CELERY_BROKER_URL": broker["urls"][0],
        "WATCH_DIR": str(folder / "watch"),
        "REMAP_SIGTERM": "SIGQUIT",  # as in the image
        "PYTHONWARNINGS": "ignore",
    }
    return WorkerProcess(name, [sys.executable, "-m", *WORKER, "-n", f"{name}@test"], folder, environment)
