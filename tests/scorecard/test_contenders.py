"""Who is measured: each with its own transport, and nothing of ours in the others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from watch_tasks.scorecard.contenders import ALL, BROKER

PROGRAM = """
from watch_tasks.scorecard.contenders.{module} import app
with app.connection_for_write() as connection:
    print(connection.get_transport_cls().__module__, app.conf.worker_consumer)
"""


@pytest.mark.parametrize(
    ("module", "transport", "consumer"),
    [
        ("watch", "watch_tasks.transport.redis", "watch_tasks.worker.consumer:WatchConsumer"),
        ("stock", "kombu.transport.redis", "celery.worker.consumer:Consumer"),
    ],
)
def test_each_has_its_own_transport(module: str, transport: str, consumer: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(module=module)],
        env={**os.environ, BROKER: "redis://127.0.0.1:1/0"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.stdout.split() == [transport, consumer], done.stderr


def test_workers_are_alike() -> None:
    ours, _, stock, _ = ALL

    assert [word.replace(ours.path, "") for word in ours.worker("a", 3)] == [
        word.replace(stock.path, "") for word in stock.worker("a", 3)
    ]
