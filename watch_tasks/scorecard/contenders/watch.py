"""This package: each message is claimed, handled under its claim, recorded, then acked."""

from __future__ import annotations

from collections.abc import Iterable

from celery import Celery

from watch_tasks import Message, Topic, topic
from watch_tasks.worker import install

from ..ledger import work
from ..sender import main
from . import broker_url

app = install(Celery("watch", broker=broker_url()))
# Nobody watches by Flower here, for any contender.
app.conf.worker_send_task_events = False

score: Topic[list[float]] = topic("score")


@score.handler
def handle(message: Message[list[float]]) -> None:
    """Do the work of one message."""
    number, seconds = message.data
    work(int(number), seconds)


def send(number: int, seconds: float) -> None:
    """Send one."""
    score.send([number, seconds])


def send_many(numbers: Iterable[int], seconds: float) -> None:
    """Send many."""
    report = score.send_many([number, seconds] for number in numbers)
    if report.refused or report.unknown:
        raise RuntimeError(f"not all were sent: {report}")


if __name__ == "__main__":
    main(send, send_many)
