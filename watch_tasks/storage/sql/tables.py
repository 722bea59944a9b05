"""The tables of a SQL storage. Times are whole µs since the epoch, NULL where a thing has no end.

| table | one row for each | holds |
|---|---|---|
| `watch_records` | topic and index | the record |
| `watch_states` | message id | what is known of an unfinished or dead message |
| `watch_marks` | message id | done, though no record says so |
| `watch_letters` | message id | the dead letter |
| `watch_indexes` | topic and index | who holds it under once="index", and its story: how many events, until when |
| `watch_events` | index number and place | one event of a story |
| `watch_counters` | topic and slot | parts of sums, so that workers do not wait for each other |
| `watch_meta` | name | the version of these tables; the last token (SQLite; PostgreSQL has a sequence for it) |
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

__all__ = ["SLOTS", "VERSION", "Name", "Tables", "spell"]

#: Of the tables. One more with each change, and a step in `migrations.py`.
VERSION: Final = 1
#: Rows over which the counters of one topic are spread.
SLOTS: Final = 16


class Name(TypeDecorator[str]):
    """A text of any characters, compared byte by byte. PostgreSQL's keeps no NUL, so that is escaped."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(Text(collation="C") if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else spell(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None or "\\" not in value:
            return value
        return "\\".join(part.replace("\\0", "\0") for part in value.split("\\\\"))


def spell(name: str) -> str:
    """Return a name as it is kept."""
    if "\0" not in name and "\\" not in name:
        return name
    return name.replace("\\", "\\\\").replace("\0", "\\0")


#: SQLite numbers rows by itself only where the key is an INTEGER.
_Number = BigInteger().with_variant(Integer(), "sqlite")


class Tables:
    """The tables under one prefix."""

    def __init__(self, prefix: str = "watch_") -> None:
        self.prefix = prefix
        self.metadata = MetaData()
        self.records = self._table(
            "records",
            Column("topic", Name, nullable=False),
            Column("index", Name, nullable=False),
            Column("at", BigInteger, nullable=False),
            Column("expires", BigInteger),
            Column("first_token", BigInteger, nullable=False),
            Column("token", BigInteger, nullable=False),
            Column("id", Name, nullable=False),
            Column("digest", Name, nullable=False),
            Column("blob", LargeBinary, nullable=False),
            PrimaryKeyConstraint("topic", "index"),
        )
        # No two records have one token, so (at, token) is a place in the order of time.
        Index(f"{prefix}records_by_time", self.records.c.topic, self.records.c.at, self.records.c.token)
        self.states = self._table(
            "states",
            Column("id", Name, primary_key=True),
            Column("topic", Name),
            Column("index", Name),
            Column("copy", BigInteger, nullable=False),
            Column("carried", BigInteger, nullable=False),
            Column("status", Text, nullable=False),
            Column("token", BigInteger, nullable=False),
            Column("first_token", BigInteger, nullable=False),
            Column("worker", Name, nullable=False),
            Column("nonce", Name, nullable=False),
            Column("until", BigInteger, nullable=False),
            Column("started", Boolean, nullable=False),
            Column("exclusive", Boolean, nullable=False),
            Column("crashes", Integer, nullable=False),
            Column("progress", LargeBinary),
            Column("expires", BigInteger),
        )
        self.marks = self._table(
            "marks",
            Column("id", Name, primary_key=True),
            Column("token", BigInteger, nullable=False),
            Column("expires", BigInteger),
        )
        self.letters = self._table(
            "letters",
            Column("id", Name, primary_key=True),
            Column("at", BigInteger, nullable=False),
            Column("topic", Name, nullable=False),
            Column("blob", LargeBinary, nullable=False),
        )
        Index(f"{prefix}letters_by_time", self.letters.c.at, self.letters.c.id)
        Index(f"{prefix}letters_of_topic", self.letters.c.topic, self.letters.c.at, self.letters.c.id)
        self.indexes = self._table(
            "indexes",
            Column("number", _Number, Identity(), primary_key=True),
            Column("topic", Name, nullable=False),
            Column("index", Name, nullable=False),
            Column("holder", Name),
            Column("events", Integer, nullable=False),
            Column("expires", BigInteger),
            UniqueConstraint("topic", "index"),
        )
        self.events = self._table(
            "events",
            Column("number", BigInteger, nullable=False),
            Column("place", Integer, nullable=False),
            Column("at", BigInteger, nullable=False),
            Column("kind", Text, nullable=False),
            Column("note", LargeBinary, nullable=False),
            PrimaryKeyConstraint("number", "place"),
        )
        self.counters = self._table(
            "counters",
            Column("topic", Name, nullable=False),
            Column("slot", SmallInteger, nullable=False),
            *(Column(name, BigInteger, nullable=False) for name in ("handled", "duplicates", "retries", "records")),
            PrimaryKeyConstraint("topic", "slot"),
        )
        self.meta = self._table("meta", Column("name", Text, primary_key=True), Column("value", BigInteger))
        #: Those whose rows end by themselves.
        self.ending = (self.records, self.states, self.marks, self.indexes)
        for table in self.ending:
            expires = table.c.expires
            ends = expires.is_not(None)
            Index(f"{table.name}_expire", expires, postgresql_where=ends, sqlite_where=ends)

    def _table(self, name: str, *parts: Any) -> Table:
        # SQLite: the rows lie in the order of the key, which is then not kept twice.
        by_key = name in ("records", "events", "counters")
        return Table(f"{self.prefix}{name}", self.metadata, *parts, sqlite_with_rowid=not by_key)
