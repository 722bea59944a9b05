"""Handlers that write to a database while their workers are killed: what they wrote, joined with the records by id.

What handlers wrote is read by a connection of the test's own, which knows nothing of the storage.
"""

from __future__ import annotations

import math
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg

from watch_tasks import points

from ..servers import RedisServer
from .harness import Place, Plan, Producer, Slot, Tally, every_way, settle

STEPS: Final = ("first", "second")

_HANDLERS = """
import random
from contextlib import contextmanager
from sqlalchemy import NullPool, create_engine, text

#: Of a thousand tries of the second handler, how many fail after it wrote.
FAILURES = int(os.environ["FAILURES"])

def write(message, step):
    with connection_of(message) as connection:
        connection.execute(
            text("INSERT INTO effects (id, step, token) VALUES (:id, :step, :token)"),
            {"id": message.id, "step": step, "token": message.token},
        )

@job.handler
def first(message):
    note("begin", message)
    write(message, "first")
    time.sleep(message.data)

@job.handler
def second(message):
    write(message, "second")
    if random.randrange(1000) < FAILURES:
        raise ValueError("now and then")
"""

TRANSACTIONAL: Final = (
    """
job = topic("job", retry=RetryPolicy(max_retries=None, backoff=0.05), transactional=True)
"""
    + _HANDLERS
    + """
@contextmanager
def connection_of(message):
    yield message.connection
"""
)

#: The same handlers, which write by a connection of their own.
PLAIN: Final = (
    """
job = topic("job", retry=RetryPolicy(max_retries=None, backoff=0.05))
"""
    + _HANDLERS
    + """
engine = create_engine(os.environ["EFFECTS"], poolclass=NullPool)

@contextmanager
def connection_of(message):
    with engine.begin() as connection:
        yield connection
"""
)


class Database:
    """The database that has the storage and what the handlers write."""

    def __init__(self, url: str) -> None:
        self.url = url
        with closing(self._connect()) as connection:
            # No key: an effect that happens twice is to be seen.
            connection.execute("CREATE TABLE effects (id TEXT, step TEXT, token BIGINT)")
            if isinstance(connection, sqlite3.Connection):
                connection.execute("PRAGMA journal_mode = WAL")

    def _connect(self) -> Any:
        if self.url.startswith("sqlite"):
            return sqlite3.connect(self.url.removeprefix("sqlite:///"), isolation_level=None, timeout=20)
        return psycopg.connect(self.url, autocommit=True)

    @property
    def sqlalchemy_url(self) -> str:
        return self.url.replace("postgresql://", "postgresql+psycopg://")

    def effects(self) -> Counter[tuple[str, str]]:
        """Return how often each step of each message was written."""
        with closing(self._connect()) as connection:
            found = connection.execute("SELECT id, step, count(*) FROM effects GROUP BY id, step").fetchall()
        return Counter({(id, step): count for id, step, count in found})


@dataclass
class Joined:
    """What the effects and the records of a run come to, side by side."""

    tally: Tally
    records: int = 0
    effects: int = 0
    retries: int = 0
    #: Pairs of message and step that were written more than once; recorded without; written without a record.
    extra: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    unrecorded: list[tuple[str, str]] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return len(self.extra) + len(self.missing) + len(self.unrecorded)

    def __str__(self) -> str:
        return (
            f"{self.records} records, {self.effects} effects, extra={len(self.extra)} missing={len(self.missing)} "
            f"unrecorded={len(self.unrecorded)}, {self.retries} retries; {self.tally}"
        )


def run(
    folder: Path,
    server: RedisServer,
    url: str,
    seed: str,
    *,
    messages: int,
    kills: int,
    topics: str = TRANSACTIONAL,
    pool: str = "prefork",
    failures: int = 150,
    slots: int = 3,
) -> Joined:
    """Kill workers in every way while so many messages, or more, are handled; drain, and join.

    Args:
        folder: for the site.
        server: the broker.
        url: the storage, in which handlers write too.
        seed: of everything that is by chance, but for which tries fail.
        messages: how many, at least.
        kills: how many, at least; with 2 rounds of all ways or more, at every point.
        topics: TRANSACTIONAL or PLAIN.
        pool: of the workers.
        failures: of a thousand tries of the second handler.
        slots: workers at a time.
    """
    database, chance = Database(url), random.Random(seed)
    environment = {"WATCH_STORAGE_BACKEND": url, "EFFECTS": database.sqlalchemy_url, "FAILURES": str(failures)}
    place = Place(folder / "site", server.url, topics, WATCH_LEASE="3", WATCH_RENEW_EVERY="0.5", **environment)
    producer = Producer(place, folder / "sent.jsonl")
    tally = Tally()
    try:
        width = 2 if pool == "prefork" else 4
        at = [Slot(Plan(chance.random(), every_way(pool), n, slots), place, pool, width) for n in range(slots)]
        with producer.flowing(server, 0.02, lambda: chance.choice((0.0, 0.01, 0.05))):
            while (tally.killed < kills or len(producer.sent) < messages) and not tally.complaints:
                for slot in at:
                    slot.turn(tally)
                time.sleep(0.02)
        place.spawn(pool=pool, concurrency=4)
        settle(place, server, producer, tally, 90.0)
        place.end()
        return _join(place, producer, database, tally)
    finally:
        place.close()
        producer.close()


def _join(place: Place, producer: Producer, database: Database, tally: Tally) -> Joined:
    records, effects = place.handled_ids(), database.effects()
    counters = place.storage.counters("job")
    begun = Counter(line["id"] for line in place.lines())
    tally.intents, tally.sent_ok = len(producer.intents), len(producer.sent)
    tally.sent_unknown = tally.intents - tally.sent_ok
    tally.handled, tally.dead = len(records), len(place.dead())
    tally.runs, tally.extra_runs = sum(begun.values()), sum(begun.values()) - len(begun)
    tally.duplicates_skipped = counters.duplicates
    tally.lost = sorted(producer.sent - set(records))
    for id in records:
        told = Counter(event.event for event in place.storage.explain("job", producer.intents[id]))
        tally.fenced += told["fenced"]
    tally.complaints += [f"lost {tally.lost[:10]}"] if tally.lost else []
    tally.complaints += [f"{tally.dead} dead"] if tally.dead else []
    joined = Joined(tally, len(records), sum(effects.values()), counters.retries)
    joined.extra = [pair for pair, count in effects.items() if count > 1]
    joined.missing = [pair for pair in _pairs(records) if pair not in effects]
    joined.unrecorded = [pair for pair in effects if pair[0] not in records]
    return joined


def _pairs(ids: Counter[str]) -> Iterator[tuple[str, str]]:
    return ((id, step) for id in ids for step in STEPS)


def missed_points(joined: Joined) -> set[str]:
    """Return the points, and the ways from outside, at which nobody was killed."""
    reached = {name.partition(":")[0] for name in joined.tally.kills}
    return {*points.POINTS, "main", "child", "group"} - reached


def rounds(pool: str, times: float) -> int:
    """Return how many kills are so many rounds of all ways."""
    return math.ceil(len(every_way(pool)) * times)
