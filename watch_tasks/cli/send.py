"""`watch-tasks send`: one message, or one for each line of a file."""

from __future__ import annotations

import sys
from typing import IO, TYPE_CHECKING, Any

import click

from ..message import Once, check_index
from .bulk import Route, send_lines
from .codes import FAILED, PARTLY, Command
from .lines import parse
from .output import clean, emit, when
from .program import TOPIC, Program, examples, with_program

if TYPE_CHECKING:
    from ..message import Message

__all__ = ["send"]


@click.command(
    cls=Command,
    epilog=examples(
        """watch-tasks send alarm '{"host": "web-1", "level": "critical"}'""",
        """echo '{"total": 3}' | watch-tasks send orders.created - --index order-17""",
        "watch-tasks send --from events.jsonl --topic-field event --index-field delivery --data-field payload",
        "tail -f app.jsonl | watch-tasks send --from - --topic log",
        "watch-tasks send --from backlog.jsonl --topic log --rate 500",
    ),
)
@click.argument("topic", required=False, type=TOPIC)
@click.argument("data", required=False, metavar="[JSON|-]")
@click.option("--index", help="The business name. Default: what the data or the topic says, else the id.")
@click.option("--once", type=click.Choice(["message", "index", "none"]), help="The message's own once-rule.")
@click.option("--max-retries", type=click.IntRange(min=0), help="The message's own limit.")
@click.option("--delay", type=click.FloatRange(min=0), default=0.0, help="Seconds until it may be handled.")
@click.option("--from", "source", type=click.File("rb"), help="Send each line of a file (-: of stdin), as JSON.")
@click.option("--topic", "to", type=TOPIC, help="With --from: the topic of every line.")
@click.option("--topic-field", metavar="FIELD", help="With --from: the field of a line that names its topic.")
@click.option("--index-field", metavar="FIELD", help="With --from: the field that is the index.")
@click.option("--data-field", metavar="FIELD", help="With --from: the field that is the data. Default: the line.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="With --from: messages a second at most.")
@click.option("--dry-run", is_flag=True, help="With --from: check every line and send none.")
@with_program
def send(
    program: Program,
    topic: str | None,
    data: str | None,
    source: IO[bytes] | None,
    to: str | None,
    topic_field: str | None,
    index_field: str | None,
    data_field: str | None,
    rate: float | None,
    dry_run: bool,
    index: str | None,
    once: Once | None,
    max_retries: int | None,
    delay: float,
) -> None:
    """Send one message, or the lines of a file.

    JSON goes to TOPIC; the lines of a file go to one topic, or to those that they name.

    With --from, a line that cannot be sent is told on stderr as {line,error} and keeps no other line from being sent;
    the last line of stdout counts them. Exit code 5: some lines were bad; 1: all. Lines are sent as they come, many at
    a time where they come fast; at Ctrl-C those that were read are still sent.
    """
    if source is None:
        if to or topic_field or index_field or data_field or rate or dry_run:
            raise click.UsageError(
                "--topic, --topic-field, --index-field, --data-field, --rate and --dry-run need --from"
            )
        if topic is None or data is None:
            raise click.UsageError("expected a topic and its data as JSON (or - to read it from stdin), or --from")
        _send_one(program, topic, data, index, once, max_retries, delay)
        return
    if topic or data or index is not None or delay:
        raise click.UsageError("with --from, lines bring their own data: give no TOPIC, JSON, --index or --delay")
    if (to is None) == (topic_field is None):
        raise click.UsageError("--from needs either --topic or --topic-field")
    route = Route(to, topic_field, index_field, data_field, once, max_retries)
    counts = send_lines(program, source, route, dry_run=dry_run, rate=rate)
    if counts.refused or counts.unknown:
        raise click.exceptions.Exit(PARTLY if counts.sent else FAILED)


def _send_one(
    program: Program,
    name: str,
    data: str,
    index: str | None,
    once: Once | None,
    max_retries: int | None,
    delay: float,
) -> None:
    try:
        plain = parse(sys.stdin.buffer.read() if data == "-" else data)
    except ValueError as exc:
        raise click.UsageError(f"expected the data as JSON, {exc}") from exc
    if index is not None:
        check_index(index)  # an empty one too, which `topic.message` takes for none: a shell variable that is not set
    topic = program.topic(name)
    message: Message[Any] = topic.message(topic.decode(plain), index=index, max_retries=max_retries, once=once)
    program.bind(topic)
    topic.send(message, delay=delay)
    if program.as_json:
        emit({"topic": message.topic, "index": message.index, "id": message.id, "sent_at": message.sent_at})
    else:
        click.echo(clean(f"sent {message.topic} {message.index} as {message.id} at {when(message.sent_at)}"))
