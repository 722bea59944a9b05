"""`watch-tasks topics`: what each topic is, and what its messages came to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import QueueUnavailableError
from ..queue.wire import task_name
from ..topics import Topic
from .codes import Command
from .output import count, emit, table
from .program import Program, examples, with_program

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["topics", "waiting_in"]


@click.command(cls=Command, epilog=examples("watch-tasks topics", "watch-tasks topics -I alerts --json"))
@with_program
def topics(program: Program) -> None:
    """List the topics, their rules and their numbers.

    Topics that no loaded module defines are listed too where the storage knows them. Topics that share a queue show
    the same number of waiting messages.
    """
    known = {topic.name: topic for topic in program.load_topics()}
    program.require_broker_url()
    storage = program.storage
    rows = [_row(program, name, known.get(name)) for name in sorted({*known, *storage.topics()})]
    queues = {row["queue"] for row in rows if row["queue"]}
    waiting = waiting_in(program.app, queues)
    for row in rows:
        row["waiting"] = waiting.get(row["queue"])
    if program.as_json:
        for row in rows:
            emit(row)
        return
    columns = (
        "topic",
        "queue",
        "once",
        "max_retries",
        "timeout",
        "waiting",
        "handled",
        "duplicates",
        "retries",
        "dead",
    )
    right = ("RETRY LIMIT", "TIMEOUT", "WAITING", "HANDLED", "DUPLICATES", "RETRIES", "DEAD")
    head = ["RETRY LIMIT" if column == "max_retries" else column.upper() for column in columns]
    table(
        [*head, "HANDLERS"], [[*map(row.get, columns), ", ".join(row["handlers"] or ())] for row in rows], right=right
    )
    click.echo(count(len(rows), "topic"))


def waiting_in(app: Celery, queues: set[str]) -> dict[str, int]:
    """Return how many messages wait in each queue; those that workers hold are not among them.

    Raises:
        QueueUnavailableError: the broker does not answer.
    """
    from kombu.exceptions import KombuError

    from ..worker.waiting import count_waiting

    with app.connection_for_read() as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=4)
            return {queue: count_waiting(connection, queue) for queue in queues}
        except (*connection.connection_errors, KombuError, OSError) as exc:
            raise QueueUnavailableError(f"the broker {connection.as_uri()} does not answer: {exc}") from exc


def _row(program: Program, name: str, topic: Topic[Any] | None) -> dict[str, Any]:
    counters = program.storage.counters(name)
    return {
        "topic": name,
        "task": task_name(name),
        "queue": (topic.queue or program.app.conf.task_default_queue) if topic else None,
        "once": topic.once if topic else None,
        "max_retries": topic.retry.max_retries if topic else None,
        "timeout": topic.timeout if topic else None,
        "handlers": [handler.name for handler in topic.handlers] if topic else None,
        "waiting": None,
        "handled": counters.handled,
        "duplicates": counters.duplicates,
        "retries": counters.retries,
        "dead": counters.dead,
    }
