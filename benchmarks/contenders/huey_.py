"""Huey on Redis: takes a message off the queue before it runs it, and acks nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from huey import RedisHuey

from ..works import WORKS
from . import BROKER, chunks

huey = RedisHuey("bench", url=BROKER, results=False)

tasks = {name: huey.task(name=name)(work) for name, work in WORKS.items()}


def send(work: str, bodies: Iterable[list[Any]]) -> None:
    task = tasks[work]
    for body in bodies:
        task(*body)


def send_many(work: str, bodies: Iterable[list[Any]]) -> None:
    """Its `map` is for sending many; it sends one by one."""
    task = tasks[work]
    for chunk in chunks(bodies):
        task.map([tuple(body) for body in chunk])
