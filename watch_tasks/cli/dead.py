"""`watch-tasks dead`: the dead letters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from ..errors import NotFoundError
from ..record import DeadLetter
from ..schema import dump
from .codes import INTERRUPTED, NOT_FOUND, PARTLY, REFUSED, UNREACHABLE, USAGE, CommandError, Group
from .output import age, clean, count, emit, note, table, to_json, when
from .program import SINCE, TOPIC, Program, confirm, examples, with_program
from .replay import Chosen, Counts, Replayer, Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..storage import Storage

__all__ = ["dead"]

#: Characters of an id in a table, and the fewest that name a letter; `show` and `remove` take them.
SHORT: Final = 8
#: Rows that a table shows where no limit was given.
SHOWN: Final = 100

_FIELDS: Final = (
    "id", "topic", "index", "reason", "error", "handler", "retries", "crashes", "attempts", "data", "raw",
    "content_type", "sent_at", "dead_at",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dead letters a command is about."""

    topic: str | None
    error: str | None
    since: datetime | None

    def __bool__(self) -> bool:
        return any((self.topic, self.error, self.since))

    def letters(self, storage: Storage) -> Iterator[DeadLetter]:
        """Yield those that fit, newest first."""
        wanted = (self.error or "").casefold()
        return (letter for letter in storage.dead(self.topic, since=self.since) if wanted in letter.error.casefold())


def _filtered(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--since", type=SINCE, help="Only those that died since: 2026-01-31T12:00:00Z, or 15m, 2h, 7d ago."
        ),
        click.option("--error", metavar="TEXT", help="Only those whose last error contains this."),
        click.option("--topic", type=TOPIC, help="Only those of one topic."),
    ):
        function = option(function)
    return function


@click.group(cls=Group)
def dead() -> None:
    """See, replay and remove dead letters.

    They are messages that will not be tried again by themselves.
    """


@dead.command(
    "list", epilog=examples("watch-tasks dead list", "watch-tasks dead list --topic alarm --error timeout --since 2h")
)
@_filtered
@click.option("--limit", type=click.IntRange(min=1), help=f"At most so many. Default: {SHOWN}; all with --json.")
@with_program
def list_(program: Program, topic: str | None, error: str | None, since: datetime | None, limit: int | None) -> None:
    """List dead letters, newest first."""
    letters = Filter(topic, error, since).letters(program.storage)
    if program.as_json:
        for letter in islice(letters, limit):
            emit(_fields(letter))
        return
    shown = list(islice(letters, limit or SHOWN))
    _table(shown)
    more = "; there are more, see --limit" if next(letters, None) else ""
    click.echo(f"{count(len(shown), 'dead letter')}{more}")


@dead.command(epilog=examples("watch-tasks dead show 5f0c2a91", "watch-tasks dead show 5f0c2a91 --json"))
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@with_program
def show(program: Program, ids: tuple[str, ...]) -> None:
    """Show dead letters whole.

    Every attempt, and the data or the original bytes.

    An ID may be cut short, to 8 characters at the fewest. Exit code 3: there is no such dead letter.
    """
    for letter in _named(program.storage, ids):
        if program.as_json:
            emit(_fields(letter))
        else:
            _show(letter)


