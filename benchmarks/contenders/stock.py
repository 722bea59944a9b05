"""Celery with kombu's own Redis transport, acks late, records nothing."""

from __future__ import annotations

from celery import Celery

from . import BROKER, seen

app = Celery("stock", broker=BROKER)
app.conf.update(
    task_acks_late=True, task_ignore_result=True, worker_prefetch_multiplier=50, worker_send_task_events=False
)


@app.task(name="noop")
def noop(number: int) -> None:
    seen()


def send(count: int) -> None:
    with app.producer_or_acquire() as producer, producer.batch(100):
        for number in range(count):
            app.send_task("noop", [number], producer=producer)
