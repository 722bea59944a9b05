"""Packets, and singles in groups, while workers are killed: none is lost, and none has to pay for its neighbour.

CHAOS_PACKETS says how many messages the long run takes, CHAOS_SEED repeats one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL

import kombu.pools
import pytest

from watch_tasks import points
from watch_tasks.testing.plugin import CrashPoints

from ..rabbit import RabbitServer, find_rabbit
from ..servers import RedisServer
from ..worker.packets import members, send_packet
from ..workers import until
from .harness import Place, leftovers, seed_of_run
from .packets import TOPICS, torture_packets

pytestmark = pytest.mark.worker


@pytest.fixture
def place(tmp_path: Path, own_valkey: RedisServer) -> Iterator[Place]:
    place = Place(tmp_path / "site", own_valkey.url, TOPICS, WATCH_MAX_CRASHES="3")
    yield place
    place.close()


def test_packets_survive_kills(place: Place, own_valkey: RedisServer) -> None:
    place.environment |= {"WATCH_LEASE": "2", "WATCH_RENEW_EVERY": "0.5"}
    seed = seed_of_run()
    joined = torture_packets(place, own_valkey, seed, 3000, 3, work=0.002, every=(1.5, 3.0), most=3, timeout=90)
    print(f"seed={seed}: {joined}")
    assert not joined.complaints, joined.complaints
    assert joined.kills


#: So that a worker has many in hand, and its children get them in groups.
GATHERED = "worker_prefetch_multiplier = 50\n"


@pytest.fixture
def roomy(tmp_path: Path, own_valkey: RedisServer) -> Iterator[Place]:
    place = Place(tmp_path / "site", own_valkey.url, TOPICS, GATHERED, WATCH_MAX_CRASHES="3")
    yield place
    place.close()


def test_singles_survive_kills(roomy: Place, own_valkey: RedisServer) -> None:
    roomy.environment |= {"WATCH_LEASE": "2", "WATCH_RENEW_EVERY": "0.5"}
    seed = seed_of_run()
    options = {"work": 0.002, "every": (1.5, 3.0), "most": 3, "timeout": 90, "packed": False}
    joined = torture_packets(roomy, own_valkey, seed, 3000, 3, **options)  # type: ignore[arg-type]
    print(f"seed={seed}: {joined}")
    assert not joined.complaints, joined.complaints
    assert joined.kills


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_many_singles_survive_kills(roomy: Place, own_valkey: RedisServer) -> None:
    seed, count = seed_of_run(), int(os.environ.get("CHAOS_PACKETS", "100000"))
    killers = count // 10_000
    joined = torture_packets(
        roomy, own_valkey, seed, count, killers, work=0.0002, every=(2.0, 5.0), timeout=3000, packed=False
    )
    print(f"singles seed={seed}: {joined}")
    assert not joined.complaints, joined.complaints
    assert joined.kills >= killers


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_many_packets_survive_kills(place: Place, own_valkey: RedisServer) -> None:
    seed, count = seed_of_run(), int(os.environ.get("CHAOS_PACKETS", "100000"))
    killers = count // 10_000
    joined = torture_packets(place, own_valkey, seed, count, killers, work=0.001, every=(2.0, 5.0), timeout=3000)
    print(f"packets seed={seed}: {joined}")
    assert not joined.complaints, joined.complaints
    assert joined.kills >= killers


#: Point → its visit at which it ends its process, in a packet of six: the third member's, or the only one; and which of
#: them are run once more: those that were run, and not recorded.
POINTS = {
    "after_fetch": (1, set[str]()),
    "after_claim": (3, set[str]()),
    "in_handler": (3, {"0", "1"}),
    "after_effect": (3, {"0", "1", "2"}),
    "after_commit": (1, set[str]()),
    "before_ack": (1, set[str]()),
}
STEPS = """
job = topic("job")

@job.handler
def work(message):
    note("work", message)
