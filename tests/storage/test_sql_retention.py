"""What a SQL storage forgets, and what several do to it at once: counters stay exact, and nobody waits in a circle."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from watch_tasks.storage.protocol import Granted, Step
from watch_tasks.storage.sql import SqlStorage, open_url
from watch_tasks.testing import ManualClock
from watch_tasks.testing.storage_values import LEASE, TOPIC, ask, grant, handle, record, settle, unclaimed
from watch_tasks.topics import WEEK

from .test_sql import run_sql


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.integration)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("postgres") if request.param == "postgresql" else f"sqlite:///{tmp_path}/watch.db"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def storage(url: str, clock: ManualClock) -> Iterator[SqlStorage]:
    with open_url(url, clock=clock) as storage:
        yield storage


@pytest.fixture
def rows(url: str) -> Callable[[str], int]:
    return lambda table: int(run_sql(url, f"SELECT count(*) FROM watch_{table}")[0][0])


def test_tend_forgets_all_that_is_over_and_nothing_else(
    storage: SqlStorage, clock: ManualClock, rows: Callable[[str], int]
) -> None:
    for kept in (WEEK, None):
        name = f"of {kept}"
        handle(storage, f"replaced {name}", index=name, retention=kept)
        handle(storage, f"done {name}", index=name, retention=kept)
    storage.commit(unclaimed(Step.DEAD, "listed"))
    storage.commit(unclaimed(Step.DEAD, "removed"))
    storage.dead_remove("removed")
    storage.release("w1", ["crashed"], crashed=True)
    clock.advance(WEEK + 1)

    storage.tend()

    assert [rows(table) for table in ("records", "marks", "states", "letters", "indexes")] == [1, 1, 1, 1, 1]
    assert rows("events") == len(list(storage.explain(TOPIC, "of None"))) > 0
    assert storage.len() == 1
    assert storage.topics() == {TOPIC}


def test_tend_forgets_a_bounded_amount_and_len_knows_the_rest(
    storage: SqlStorage, clock: ManualClock, rows: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("watch_tasks.storage.sql.storage._TENDING", 0.0)
    storage.commit_many(
        [
            unclaimed(Step.HANDLED, f"m{number}", f"order-{number}", topic=("a", "b")[number % 2])
            for number in range(600)
        ]
    )
    storage.put(record("kept", topic="a", at=clock()), retention=None)
    clock.advance(WEEK)
    left = []

    for _ in range(3):
        storage.tend()
        left.append(rows("records"))
        assert (storage.len("a"), storage.len("b")) == (1, 0)

    assert left == [351, 101, 1]


def test_the_holder_of_an_index_is_known_though_its_story_is_over(
    storage: SqlStorage, clock: ManualClock, rows: Callable[[str], int]
) -> None:
    claim = ask(once="index", retention=10.0)
    granted = grant(storage, claim)
    clock.advance(11)
    assert storage.renew("w1", ["m1"], 100.0) == {"m1"}

    storage.tend()

    assert (rows("indexes"), rows("events")) == (1, 0)
    assert not isinstance(storage.claim(ask("m2", once="index")), Granted)
    assert storage.commit(settle(Step.HANDLED, claim, granted))
    assert [event.event for event in storage.explain(TOPIC, "order-1")] == ["busy", "handled"]
    clock.advance(WEEK + 1)
    storage.tend()
    assert (rows("indexes"), rows("events")) == (0, 0)


def test_what_somebody_has_in_hand_is_not_forgotten_meanwhile(storage: SqlStorage, clock: ManualClock) -> None:
    """A story that ends while its next event is on its way goes on, without a gap and without what was over."""
    for _ in range(3):
        storage.commit(unclaimed(Step.DEAD, "m1"))
        claim = ask("m2", retention=5.0)
        grant(storage, claim)
        clock.advance(6 + LEASE)
        storage.tend()

    assert list(storage.explain(TOPIC, "order-1")) == []


def test_many_that_claim_commit_renew_and_tend_at_once_lose_nothing_and_never_wait_in_a_circle(url: str) -> None:
    """The same ids and indexes in every order, with retentions so short that they end under way."""
    ids = [f"m{number}" for number in range(60)]
    accepted: list[str] = []
    errors: list[BaseException] = []
    width, batches = 6, 12
    ready = threading.Barrier(width + 1)

    def work(number: int) -> None:
        chance = random.Random(number)
        with open_url(url) as own:
            ready.wait(30)
            for batch in range(batches):
                picked = chance.sample(ids, 20)
                claims = [
                    ask(f"{id}.{batch % 4}", index=f"i{int(id[1:]) % 25}", worker=f"w{number}", retention=0.5,
                        once=chance.choice(("message", "index")))
                    for id in picked
                ]  # fmt: skip
                answers = own.claim_many(claims)
                own.renew(f"w{number}", picked[::-1] + [claim.id for claim in claims[::-1]], LEASE)
                pairs = [pair for pair in zip(claims, answers, strict=True) if isinstance(pair[1], Granted)]
                chance.shuffle(pairs)
                commits = [settle(Step.HANDLED, claim, answer, retention=0.5) for claim, answer in pairs]  # type: ignore[arg-type]
                for commit, is_accepted in zip(commits, own.commit_many(commits), strict=True):
                    if is_accepted:
                        accepted.append(commit.id)

    def tend() -> None:
        with open_url(url) as own:
            ready.wait(30)
            while not done.is_set():
                own.tend()

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as exc:
            errors.append(exc)

    done = threading.Event()
    with open_url(url) as storage:
        storage.topics()
        with ThreadPoolExecutor(width + 1) as pool:
            tending = pool.submit(guarded, tend)
            working = [pool.submit(guarded, lambda number=number: work(number)) for number in range(width)]  # type: ignore[misc]
            for one in working:
                one.result(120)
            done.set()
            tending.result(20)

        assert errors == []
        assert storage.counters(TOPIC).handled == len(accepted) > 0
        until_over(storage)
        assert storage.len() == 0
        assert run_sql(url, "SELECT sum(records) FROM watch_counters") == [(0,)]
        assert run_sql(url, "SELECT count(*) FROM watch_events") == [(0,)]
    if url.startswith("postgresql"):
        assert run_sql(url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


def until_over(storage: SqlStorage) -> None:
    """Tend until the last short retention has ended and nothing is left of it."""
    for _ in range(500):
        storage.tend()
        with storage._backend.engine.connect() as connection:
            left = connection.exec_driver_sql("SELECT count(*) FROM watch_indexes WHERE expires IS NOT NULL").scalar()
            more = connection.exec_driver_sql("SELECT count(*) FROM watch_records").scalar()
        if not left and not more:
            return
        threading.Event().wait(0.02)
    raise AssertionError("something does not end")
