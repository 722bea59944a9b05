"""Dramatiq on Redis, one process."""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from . import BROKER, seen

dramatiq.set_broker(RedisBroker(url=BROKER))


@dramatiq.actor
def noop(number: int) -> None:
    seen()


def send(count: int) -> None:
    for number in range(count):
        noop.send(number)