@dead.command(
    epilog=examples(
        "watch-tasks dead remove 5f0c2a91 --yes", "watch-tasks dead remove --topic alarm --since 7d --dry-run"
    )
)
@click.argument("ids", metavar="[ID]...", nargs=-1)
@_filtered
@click.option("--all", "everything", is_flag=True, help="All there are.")
@click.option("--dry-run", is_flag=True, help="List what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_program
def remove(
    program: Program,
    ids: tuple[str, ...],
    topic: str | None,
    error: str | None,
    since: datetime | None,
    everything: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Throw dead letters away for good.

    Those named by ID, or those that fit --topic, --error and --since, or --all.
    """
    wanted = Filter(topic, error, since)
    if sum(map(bool, (ids, wanted, everything))) != 1:
        raise click.UsageError("name what to remove: IDs, or --topic, --error and --since, or --all")
    storage = program.storage
    # Only their ids: a million letters need not fit into memory.
    chosen = [letter.id for letter in (_named(storage, ids) if ids else wanted.letters(storage))]
    if dry_run:
        _list(program, storage, chosen)
        note("dry run: nothing was removed")
        return
    if chosen:
        confirm(f"Remove {count(len(chosen), 'dead letter')} for good?", yes=yes)
    removed = 0
    for id in chosen:
        letter = storage.dead_get(id)
        if letter and storage.dead_remove(id, by="watch-tasks dead remove"):
            removed += 1
            if program.as_json:
                emit(_fields(letter))
    if not program.as_json:
        click.echo(f"{count(removed, 'dead letter')} removed")
    if removed < len(chosen):
        raise CommandError(
            f"{count(len(chosen) - removed, 'dead letter')} was gone already", PARTLY if removed else NOT_FOUND
        )


@dead.command(
    epilog=examples(
        "watch-tasks dead replay 5f0c2a91", "watch-tasks dead replay --topic alarm --error timeout --since 2h --yes"
    )
)
@click.argument("ids", metavar="[ID]...", nargs=-1)
@_filtered
@click.option("--all", "everything", is_flag=True, help="All there are.")
@click.option("--force", is_flag=True, help="Also where a newer message of the same index was handled.")
@click.option("--dry-run", is_flag=True, help="List what would be replayed.")
@click.option("--yes", is_flag=True, help="Do not ask. Those named by ID are replayed without asking.")
@with_program
def replay(
    program: Program,
    ids: tuple[str, ...],
    topic: str | None,
    error: str | None,
    since: datetime | None,
    everything: bool,
    force: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Send dead letters again, under their ids.

    Those named by ID, or those that fit --topic, --error and --since, or --all; the oldest first.

    Retries and crashes count from 0; handlers that had finished are not called again. A letter leaves the list when
    a worker has it. Interrupted, the same command goes on where it ended; beside another one, each letter is handled
    once. With --json, each line is a letter with the fields result, copy and detail. Exit code 4: what is named is
    refused; 5: some was.
    """
    wanted = Filter(topic, error, since)
    if sum(map(bool, (ids, wanted, everything))) != 1:
        raise click.UsageError("name what to replay: IDs, or --topic, --error and --since, or --all")
    storage = program.storage
    # Only their names: a million letters need not fit into memory.
    chosen = [
        Chosen(letter.id, letter.dead_at) for letter in (_named(storage, ids) if ids else wanted.letters(storage))
    ]
    if dry_run:
        _list(program, storage, [id for id, _ in chosen])
        note("dry run: nothing was replayed")
        return
    if chosen and not ids:
        chosen.reverse()  # of one index, the newer message shall be the last to be handled
        confirm(f"Replay {count(len(chosen), 'dead letter')}?", yes=yes, done="replayed")
    replayer = Replayer(program, force=force, tell=lambda *told: _tell(program, *told))
    try:
        replayer.run(chosen)
    except KeyboardInterrupt:
        raise CommandError("interrupted: the same command goes on where this one ended", INTERRUPTED) from None
    finally:
        _sum_up(program, replayer.counts)
    code = _code(replayer.counts, len(chosen), replayer.elsewhere if ids else replayer.counts.gone)
    if code:
        raise click.exceptions.Exit(code)


def _tell(program: Program, letter: DeadLetter, result: Result, copy: int, detail: str) -> None:
    if program.as_json:
        emit({**_fields(letter), "result": result.value, "copy": copy or None, "detail": detail or None})
    elif result is not Result.REPLAYED:
        note(f"{letter.id[:SHORT]} {letter.topic or '-'} {letter.index or '-'} {result.value}: {detail}")


def _sum_up(program: Program, counts: Counts) -> None:
    if program.as_json:
        note(to_json(counts.fields()))
        return
    others = ((counts.refused, "refused"), (counts.gone, "gone already"), (counts.unknown, "unknown: replay again"))
    more = "".join(f", {number} {what}" for number, what in others if number)
    click.echo(f"{count(counts.replayed, 'dead letter')} replayed{more}")


def _code(counts: Counts, chosen: int, elsewhere: int) -> int:
    """Return the exit code. What others replayed meanwhile is as it should be, and so is what a filter finds gone."""
    done = counts.replayed + elsewhere
    if done == chosen:
        return 0
    if done:
        return PARTLY
    if counts.refused:
        return REFUSED
    return UNREACHABLE if counts.unknown else NOT_FOUND


def _named(storage: Storage, ids: tuple[str, ...]) -> list[DeadLetter]:
    return [_find(storage, id) for id in dict.fromkeys(ids)]


def _find(storage: Storage, id: str) -> DeadLetter:
    letter = storage.dead_get(id)
    if letter:
        return letter
    near = [letter for letter in storage.dead() if letter.id.startswith(id)] if len(id) >= SHORT else []
    if len(near) > 1:
        raise CommandError(f"`{id}` begins {len(near)} ids: {', '.join(letter.id for letter in near[:5])}", USAGE)
    if not near:
        short = f" (an id may be cut short, to {SHORT} characters at the fewest)" if len(id) < SHORT else ""
        raise NotFoundError(f"no dead letter `{id}`{short}; see `watch-tasks dead list`")
    return near[0]


def _list(program: Program, storage: Storage, ids: list[str]) -> None:
    letters = [letter for letter in map(storage.dead_get, ids) if letter]
    if program.as_json:
        for letter in letters:
            emit(_fields(letter))
        return
    _table(letters)
    click.echo(count(len(letters), "dead letter"))


def _table(letters: list[DeadLetter]) -> None:
    rows = [
        (
            letter.id[:SHORT],
            letter.topic,
            letter.index,
            letter.reason.value,
            _tries(letter),
            age(letter.dead_at),
            letter.error,
        )
        for letter in letters
    ]
    table(("ID", "TOPIC", "INDEX", "REASON", "TRIES", "AGE", "LAST ERROR"), rows, right=("TRIES", "AGE"))


def _show(letter: DeadLetter) -> None:
    fields = {**_fields(letter), "sent_at": when(letter.sent_at), "dead_at": when(letter.dead_at)}
    for name, value in fields.items():
        if name == "attempts":
            for attempt in letter.attempts:
                said = f"{when(attempt.at)} {attempt.handler or '-'} {attempt.seconds:.3f} s {attempt.error}"
                click.echo(f"{'attempt':<12} {clean(said)}")
            continue
        if name == "data":
            value = dump(value).decode(errors="replace")
        elif isinstance(value, bytes):
            value = repr(value)[2:-1]
        click.echo(f"{name:<12} {clean('-' if value is None else str(value))}")
    click.echo()


def _tries(letter: DeadLetter) -> int:
    return max(len(letter.attempts) + letter.crashes, letter.retries + 1 if letter.attempts else 0)


def _fields(letter: DeadLetter) -> dict[str, Any]:
    fields = msgspec.structs.asdict(letter)
    return {name: fields[name] for name in _FIELDS}
