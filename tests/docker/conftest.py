"""pytest-celery's nodes in containers: Redis and RabbitMQ from their public images, workers from ours.

They run where they are asked for, by `make docker`: `make test` runs the same promises on processes.
"""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import DockerException
from pytest_celery import (
    CELERY_RABBITMQ_BROKER,
    CELERY_REDIS_BROKER,
    CeleryBackendCluster,
    CeleryTestBroker,
    CeleryTestWorker,
    CeleryWorkerCluster,
    CeleryWorkerContainer,
    RabbitMQContainer,
    RedisContainer,
    RedisTestBackend,
)
from pytest_docker_tools import build, container, fxtr

from ..nodes.suite import CONFIG, RABBITMQ_CONFIG, REDIS_CONFIG, TOPICS, WORKER
from ..servers import in_ci

ROOT = Path(__file__).parents[2]
IMAGE = "watch-tasks"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the containers out of a run that did not ask for them."""
    here = Path(__file__).parent
    asked = "docker" in config.option.markexpr or any("docker" in Path(argument).parts for argument in config.args)
    ours = [item for item in items if here in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.docker)
    if ours and not asked:
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]


@pytest.fixture(scope="session")
def docker_client() -> Any:
    """A client of the container engine; skipped where none answers, failed in CI."""
    client, complaint = _connect()
    if client is None:
        message = f"no container engine answers here: {complaint}"
        if in_ci():
            pytest.fail(message)
        pytest.skip(message)
    yield client
    client.close()


def _connect() -> tuple[Any, str]:
    with warnings.catch_warnings():
        # Its client leaves sockets open that could not connect.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return docker.from_env(), ""
        except DockerException as exc:
            complaint = str(exc)
        gc.collect()
    return None, complaint


celery_base_worker_image = build(path=str(ROOT), tag=IMAGE)


class Broker:
    """What both brokers' containers have in common: they are reached on this machine only, wherever the tests run."""

    protocol: str

    @classmethod
    def ports(cls) -> dict[str, Any]:
        return {cls.protocol: ("127.0.0.1", None)}

    @property
    def host_url(self) -> str:
        self._wait_port(self.protocol)
        host, port = self.get_addr(self.protocol)
        return f"{self.prefix()}{host}:{port}/{self.vhost}"


class Redis(Broker, RedisContainer):
    protocol = "6379/tcp"

    @classmethod
    def image(cls) -> str:
        return "redis:8"

    @classmethod
    def command(cls, *args: str, **options: Any) -> list[str]:
        # Later options win: what was sent has to be there after a restart.
        return super().command("--appendonly", "yes", *args, **options)


class RabbitMQ(Broker, RabbitMQContainer):
    protocol = "5672/tcp"

    @classmethod
    def image(cls) -> str:
        return "rabbitmq:4"

    @property
    def ready_prompt(self) -> str:
        # Of its banner: where its log goes differs from image to image.
        return "completed with"

    def restart(self, timeout: float = 10) -> None:
        # In good order, whatever an image's first process makes of SIGTERM.
        self.exec_run(["rabbitmqctl", "stop_app"])
        super().restart(timeout=timeout)


class Worker(CeleryWorkerContainer):
    @classmethod
    def command(cls, *args: str, **options: Any) -> list[str]:
        return [*WORKER, *args]

    @classmethod
    def initial_env(cls, celery_worker_cluster_config: dict[str, Any], initial: Any = None) -> dict[str, str]:
        broker = celery_worker_cluster_config["celery_broker_cluster_config"]
        storage = celery_worker_cluster_config["celery_backend_cluster_config"] or broker
        return {
            "CELERY_BROKER_URL": broker["urls"][0],
            "WATCH_STORAGE_BACKEND": storage["urls"][0],
        }

    def pause(self) -> None:
        self._container.pause()

    def unpause(self) -> None:
        self._container.unpause()


def _server(kind: type[Redis | RabbitMQ], **options: Any) -> Any:
    return container(
        image=kind.image(),
        ports=kind.ports(),
        environment=kind.initial_env(),
        network="{default_pytest_celery_network.name}",
        wrapper_class=kind,
        init=True,
        timeout=120,
        **options,
    )


default_redis_broker = _server(Redis, command=Redis.command())
default_redis_backend = _server(Redis, command=Redis.command())
default_rabbitmq_broker = _server(RabbitMQ)


@pytest.fixture
def default_worker_container_cls() -> type[Worker]:
    return Worker


@pytest.fixture(params=[CELERY_REDIS_BROKER, CELERY_RABBITMQ_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> CeleryTestBroker:
    return request.getfixturevalue(request.param)


@pytest.fixture
def celery_backend_cluster(request: pytest.FixtureRequest, celery_broker: CeleryTestBroker) -> Any:
    """The storage: Redis is its own, RabbitMQ needs a Redis beside it."""
    if isinstance(celery_broker.container, RedisContainer):
        return None
    backend: RedisTestBackend = request.getfixturevalue("celery_redis_backend")
    return CeleryBackendCluster(backend)


@pytest.fixture
def default_worker_initial_content(celery_broker: CeleryTestBroker) -> dict[str, bytes]:
    """The folder in which the workers start, instead of the image's own."""
    config = CONFIG + (REDIS_CONFIG if isinstance(celery_broker.container, RedisContainer) else RABBITMQ_CONFIG)
    return {"topics_here.py": TOPICS.encode(), "celeryconfig.py": config.encode()}


def _worker() -> Any:
    return container(
        image="{celery_base_worker_image.id}",
        environment=fxtr("default_worker_env"),
        network="{default_pytest_celery_network.name}",
        volumes={"{default_worker_volume.name}": {"bind": "/app", "mode": "ro"}},
        wrapper_class=Worker,
        command=fxtr("default_worker_command"),
        init=True,
        timeout=60,
    )


default_worker_container = _worker()
second_worker_container = _worker()


@pytest.fixture
def celery_worker_cluster(
    celery_worker: CeleryTestWorker, second_worker_container: Worker, default_worker_app: Any
) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(celery_worker, CeleryTestWorker(second_worker_container, default_worker_app))
