"""URLs of result backends that people have at hand: in our form, or why they name no storage of ours."""

from __future__ import annotations

from typing import Final

__all__ = ["INSTEAD", "SQL", "normalised", "refusal"]

#: How SQLAlchemy and others spell a database of ours → its scheme. What follows a `+` there is a driver.
SQL: Final = {"sqlite": "sqlite", "postgresql": "postgresql", "postgres": "postgresql"}
#: Before that in a URL of Celery's.
_CELERY: Final = ("db+", "database+")

#: What can keep every promise.
INSTEAD: Final = "use redis:// (Redis or Valkey), postgresql:// or sqlite://"

_SQL_OF_OTHERS: Final = "no storage of ours claims there in a single step, so two workers may handle the same message"
_OBJECTS: Final = "it changes one object at a time, so no step claims an index with its message, and has no time order"
_MESSAGES: Final = (
    "results are messages to whoever sent the task: read once, they are gone, and no index can be looked up"
)
_CLUSTER: Final = (
    "a step of ours is one script over keys of many slots, which a cluster refuses; a single server, or several "
    "behind sentinel://, keeps them"
)

#: Result backends of Celery, and of its well-known extensions → the promise that is missing. By their scheme, or the
#: part of it before a `+`. Source: BACKEND_ALIASES in celery/app/backends.py.
_REFUSED: Final = {
    "rpc": _MESSAGES,
    "amqp": _MESSAGES,
    "amqps": _MESSAGES,
    "pyamqp": _MESSAGES,
    "disabled": "it keeps nothing, so nothing is recognised when it comes again",
    "cache": "a cache forgets when its memory runs short, and has no step over several keys",
    "memcached": "it forgets when its memory runs short, and has no step over several keys",
    "memcache": "it forgets when its memory runs short, and has no step over several keys",
    "django-cache": "a cache forgets when its memory runs short, and has no step over several keys",
    "django-db": "its table knows tasks by their id: it has no claims, and no index can be looked up",
    "file": "several processes cannot change its files in one step, and they have no time order",
    "filesystem": "several processes cannot change its files in one step, and they have no time order",
    "db": _SQL_OF_OTHERS,
    "database": _SQL_OF_OTHERS,
    "mysql": _SQL_OF_OTHERS,
    "mariadb": _SQL_OF_OTHERS,
    "oracle": _SQL_OF_OTHERS,
    "mssql": _SQL_OF_OTHERS,
    "mongodb": "its steps are over one document, or need transactions of a replica set that no storage of ours uses",
    "elasticsearch": "it has no step over several documents, and its searches see a record up to a refresh late",
    "cassandra": "its conditional steps end at one partition, so none claims an index with its message",
    "couchdb": "it has no step over several documents, so none claims an index with its message",
    "couchbase": "by default it confirms a record that is in memory only, and a crash may lose what was confirmed",
    "cosmosdbsql": "its steps end at one partition, so none claims an index with its message",
    "arangodb": "spread over a cluster, its steps over several documents are not atomic: two workers may get one",
    "dynamodb": "its items end at 400 KB, below what a payload may have, and it has no time order over its partitions",
    "riak": "it answers before its nodes agree, so two workers may be granted the same message",
    "consul": "its values end at 512 KB, below what a payload may have, and it has no time order",
    "s3": _OBJECTS,
    "gs": _OBJECTS,
    "azureblockblob": _OBJECTS,
    "redis+cluster": _CLUSTER,
    "rediss+cluster": _CLUSTER,
}


def normalised(url: str) -> str:
    """Return the URL of a SQL database as `sqlite://…` or `postgresql://…`, whatever driver it names; others unchanged.

    `db+postgresql://…`, `postgresql+psycopg2://…` and `postgres://…` are one. The driver is ours to choose.
    """
    scheme, separator, rest = url.partition("://")
    dialect = SQL.get(_plain(scheme).partition("+")[0])
    return f"{dialect}{separator}{rest}" if separator and dialect else url


def refusal(scheme: str) -> str | None:
    """Return why a scheme of Celery's names no storage of ours, as a sentence; None where it is none of Celery's."""
    plain = _plain(scheme)
    missing = _REFUSED.get(plain) or _REFUSED.get(plain.partition("+")[0])
    if missing is None and plain != scheme:
        missing = _SQL_OF_OTHERS  # any other of SQLAlchemy's dialects
    return missing and f"storage `{scheme}` cannot keep the promises: {missing}; {INSTEAD}"


def _plain(scheme: str) -> str:
    for prefix in _CELERY:
        scheme = scheme.removeprefix(prefix)
    return scheme
