"""Dramatiq on Redis: acks when the actor has returned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from ..works import WORKS
from . import BROKER, chunks

broker = RedisBroker(url=BROKER)
dramatiq.set_broker(broker)

actors = {name: dramatiq.actor(work, actor_name=name) for name, work in WORKS.items()}


def send(work: str, bodies: Iterable[list[Any]]) -> None:
    actor = actors[work]
    for body in bodies:
        actor.send(*body)


def send_many(work: str, bodies: Iterable[list[Any]]) -> None:
    """Its groups are for sending many; they send one by one."""
    actor = actors[work]
    for chunk in chunks(bodies):
        dramatiq.group(actor.message(*body) for body in chunk).run()
