"""Taskiq on Redis streams, one process: the broker of Taskiq's that acks."""

from __future__ import annotations

import asyncio

from taskiq import async_shared_broker  # noqa: F401 - what its worker expects to find
from taskiq_redis import RedisStreamBroker

from . import BROKER, seen

broker = RedisStreamBroker(url=BROKER)


@broker.task(task_name="noop")
async def noop(number: int) -> None:
    seen()


def send(count: int) -> None:
    async def run() -> None:
        await broker.startup()
        for start in range(0, count, 100):
            await asyncio.gather(*(noop.kiq(number) for number in range(start, min(start + 100, count))))
        await broker.shutdown()

    asyncio.run(run())
