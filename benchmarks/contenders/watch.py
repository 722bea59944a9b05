"""The whole watch layer: each message is claimed, handled under its claim, recorded, then acked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from celery import Celery

from watch_tasks import Message, Topic, topic
from watch_tasks.worker import install

from ..works import WORKS
from . import BROKER

app = install(Celery("watch", broker=BROKER))
# Celery's default, and that of the stock contender; this package's own default is to feed Flower's live view.
app.conf.update(worker_send_task_events=False)


def define(name: str, work: Callable[..., None]) -> Topic[list[Any]]:
    made: Topic[list[Any]] = topic(name)

    @made.handler
    def handle(message: Message[list[Any]]) -> None:
        work(*message.data)

    return made


topics = {name: define(name, work) for name, work in WORKS.items()}


def send(work: str, bodies: Iterable[list[Any]]) -> None:
    one = topics[work]
    for body in bodies:
        one.send(body)


def send_many(work: str, bodies: Iterable[list[Any]]) -> None:
    count = 0

    def counted() -> Iterable[list[Any]]:
        nonlocal count
        for body in bodies:
            count += 1
            yield body

    report = topics[work].send_many(counted())
    if report.sent != count:
        raise RuntimeError(f"of {count} messages: {report}")
