"""Celery with kombu's own Redis transport, acks late, keeps no results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import Celery

from ..works import WORKS
from . import BROKER

app = Celery("stock", broker=BROKER)
app.conf.update(task_acks_late=True, task_ignore_result=True)

tasks = {name: app.task(name=name)(work) for name, work in WORKS.items()}


def send(work: str, bodies: Iterable[list[Any]]) -> None:
    task = tasks[work]
    for body in bodies:
        task.apply_async(body)


def send_many(work: str, bodies: Iterable[list[Any]]) -> None:
    """Celery's `group` publishes one by one; kombu can pipeline what Celery publishes by one producer."""
    task = tasks[work]
    with app.producer_or_acquire() as producer, producer.batch(100):
        for body in bodies:
            task.apply_async(body, producer=producer)
