"""Answers to a COMMIT that never arrive: a proxy between a storage and its PostgreSQL cuts connections there."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from sqlalchemy import text

from watch_tasks import Busy, Message, Retry, Snoozed
from watch_tasks.pipeline import Pipeline
from watch_tasks.storage.sql import open_url
from watch_tasks.topics import Topic

from .proxy import Proxy

#: In PostgreSQL's protocol a simple query, as psycopg sends COMMIT.
COMMIT = b"COMMIT\0"
#: What is cut: the answer; the COMMIT; either, and the worker is asked to stop then.
FAULTS = ("answer", "commit", "answer and stop", "commit and stop")


@dataclass
class Cuts:
    """What rounds of cut commits came to."""

    hits: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    records: int = 0
    #: (message, handler) → how often its effect is there, where that is not once.
    wrong: dict[Any, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.records} messages, cut {dict(self.hits)}, outcomes {dict(self.outcomes)}, wrong {self.wrong}"


def cut_commits(url: str, seed: int, rounds: int) -> Cuts:
    """Handle so many messages of two handlers; cut the connection at a COMMIT of one of them, in each of the ways."""
    chance, cuts = random.Random(seed), Cuts()
    parts = urlsplit(url)
    assert parts.port
    with psycopg.connect(url, autocommit=True) as own, Proxy(parts.port).closing() as proxy:
        own.execute("CREATE TABLE effects (id TEXT, step TEXT)")
        through = urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{proxy.port}")))
        with open_url(through) as storage:
            storage.topics()
            for number in range(rounds):
                _round(storage, proxy, cuts, f"m{number}", FAULTS[number % len(FAULTS)], chance)
            cuts.records = storage.len("t")
        found = own.execute("SELECT id, step, count(*) FROM effects GROUP BY id, step").fetchall()
    effects = {(id, step): count for id, step, count in found}
    expected = {(f"m{number}", step) for number in range(rounds) for step in ("h0", "h1")}
    cuts.wrong = {pair: effects.get(pair, 0) for pair in expected | effects.keys() if effects.get(pair, 0) != 1}
    return cuts


def _round(storage: Any, proxy: Proxy, cuts: Cuts, id: str, fault: str, chance: random.Random) -> None:
    at, stops = chance.randrange(2), [False]

    def pipe(worker: str, is_cut: bool) -> Pipeline:
        made: Topic[Any] = Topic("t", transactional=True)
        for number in range(2):

            def handler(message: Message[Any], number: int = number) -> None:
                message.connection.execute(
                    text("INSERT INTO effects VALUES (:id, :step)"), {"id": message.id, "step": f"h{number}"}
                )
                if is_cut and number == at:
                    stops[0] = "stop" in fault
                    proxy.swallow_replies(COMMIT) if "answer" in fault else proxy.swallow_requests(COMMIT)

            made.handler(name=f"h{number}")(handler)
        return Pipeline(storage, {"t": made}.get, worker=worker, stopping=lambda: stops[0], pause=lambda seconds: None)

    before = proxy.hits
    message = Message(0, "t", id=id)
    outcome = pipe("one", True).handle(message)
    proxy.heal()
    cuts.hits[f"{fault} of h{at}"] += proxy.hits - before
    cuts.outcomes[f"{fault}: {type(outcome).__name__}"] += 1
    stops[0] = False
    storage.release("one", [id])
    other = pipe("two", False)
    # What the driver published, and the copy that was delivered first once more: its ack may have been lost.
    if isinstance(outcome, Snoozed | Retry):
        other.handle(outcome.message)
    for _ in range(2):
        assert not isinstance(other.handle(message), Busy | Retry)
