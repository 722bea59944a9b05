"""Celery without this package: kombu's own Redis transport, with what Celery offers against losses, and no record."""

from __future__ import annotations

from celery import Celery

from ..ledger import work
from ..sender import main
from . import broker_url

app = Celery("stock", broker=broker_url())
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)


def handle(number: int, seconds: float) -> None:
    """Do the work of one message."""
    work(number, seconds)


task = app.task(name="score")(handle)


def send(number: int, seconds: float) -> None:
    """Send one."""
    task.delay(number, seconds)


if __name__ == "__main__":
    main(send)
