"""Dead letters replayed by a process that is killed, and by two at once; counted by a ledger outside the system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..servers import RedisServer
from ..workers import Site, until

pytestmark = [pytest.mark.chaos, pytest.mark.worker]

LETTERS = int(os.environ.get("LETTERS", "4000"))
TOPICS = """
job = topic("job", retry=RetryPolicy(max_retries=0))

@job.handler
def work(message):
    if not os.path.exists(os.path.join(os.environ["SITE"], "well")):
        raise ValueError("not yet")
    note("work", message)
"""


@pytest.fixture
def site(tmp_path: Path, valkey: RedisServer) -> Iterator[Site]:
    site = Site(tmp_path / "site", valkey.url, TOPICS)
    yield site
    site.close()


class Replay:
    """The command, by filter, in a process of its own."""

    def __init__(self, site: Site, name: str) -> None:
        self.printed, self.told = site.folder / f"{name}.jsonl", site.folder / f"{name}.log"
        command = ["dead", "replay", "--topic", "job", "--error", "not yet", "--yes", "--json"]
        with self.printed.open("wb") as printed, self.told.open("wb") as told:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "watch_tasks", *command],
                cwd=site.folder,
                env=site.environment,
                stdout=printed,
                stderr=told,
                start_new_session=True,
            )

    def told_of(self) -> int:
        return self.printed.read_bytes().count(b"\n")

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = json.loads(self.told.read_text().splitlines()[-1])
        return counts

    def published(self) -> set[str]:
        lines = map(json.loads, self.printed.read_text().splitlines())
        return {line["id"] for line in lines if line["result"] == "replayed"}


@pytest.fixture
def replay(site: Site) -> Iterator[Callable[[str], Replay]]:
    """Starts the command; what it started ends with the test."""
    started: list[Replay] = []

    def start(name: str) -> Replay:
        started.append(Replay(site, name))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(20)


@pytest.mark.timeout(600)
def test_a_killed_replay_and_two_after_it_have_each_letter_handled_once(
    site: Site, replay: Callable[[str], Replay]
) -> None:
    def dead() -> int:
        return site.storage.counters("job").dead

    site.worker(pool="threads", concurrency=4)
    for number in range(LETTERS):
        site.send("job", number, index=f"job-{number}")
    until(lambda: dead() == LETTERS, "all are dead", 240, site.report)
    site.touch("well")

    first = replay("first")
    until(lambda: first.told_of() > LETTERS // 3, "a third is replayed", 60, site.report)
    was_running = first.process.poll() is None
    first.process.kill()
    first.process.wait(20)
    left = dead()
    started = time.monotonic()
    others = [replay("second"), replay("third")]
    codes = [other.process.wait(200) for other in others]
    seconds = time.monotonic() - started

    until(lambda: site.handled() >= LETTERS, "all are handled", 120, site.report)
    one, other = (other.counts() for other in others)
    print(f"\n{LETTERS} letters, killed with {left} left; then {one} and {other} in {seconds:.1f} s")
    assert was_running
    assert left > 0
    assert codes == [0, 0]
    assert not others[0].published() & others[1].published()
    assert site.calls("index") == {f"job-{number}": 1 for number in range(LETTERS)}
    assert dead() == 0
