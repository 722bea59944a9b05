"""Transactional handlers in real workers that share a SQLite file, of which one has the only lock for long."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from ..workers import Site, until
from .test_faults import pass_time

pytestmark = pytest.mark.worker

MakeSite = Callable[..., Site]

TOPICS = """
from sqlalchemy import text

paid = topic("paid", transactional=True)

@paid.handler
def pay(message):
    message.connection.execute(text("INSERT INTO effects (id) VALUES (:id)"), {"id": message.id})
    note("wrote", message)
    if message.data == "long":
        wait_for("open")
"""


@pytest.mark.parametrize("pool", [pytest.param("prefork", marks=pytest.mark.chaos), "solo"])
def test_a_handler_that_locks_everybody_out_past_its_lease_is_not_overtaken(
    make_site: MakeSite, tmp_path: Path, pool: str
) -> None:
    """Nobody can renew its lease meanwhile, and nobody can take over either."""
    file = tmp_path / "storage.db"
    with closing(sqlite3.connect(file)) as own:
        own.execute("CREATE TABLE effects (id TEXT)")
    url = f"sqlite:///{file}?timeout=0.5"
    site = make_site(TOPICS, WATCH_LEASE="2", WATCH_RENEW_EVERY="1", WATCH_STORAGE_BACKEND=url)
    workers = [site.worker(pool=pool, concurrency=1) for _ in range(2)]
    site.send("paid", "long", index="a", task_id="a")
    until(lambda: site.calls()["wrote"] == 1, "it has written", report=site.report)

    site.send("paid", "long", index="a", task_id="a")
    others = [site.send("paid", "short") for _ in range(4)]
    pass_time(5)  # more than two leases
    logs = [worker.text() for worker in workers]
    site.touch("open")

    site.until_handled(5)
    until(lambda: site.storage.counters("paid").duplicates == 1, "the other is a duplicate", report=site.report)
    with closing(sqlite3.connect(file)) as own:
        effects = Counter(id for (id,) in own.execute("SELECT id FROM effects"))
    assert effects == dict.fromkeys(["a", *others], 1)
    assert site.calls("id") == effects
    assert site.storage.counters("paid").retries == 0
    assert any("could not renew leases" in log for log in logs), "its lease was not renewed"
    assert any("the storage is away" in log for log in logs), "others could not claim"
