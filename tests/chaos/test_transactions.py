"""Workers of a transactional topic killed under load, on both databases: each effect exactly once.

CHAOS_TX_MESSAGES and CHAOS_TX_KILLS say how many, CHAOS_TX_PLAIN how many kills the handlers without transactions get;
CHAOS_SEED repeats a run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ..servers import RedisServer
from .commits import FAULTS, cut_commits
from .harness import seed_of_run
from .transactions import PLAIN, Joined, missed_points, run

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(1800)]

MESSAGES = int(os.environ.get("CHAOS_TX_MESSAGES", "1000"))
KILLS = int(os.environ.get("CHAOS_TX_KILLS", "60"))
PLAIN_KILLS = int(os.environ.get("CHAOS_TX_PLAIN", "30"))


@pytest.fixture(params=["postgresql", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/storage.db"
    return str(request.getfixturevalue("postgres"))


def told(what: str, joined: Joined, began: float) -> None:
    print(f"{what} ({time.monotonic() - began:.0f} s): {joined}", flush=True)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_each_effect_happens_exactly_once(tmp_path: Path, valkey: RedisServer, url: str, pool: str) -> None:
    seed, began = seed_of_run(), time.monotonic()
    joined = run(tmp_path, valkey, url, f"{seed}:{pool}", messages=MESSAGES, kills=KILLS, pool=pool)
    told(f"transactional {url.partition(':')[0]} {pool} seed={seed}", joined, began)

    assert not joined.tally.complaints, joined.tally.complaints[:10]
    assert (joined.extra, joined.missing, joined.unrecorded) == ([], [], [])
    assert joined.effects == 2 * joined.records >= 2 * MESSAGES
    assert joined.retries > 0
    assert KILLS < 60 or pool == "threads" or not missed_points(joined)


def test_without_transactions_the_same_kills_show(tmp_path: Path, valkey: RedisServer, url: str) -> None:
    seed, began = seed_of_run(), time.monotonic()
    joined = run(tmp_path, valkey, url, f"{seed}:plain", messages=MESSAGES, kills=PLAIN_KILLS, topics=PLAIN)
    told(f"plain {url.partition(':')[0]} prefork seed={seed}", joined, began)

    assert not joined.tally.lost
    assert joined.wrong > 0, "this harness would not see an effect too many"


def test_commits_that_are_cut_off_are_settled_right(postgres: str) -> None:
    seed, rounds = seed_of_run(), int(os.environ.get("CHAOS_TX_COMMITS", "1000"))
    cuts = cut_commits(postgres, seed, rounds)
    print(f"COMMIT cut off, seed={seed}: {cuts}")

    assert (cuts.wrong, cuts.records) == ({}, rounds)
    assert cuts.hits.total() == rounds
    assert {name.partition(" of ")[0] for name in cuts.hits} == set(FAULTS)
