"""A small share of the long runs, in each run of the tests: kills, a frozen worker, a recovery, a killed server."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..servers import RedisServer
from .commits import cut_commits
from .harness import percentile, seed_of_run
from .scenarios import frozen_when_idle, kills, recovery, server_kills
from .transactions import run

pytestmark = pytest.mark.worker


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_kills_at_every_point_and_at_random_lose_nothing(tmp_path: Path, pool: str) -> None:
    tally = kills(tmp_path, str(seed_of_run()), 8, pool)
    print(tally)
    assert not tally.complaints, tally.complaints[:10]


def test_a_worker_frozen_when_idle_takes_nothing_along(tmp_path: Path) -> None:
    tally = frozen_when_idle(tmp_path, 5)
    assert not tally.complaints, tally.complaints[:10]


def test_a_dead_workers_messages_run_again_within_seconds(tmp_path: Path) -> None:
    found = recovery(tmp_path, seed_of_run(), 1, long=12.0)
    assert not found.tally.complaints, found.tally.complaints[:10]
    assert set(found.long_starts) == {1}
    assert percentile(found.seconds, 1.0) <= 15


def test_a_kill_of_the_server_loses_nothing(tmp_path: Path) -> None:
    tally = server_kills(tmp_path, seed_of_run(), 1)
    assert not tally.complaints, tally.complaints[:10]


@pytest.mark.parametrize("database", ["postgres", pytest.param("sqlite", marks=pytest.mark.chaos)])
def test_effects_of_transactional_handlers_happen_exactly_once(
    tmp_path: Path, valkey: RedisServer, request: pytest.FixtureRequest, database: str
) -> None:
    url = request.getfixturevalue("postgres") if database == "postgres" else f"sqlite:///{tmp_path}/storage.db"
    joined = run(tmp_path, valkey, url, str(seed_of_run()), messages=30, kills=1, slots=1)
    print(joined)
    assert not joined.tally.complaints, joined.tally.complaints[:10]
    assert (joined.extra, joined.missing, joined.unrecorded) == ([], [], [])


def test_commits_that_are_cut_off_are_settled_right(postgres: str) -> None:
    cuts = cut_commits(postgres, seed_of_run(), 24)
    assert (cuts.wrong, cuts.records, cuts.hits.total()) == ({}, 24, 24)
