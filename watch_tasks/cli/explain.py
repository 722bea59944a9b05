"""`watch-tasks explain`: the story of an index."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from ..errors import NotFoundError
from ..record import Event
from .codes import Command
from .output import count, emit, table, when
from .program import TOPIC, Program, examples, with_program

__all__ = ["explain"]


@click.command(
    cls=Command,
    epilog=examples("watch-tasks explain alarm web-1:critical", "watch-tasks explain alarm web-1:critical --json"),
)
@click.argument("topic", type=TOPIC)
@click.argument("index")
@with_program
def explain(program: Program, topic: str, index: str) -> None:
    """Tell what happened to INDEX.

    Oldest event first: when it was sent, who tried it, how it ended.

    Exit code 3: nothing is known of it.
    """
    events = list(program.storage.explain(topic, index))
    if not events:
        raise NotFoundError(
            f"topic `{topic}` knows nothing of `{index}`: never received by a worker, or past its retention"
        )
    if program.as_json:
        for event in events:
            emit(msgspec.structs.asdict(event))
        return
    head = ("AT", "EVENT", "ID", "COPY", "RETRIES", "HANDLER", "SECONDS", "WORKER", "DETAIL")
    table(head, [_row(event) for event in events], right=("COPY", "RETRIES", "SECONDS"))
    click.echo(count(len(events), "event"))


def _row(event: Event) -> tuple[Any, ...]:
    detail = "; ".join(filter(None, (event.error, f"by {event.by}" if event.by else None)))
    return (
        when(event.at),
        event.event,
        (event.id or "")[:8],
        event.copy,
        event.retries,
        event.handler,
        event.seconds,
        event.worker,
        detail,
    )
