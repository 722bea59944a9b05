"""Makes the tables of a SQL storage, and changes them from one version to the next."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Sequence, inspect, select
from sqlalchemy.schema import CreateIndex, CreateSequence, CreateTable

from ...errors import ConfigurationError
from .backend import Backend
from .tables import VERSION, Tables

__all__ = ["is_made", "migrate", "pending"]


def is_made(connection: Connection, tables: Tables) -> bool:
    """Return whether the tables are there, and of this release.

    Raises:
        ConfigurationError: they are of another version: only `watch-tasks storage migrate` changes them.
    """
    version = _version(connection, tables)
    if 0 < version < VERSION:
        raise ConfigurationError(
            f"the storage's tables are of version {version}, this release needs {VERSION}: stop its workers, then run "
            "`watch-tasks storage migrate`"
        )
    if version > VERSION:
        raise ConfigurationError(
            f"the storage's tables are of version {version}, this release knows {VERSION}: use the newer watch-tasks"
        )
    return version > 0


def pending(connection: Connection, backend: Backend, tables: Tables) -> list[str]:
    """Return the statements that `migrate` would run."""
    version = _version(connection, tables)
    return [_text(connection, step) for step in _steps(backend, tables, version)]


def migrate(connection: Connection, backend: Backend, tables: Tables) -> list[str]:
    """Bring the tables to this release's version, in the caller's transaction; return the statements that were run."""
    backend.lock_tables(connection)
    steps = _steps(backend, tables, _version(connection, tables))
    done = [_text(connection, step) for step in steps]
    for step in steps:
        connection.execute(step)
    return done


def _version(connection: Connection, tables: Tables) -> int:
    """Return the version of the tables; 0: there are none."""
    if not inspect(connection).has_table(tables.meta.name):
        return 0
    meta = tables.meta
    return int(connection.execute(select(meta.c.value).where(meta.c.name == "version")).scalar_one())


def _steps(backend: Backend, tables: Tables, version: int) -> list[Any]:
    """Return what leads from a version to this one. A release that changes tables adds its steps here."""
    if version > 0:
        return []
    made = tables.metadata.sorted_tables
    return [
        *(CreateTable(table) for table in made),
        *(CreateIndex(index) for table in made for index in sorted(table.indexes, key=lambda index: str(index.name))),
        *(CreateSequence(extra) for extra in backend.extras(tables) if isinstance(extra, Sequence)),
        tables.meta.insert().values(name="version", value=VERSION),
    ]


def _text(connection: Connection, step: Any) -> str:
    compiled = step.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
    return " ".join(str(compiled).split())
