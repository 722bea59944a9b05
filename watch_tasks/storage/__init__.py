"""Storages, opened by URL. The table of schemes is `_SCHEMES`; others come by the entry point
`watch_tasks.storages`."""

from __future__ import annotations

from ..schemes import open_by_scheme
from .base import Storage
from .urls import normalised, refusal

__all__ = ["Storage", "open_storage"]

#: Scheme → module:function that opens such a URL.
_SCHEMES = {
    "memory": "watch_tasks.storage.memory:open_url",
    "redis": "watch_tasks.storage.redis:open_url",
    "rediss": "watch_tasks.storage.redis:open_url",
    "redis+socket": "watch_tasks.storage.redis:open_url",
    "unix": "watch_tasks.storage.redis:open_url",
    "sentinel": "watch_tasks.storage.redis:open_url",
    "sqlite": "watch_tasks.storage.sql:open_url",
    "postgresql": "watch_tasks.storage.sql:open_url",
}

#: Scheme → the extra that brings its driver, where the package alone does not.
_EXTRAS = {"sqlite": "sql", "postgresql": "sql"}


def open_storage(url: str) -> Storage:
    """Open a storage by URL, like a result backend. It connects at its first use.

    `memory://` · `redis://` and `rediss://` (also Valkey) · `redis+socket:///path` or `unix:///path` ·
    `sentinel://` (several hosts with `;`, and `?master_name=…`) · `sqlite:///file` · `postgresql://`. The last two may
    be written as SQLAlchemy and Celery do: `db+postgresql://`, `postgresql+psycopg2://`, `postgres://`.

    Raises:
        ConfigurationError: no such scheme, one that cannot keep the promises, a driver that is not installed, or the
            URL lacks something.
    """
    storage: Storage = open_by_scheme(
        "storage", normalised(url), _SCHEMES, "watch_tasks.storages", extras=_EXTRAS, refusal=refusal
    )
    return storage
