"""`watch-tasks handled`: the records of what was handled."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from typing import IO, Any, Final

import click
import msgspec

from ..errors import NotFoundError
from ..record import Record
from ..schema import dump
from .codes import FAILED, PARTLY, Group
from .moving import export_lines, import_lines
from .output import clean, count, emit, note, table, to_json, when
from .program import SINCE, TOPIC, Program, confirm, examples, with_program

__all__ = ["handled"]

#: Rows that a table shows where no limit was given.
SHOWN: Final = 100

_FIELDS: Final = (
    "topic", "index", "id", "retries", "max_retries", "sent_at", "handled_at", "seconds", "worker", "data",
)  # fmt: skip


@click.group(cls=Group)
def handled() -> None:
    """See, move and forget what was handled."""


@handled.command(
    "list", epilog=examples("watch-tasks handled list alarm --since 15m", "watch-tasks handled list --json")
)
@click.argument("topic", required=False, type=TOPIC)
@click.option("--since", type=SINCE, help="Only what was handled since: 2026-01-31T12:00:00Z, or 15m, 2h, 7d ago.")
@click.option("--limit", type=click.IntRange(min=1), help=f"At most so many. Default: {SHOWN}; all with --json.")
@with_program
def list_(program: Program, topic: str | None, since: datetime | None, limit: int | None) -> None:
    """List records, newest first, of TOPIC or of all topics."""
    records = program.storage.range(topic, since=since)
    if program.as_json:
        for record in islice(records, limit):
            emit(_fields(record))
        return
    shown = list(islice(records, limit or SHOWN))
    rows = [
        (record.topic, record.index, record.retries, record.seconds, record.worker, when(record.handled_at))
        for record in shown
    ]
    table(("TOPIC", "INDEX", "RETRIES", "SECONDS", "WORKER", "HANDLED AT"), rows, right=("RETRIES", "SECONDS"))
    more = "; there are more, see --limit" if next(records, None) else ""
    click.echo(f"{count(len(shown), 'record')}{more}")


@handled.command(epilog=examples("watch-tasks handled get alarm web-1:critical"))
@click.argument("topic", type=TOPIC)
@click.argument("index")
@with_program
def get(program: Program, topic: str, index: str) -> None:
    """Show the record of INDEX. Exit code 3: it was never handled, or is forgotten."""
    record = _record(program, topic, index)
    if program.as_json:
        emit(_fields(record))
        return
    fields = {**_fields(record), "sent_at": when(record.sent_at), "handled_at": when(record.handled_at)}
    for name, value in fields.items():
        text = dump(value).decode(errors="replace") if name == "data" else "-" if value is None else str(value)
        click.echo(f"{name:<12} {clean(text)}")


@handled.command("count", epilog=examples("watch-tasks handled count", "watch-tasks handled count alarm --json"))
@click.argument("topic", required=False, type=TOPIC)
@with_program
def count_(program: Program, topic: str | None) -> None:
    """Count the records of TOPIC, or of all topics."""
    number = program.storage.len(topic)
    if program.as_json:
        emit({"topic": topic, "count": number})
    else:
        click.echo(count(number, "record"))


@handled.command(epilog=examples("watch-tasks handled remove alarm web-1:critical --yes"))
@click.argument("topic", type=TOPIC)
@click.argument("index")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_program
def remove(program: Program, topic: str, index: str, yes: bool) -> None:
    """Forget that INDEX was handled.

    A new message of it counts as the first. Exit code 3: it was not handled.
    """
    record = _record(program, topic, index)
    confirm(f"Forget that `{clean(index)}` of topic `{topic}` was handled?", yes=yes)
    if not program.storage.remove(topic, index, by="watch-tasks handled remove"):
        raise _missing(topic, index)
    if program.as_json:
        emit(_fields(record))
    else:
        click.echo("1 record removed")


@handled.command(epilog=examples("watch-tasks handled clear alarm --yes"))
@click.argument("topic", required=False, type=TOPIC)
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_program
def clear(program: Program, topic: str | None, yes: bool) -> None:
    """Forget everything that was handled, of TOPIC or of all topics. What waits or is dead is left alone."""
    storage = program.storage
    of = f"topic `{topic}`" if topic else "all topics"
    confirm(f"Forget {count(storage.len(topic), 'record')} of {of}?", yes=yes)
    number = storage.clear(topic)
    if program.as_json:
        emit({"topic": topic, "count": number})
    else:
        click.echo(f"{count(number, 'record')} removed")


@handled.command(
    epilog=examples(
        "watch-tasks handled export > records.jsonl",
        "watch-tasks handled export alarm --since 7d | gzip > alarm.jsonl.gz",
    )
)
@click.argument("topic", required=False, type=TOPIC)
@click.option("--since", type=SINCE, help="Only what was handled since: 2026-01-31T12:00:00Z, or 15m, 2h, 7d ago.")
@with_program
def export(program: Program, topic: str | None, since: datetime | None) -> None:
    """Print the records of TOPIC, or of all topics, as JSON lines, oldest first.

    Each line is all of a record, for `watch-tasks handled import`: the fields of `list --json`, and digest and
    expires_at (null: never). The count on stderr says that it is complete.
    """
    exported = export_lines(program.storage.range(topic, since=since, newest_first=False))
    note(to_json({"exported": exported}) if program.as_json else f"{count(exported, 'record')} exported")


@handled.command(
    "import",
    epilog=examples(
        "watch-tasks handled import records.jsonl",
        "watch-tasks handled export | WATCH_STORAGE_BACKEND=postgresql://db/watch watch-tasks handled import",
    ),
)
@click.argument("source", metavar="[FILE|-]", default="-", type=click.File("rb"))
@with_program
def import_(program: Program, source: IO[bytes]) -> None:
    """Keep the records that another storage exported: the JSON lines of FILE, or of stdin.

    Each is kept until its expires_at. Skipped is what is over, and what the storage has a record of that was handled
    then or later: the same file twice is safe, beside workers too.

    Lines of other programs need topic, index, id and handled_at. Without digest that of data is taken, without
    expires_at the topic's retention (a week where no loaded module defines the topic).

    A bad line is told on stderr as {line,error} and keeps no other line from being imported; the last line of stdout
    counts them. Exit code 5: some lines were bad; 1: all.
    """
    counts = import_lines(program, source)
    if counts.refused:
        raise click.exceptions.Exit(PARTLY if counts.imported or counts.skipped else FAILED)


def _record(program: Program, topic: str, index: str) -> Record:
    record = program.storage.get(topic, index)
    if record is None:
        raise _missing(topic, index)
    return record


def _missing(topic: str, index: str) -> NotFoundError:
    return NotFoundError(
        f"topic `{topic}` has no record of `{index}`: never handled, removed, or past its retention; "
        f"`watch-tasks explain {topic} {index}` may tell more"
    )


def _fields(record: Record) -> dict[str, Any]:
    fields = msgspec.structs.asdict(record)
    return {name: fields[name] for name in _FIELDS}
