"""`watch-tasks storage`: the storage itself, not what it remembers."""

from __future__ import annotations

import click

from .codes import Group
from .output import clean, emit, note
from .program import Program, examples, with_program

__all__ = ["storage"]


@click.group(cls=Group)
def storage() -> None:
    """Look after the storage itself."""


@storage.command(epilog=examples("watch-tasks storage migrate --dry-run", "watch-tasks storage migrate"))
@click.option("--dry-run", is_flag=True, help="Print what would be run, and change nothing.")
@with_program
def migrate(program: Program, dry_run: bool) -> None:
    """Bring the tables of the storage to the form that this version needs.

    Nothing else changes them. Storages without tables have nothing to do. Twice is safe. With --json, each line is
    {statement}.
    """
    opened = program.storage
    statements = opened.migrations() if dry_run else opened.migrate()
    if not statements:
        opened.topics()  # a storage that has no form to bring up to date has not been asked anything yet
    for statement in statements:
        if program.as_json:
            emit({"statement": statement})
        else:
            click.echo("\n".join(map(clean, statement.splitlines())))
    if program.as_json:
        return
    if not statements:
        click.echo("nothing to do: the storage is up to date")
    elif dry_run:
        note("dry run: nothing was changed")
