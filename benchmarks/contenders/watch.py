"""The whole watch layer: each message is claimed, handled under its claim, recorded, then acked."""

from __future__ import annotations

from celery import Celery

from watch_tasks import Message, topic
from watch_tasks.worker import install

from . import BROKER, seen

app = install(Celery("watch", broker=BROKER))
app.conf.update(worker_prefetch_multiplier=50, worker_send_task_events=False)
noop = topic("noop")


@noop.handler
def handle(message: Message[int]) -> None:
    seen()


def send(count: int) -> None:
    with app.producer_or_acquire() as producer, producer.batch(100):
        for number in range(count):
            app.send_task("watch.noop", [number], producer=producer)
