"""Taskiq on Redis streams: the broker of Taskiq's that acks, when the task has returned."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from taskiq import async_shared_broker  # noqa: F401 - what its worker expects to find
from taskiq_redis import RedisStreamBroker

from ..works import ASYNC_WORKS
from . import BROKER, chunks

broker = RedisStreamBroker(url=BROKER)

tasks = {name: broker.task(task_name=name)(work) for name, work in ASYNC_WORKS.items()}


def send(work: str, bodies: Iterable[list[Any]]) -> None:
    async def run() -> None:
        await broker.startup()
        task = tasks[work]
        for body in bodies:
            await task.kiq(*body)
        await broker.shutdown()

    asyncio.run(run())


def send_many(work: str, bodies: Iterable[list[Any]]) -> None:
    """It has nothing for many: ten at a time are under way, over as many connections. More are slower."""

    async def run() -> None:
        await broker.startup()
        task = tasks[work]
        for chunk in chunks(bodies, 10):
            await asyncio.gather(*(task.kiq(*body) for body in chunk))
        await broker.shutdown()

    asyncio.run(run())
