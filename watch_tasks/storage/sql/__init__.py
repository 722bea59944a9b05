"""The SQL storage, opened by URL. Needs the extra `sql`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ...errors import ConfigurationError
from .backend import ANSWER, Backend
from .postgres import Postgres
from .sqlite import Sqlite
from .storage import SqlStorage

__all__ = ["SqlStorage", "open_url"]

_PREFIX = re.compile(r"[a-z_][a-z0-9_]{0,20}")


def open_url(url: str, *, clock: Callable[[], float] | None = None) -> SqlStorage:
    """Open `postgresql://user:password@host:port/database` or `sqlite:///file`. `?prefix=` names the tables.

    Args:
        url: PostgreSQL's other options are the driver's. SQLite has one, `timeout`: seconds to wait for other writers.
        clock: seconds since the epoch, for tests; None: the backend's own clock.

    Raises:
        ConfigurationError: the URL cannot be read, or names no file.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter: a port that is no number
        raise ConfigurationError(
            "the storage's URL cannot be read: expected postgresql://… or sqlite:///file"
        ) from None
    options = dict(parsed.query)
    prefix = str(options.pop("prefix", "watch_"))
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(f"option `prefix` must be up to 21 of a-z, 0-9 and `_`, got {prefix!r}")
    backend: Backend
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ConfigurationError(f"`{url}` names no file: expected sqlite:///folder/file.db, or memory://")
        backend = Sqlite(parsed.set(query={}), clock, timeout=_timeout(options))
    else:
        backend = Postgres(parsed.set(drivername="postgresql+psycopg", query=options), clock)
    return SqlStorage(backend, prefix=prefix)


def _timeout(options: dict[str, Any]) -> float:
    """Return the only option that SQLite has; others would be ignored, or take away what makes a claim atomic."""
    timeout = options.pop("timeout", ANSWER)
    if options:
        raise ConfigurationError(f"sqlite:// knows the options `prefix` and `timeout`, got {', '.join(options)}")
    try:
        return float(timeout)
    except (TypeError, ValueError):
        raise ConfigurationError(f"option `timeout` must be seconds, got {timeout!r}") from None