"""


def test_the_points_are_all() -> None:
    assert POINTS.keys() == set(points.POINTS)


@pytest.mark.parametrize("whole", [pytest.param(False, id="child"), pytest.param(True, id="main")])
@pytest.mark.parametrize(
    "point", [pytest.param(name, marks=[] if name == "after_effect" else pytest.mark.chaos) for name in POINTS]
)
def test_a_process_that_ends_at_a_point_loses_nothing(
    tmp_path: Path, own_valkey: RedisServer, crash_point: CrashPoints, point: str, whole: bool
) -> None:
    visit, again = POINTS[point]
    place = Place(tmp_path / "site", own_valkey.url, STEPS, WATCH_LEASE="2", WATCH_RENEW_EVERY="0.5")
    try:
        first = place.worker(concurrency=1, **crash_point(point, n=visit, main=whole))
        send_packet(place, members("job", list(range(6))))
        until(lambda: "crash point" in first.text(), "it is killed", 20, first.text)
        if first.is_running():
            first.kill()
        before = {line["index"] for line in place.lines()}
        place.worker(concurrency=1)
        place.until_handled(6, 30)
        with own_valkey.client() as client:
            until(lambda: not leftovers(client), "nothing is left", 20, place.report)
        handled, dead, calls = place.storage.counters("job").handled, place.dead(), place.calls("index")
    finally:
        place.close()
    repeated = {index.removeprefix("i") for index, count in calls.items() if count > 1}
    print(f"{point} {whole=}: {len(before)} were run before, {sorted(repeated)} were run again")
    assert repeated == again
    assert (calls.total(), handled, dead) == (6 + len(again), 6, [])


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_packets_survive_kills_on_rabbitmq(tmp_path: Path, valkey: RedisServer) -> None:
    rabbit = RabbitServer(tmp_path / "rabbit", find_rabbit())
    config = "from watch_tasks import presets\nglobals().update(presets.rabbitmq())\n"
    environment = {"WATCH_MAX_CRASHES": "3", "WATCH_STORAGE_BACKEND": valkey.url}
    try:
        rabbit.start()
        place = Place(tmp_path / "site", rabbit.url, TOPICS, config, **environment)
        try:
            seed, count = seed_of_run(), int(os.environ.get("CHAOS_PACKETS_RABBITMQ", "10000"))
            joined = torture_packets(place, valkey, seed, count, 3, work=0.001, every=(2.0, 5.0), timeout=900)
        finally:
            place.close()
    finally:
        rabbit.stop(SIGKILL)
        kombu.pools.reset()
    print(f"packets on RabbitMQ seed={seed}: {joined}")
    assert not joined.complaints, joined.complaints
    assert joined.kills


#: A protection → what takes it away in a worker.
WITHOUT = {
    "the late ack": "from watch_tasks.worker import bulk\nbulk.PacketTask.acks_late = False\n",
    "taking apart": "from watch_tasks.members import Members\nMembers.take_apart = Members.handle\n",
}
KILLER = """
job = topic("job")

@job.handler
def work(message):
    note("work", message)
    if message.data == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.chaos
@pytest.mark.parametrize("protection", [None, *WITHOUT])
def test_without_a_protection_a_killer_takes_its_neighbours_along(
    tmp_path: Path, own_valkey: RedisServer, protection: str | None
) -> None:
    """This suite would see it."""
    topics = (WITHOUT[protection] if protection else "") + KILLER
    place = Place(tmp_path / "site", own_valkey.url, topics, WATCH_MAX_CRASHES="2")
    try:
        place.worker(concurrency=1)
        send_packet(place, members("job", [0, "kill", 2, 3]))
        with own_valkey.client() as client:
            if protection == "taking apart":
                until(lambda: place.calls("id")["m1"] >= 4, "the killer runs again and again", 60, place.report)
            else:
                until(lambda: not leftovers(client), "nothing is left", 60, place.report)
        handled, dead = {record.id for record in place.storage.range("job")}, [letter.id for letter in place.dead()]
    finally:
        place.close()
    print(f"without {protection}: handled {sorted(handled)}, dead {dead}")
    assert (handled, dead) == (({"m0", "m2", "m3"}, ["m1"]) if protection is None else (set(), []))
