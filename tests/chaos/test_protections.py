"""A torture that cannot fail proves nothing: with one protection taken away, its test goes red.

The caps of sizes are in `test_fuzz.py`, the rules of the storage in `tests/model/test_mutants.py`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from .harness import TOPICS, Place, TransportPlace, seed_of_run
from .scenarios import MakePlace, frozen_server, frozen_when_busy, kills, late_ack, world

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(3600)]

#: Replaces a part of a script, and ends the worker where there is no such part.
RESCRIPT = """
import hashlib, re
def without(text, pattern, instead):
    text, count = re.subn(pattern, instead, text)
    assert count, f"no {pattern} in the script"
    return text
"""

#: A protection → how the module that a worker loads takes it away.
SPOILT = {
    "late ack": """
from watch_tasks.worker.task import TopicTask
TopicTask.acks_late = False
""",
    "atomic move": """
from watch_tasks.queue import flight
script = flight._fetch
script.text = without(script.text, r"redis.call\\('HSET', HELD.*", "")
script.digest = hashlib.sha1(script.text.encode()).hexdigest()
""",
    "renewal": """
from watch_tasks.leases import LeaseKeeper
from watch_tasks.queue import flight
LeaseKeeper.hold = lambda self, id: None
LeaseKeeper.drop = lambda self, id: None
begin = flight.Flight.__init__
flight.Flight.__init__ = lambda self, *args, **options: begin(self, *args, **{**options, "every": 1e9})
""",
    "first-sweep grace": """
from watch_tasks.queue import flight
script = flight._tend
script.text = without(script.text, r"if NOW > looked .* then", "if false then")
script.digest = hashlib.sha1(script.text.encode()).hexdigest()
""",
    "fencing": """
from watch_tasks.storage import redis as storage
read = storage.read_script
def spoilt(name):
    text = read(name)
    return without(text, r"state.token ~= commit.token or", "") if name == "commit" else text
storage.read_script = spoilt
""",
    # As kombu's own does it: a word about a message is a word about whoever has it.
    "holder check": """
from watch_tasks.queue import flight
fetched, items = flight.Flight.fetched, {}
def remember(self, answer):
    found = fetched(self, answer)
    items.update((item.number, item.raw.rstrip(b" ")) for item in found.items)
    return found
def ack(self, number):
    if self._held.pop(number, self) is not self:
        for key in self._client.scan_iter("watch.held:*"):
            for other, kept in self._client.hgetall(key).items():
                if kept.rstrip(b" ").endswith(items[number]):
                    self._client.hdel(key, other)
flight.Flight.fetched, flight.Flight.ack = remember, ack
""",
}


def spoilt(protection: str) -> MakePlace:
    return partial(Place, topics=RESCRIPT + SPOILT[protection] + TOPICS)


class UnheldPlace(TransportPlace):
    """The transport alone, without the holder check."""

    prelude = TransportPlace.prelude + SPOILT["holder check"]


@pytest.mark.parametrize("protection", ["late ack", "atomic move"])
def test_kills_lose_messages(tmp_path: Path, protection: str) -> None:
    seed = seed_of_run()
    tally = kills(tmp_path, str(seed), 30, "prefork", spoilt(protection))
    print(f"without {protection}, seed={seed}: {tally}")
    assert tally.lost


def test_without_renewal_tasks_run_twice(tmp_path: Path) -> None:
    with world(tmp_path, spoilt("renewal")) as here:
        here.ready(here.place.spawn(concurrency=4), here.place.spawn(pool="threads", concurrency=4))
        for _ in range(4):
            here.producer.send(8.0)
        tally = here.finish()
    print(f"without renewal: {tally}")
    assert tally.extra_runs > 0
    assert tally.complaints


def test_without_the_grace_of_the_first_sweep_a_stall_hands_tasks_out_again(tmp_path: Path) -> None:
    tally = frozen_server(tmp_path, spoilt("first-sweep grace"))
    print(f"without first-sweep grace: {tally}")
    assert tally.duplicates_skipped > 0, "the claims alone keep them from running twice"


def test_without_fencing_a_worker_that_wakes_up_commits(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the first one's commit is refused"):
        frozen_when_busy(tmp_path, "prefork", spoilt("fencing"))


def test_without_the_holder_check_a_late_ack_takes_the_next_ones_message(tmp_path: Path) -> None:
    found = late_ack(tmp_path, UnheldPlace)
    print(f"without holder check: {found.left} left after the late ack, {found.runs} runs")
    assert found.left == 0
    assert found.runs == 2
