"""Sixteen that claim one index, or one message, at the same moment, round after round: each round has one winner.

CHAOS_RACES says how many rounds; on SQLite, where each waits for a disk, it is a tenth of that.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from watch_tasks.message import Once
from watch_tasks.storage import open_storage
from watch_tasks.storage.base import Storage
from watch_tasks.storage.memory import MemoryStorage
from watch_tasks.storage.protocol import Claim, Granted, Refusal
from watch_tasks.testing.storage_values import ask

from ..storage.wrong import CheckThenWriteStorage, UnlockedStorage

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(7200)]

ROUNDS = int(os.environ.get("CHAOS_RACES", "10000"))
WIDTH = 16
#: Rounds between two messages to a process.
SHARE = 200

#: Answers of one competitor: for each round its token, or why it was refused.
Answers = list[int | Refusal]


def competitor(url: str, kind: str, once: Once, number: int, start: Any, pipe: Connection) -> None:
    """Claim round after round, each when all others are ready for it too."""
    storage = UnlockedStorage.open(url) if kind == "wrong" else open_storage(url)
    with storage:
        while rounds := pipe.recv():
            try:
                pipe.send([compete(storage, once, number, one, start) for one in rounds])
            except Exception as exc:
                start.abort()
                pipe.send(repr(exc))


def compete(storage: Storage, once: Once, number: int, one: int, start: Any) -> int | Refusal:
    start.wait(120)
    answer = storage.claim(claim_of(once, number, one))
    return answer.token if isinstance(answer, Granted) else answer.why


def claim_of(once: Once, number: int, one: int) -> Claim:
    """Under once="index" each has a message of its own; under once="message" all have the same."""
    id = f"m{one}-{number}" if once == "index" else f"m{one}"
    return ask(id, index=f"order-{one}", once=once, worker=f"w{number}")


@contextmanager
def processes(url: str, once: Once, kind: str) -> Iterator[Callable[[range], list[Answers]]]:
    """Start all competitors; yield what has them run some rounds."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(WIDTH)
    pipes, started = [], []
    for number in range(WIDTH):
        ours, theirs = context.Pipe()
        process = context.Process(target=competitor, args=(url, kind, once, number, start, theirs))
        process.start()
        pipes.append(ours)
        started.append(process)

    def run(rounds: range) -> list[Answers]:
        for pipe in pipes:
            pipe.send(rounds)
        answers = [pipe.recv() for pipe in pipes]
        errors = [answer for answer in answers if isinstance(answer, str)]
        assert not errors, f"not won by anybody: {errors}"
        return answers

    try:
        yield run
    finally:
        for pipe, process in zip(pipes, started, strict=True):
            pipe.send(None)
            process.join(20)
            process.kill()


@contextmanager
def threads(storage: Storage, once: Once) -> Iterator[Callable[[range], list[Answers]]]:
    start = threading.Barrier(WIDTH)
    with ThreadPoolExecutor(WIDTH) as pool:

        def work(number: int, rounds: range) -> Answers:
            return [compete(storage, once, number, one, start) for one in rounds]

        yield lambda rounds: [found.result() for found in [pool.submit(work, n, rounds) for n in range(WIDTH)]]


def race(run: Callable[[range], list[Answers]], rounds: int) -> str:
    """Run so many rounds; return what they came to.

    Raises:
        AssertionError: a round had no winner, or two; or a token was not new.
    """
    begun, winners, seen = time.monotonic(), Counter[int](), set[int]()
    for first in range(0, rounds, SHARE):
        answers = run(range(first, min(first + SHARE, rounds)))
        for one, answered in enumerate(zip(*answers, strict=True), first):
            won = [number for number, answer in enumerate(answered) if not isinstance(answer, Refusal)]
            assert len(won) == 1, f"round {one}: won by {won}"
            token = answered[won[0]]
            assert token not in seen
            seen.add(token)
            assert {answer for answer in answered if answer != token} == {Refusal.BUSY}
            winners[won[0]] += 1
    fewest = min(winners[number] for number in range(WIDTH))
    seconds = time.monotonic() - begun
    return f"rounds={rounds} width={WIDTH} winners={len(winners)} fewest wins={fewest} {seconds:.1f} s"


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "valkey":
            return str(request.getfixturevalue("own_valkey").url)
        case "postgresql":
            return str(request.getfixturevalue("postgres"))
        case _:
            return f"sqlite:///{tmp_path}/watch.db"


@pytest.mark.parametrize("once", ["index", "message"])
@pytest.mark.parametrize("url", ["valkey", "postgresql", "sqlite"], indirect=True)
def test_of_processes_that_claim_at_once_one_wins_each_round(url: str, once: Once) -> None:
    rounds = max(ROUNDS // 10, 1) if url.startswith("sqlite") else ROUNDS
    with processes(url, once, "right") as run:
        print(f"{url.partition(':')[0]} once={once}: {race(run, rounds)}")


@pytest.mark.parametrize("once", ["index", "message"])
def test_of_threads_that_claim_at_once_one_wins_each_round(once: Once) -> None:
    with MemoryStorage() as storage, threads(storage, once) as run:
        print(f"memory once={once}: {race(run, ROUNDS)}")


@pytest.mark.parametrize("once", ["index", "message"])
def test_the_race_shows_a_storage_that_checks_and_then_writes(once: Once) -> None:
    with CheckThenWriteStorage() as storage, threads(storage, once) as run, pytest.raises(AssertionError, match="won"):
        race(run, 200)


@pytest.mark.parametrize("once", ["index", "message"])
@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_the_race_shows_a_transaction_without_locks(url: str, once: Once) -> None:
    with processes(url, once, "wrong") as run, pytest.raises(AssertionError, match="won"):
        race(run, 200)
