"""Workers and servers killed, frozen and moved in time under load, and a ledger outside that tells what was lost.

`make chaos` runs it. CHAOS_KILLS says how many kills, CHAOS_STATE names a file by which a run goes on where it ended,
CHAOS_SEED repeats one; docs/reliability.md tells the rest.
"""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from watch_tasks import points

from ..workers import until
from .harness import TOPICS, Place, StockPlace, Tally, pass_time, percentile, seed_of_run
from .scenarios import (
    MakePlace,
    frozen_when_idle,
    has_faketime,
    kills,
    recovery,
    server_ahead,
    server_kills,
    shifted,
    stops,
    waiting,
    world,
)

pytestmark = [pytest.mark.chaos, pytest.mark.worker, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("CHAOS_KILLS", "300"))
#: Kills on one server, before everything is drained and checked.
BLOCK = 50


def times(name: str, default: int) -> int:
    """Return how often something is done: `CHAOS_<name>`, else the default."""
    return int(os.environ.get(f"CHAOS_{name}", default))


class TestKilledWorkers:
    def test_kills_under_load_lose_nothing(self, tmp_path: Path) -> None:
        state = Path(os.environ.get("CHAOS_STATE") or tmp_path / "state.json")
        kept = json.loads(state.read_text()) if state.exists() else {"seed": seed_of_run(), "blocks": []}
        print(f"seed={kept['seed']}, {len(kept['blocks'])} blocks done before")
        total = Tally()
        for block in kept["blocks"]:
            total.add(Tally.load(block))

        while total.killed < KILLS:
            number = len(kept["blocks"])
            pool = ("prefork", "threads")[number % 2]
            began = time.monotonic()
            tally = kills(tmp_path / f"{number}", f"{kept['seed']}:{number}", min(BLOCK, KILLS - total.killed), pool)
            print(f"block {number} ({pool}, {time.monotonic() - began:.0f} s): {tally}", flush=True)
            assert not tally.complaints, tally.complaints[:10]
            kept["blocks"].append(tally.dump())
            state.write_text(json.dumps(kept))
            total.add(tally)

        print(f"F1 seed={kept['seed']}: {total}")
        assert not total.lost
        if total.killed >= 300:
            assert {name.partition(":")[0] for name in total.kills} >= {*points.POINTS, "main", "child", "group"}

    def test_stock_celery_under_the_same_kills(self, tmp_path: Path) -> None:
        seed = seed_of_run()
        tally = kills(tmp_path, str(seed), times("STOCK_KILLS", 50), "prefork", StockPlace)
        print(f"F1 stock Celery seed={seed}: {tally}")

    def test_a_worker_frozen_when_idle_takes_nothing_along(self, tmp_path: Path) -> None:
        tally = frozen_when_idle(tmp_path, times("FROZEN", 100))
        print(f"F2: {tally}")
        assert not tally.complaints, tally.complaints[:10]

    def test_stock_celery_frozen_when_idle_loses_messages(self, tmp_path: Path) -> None:
        tally = frozen_when_idle(tmp_path, times("STOCK_FROZEN", 20), StockPlace)
        print(f"F2 stock Celery: {tally}")
        assert tally.lost, "this harness would not see a loss"

    def test_a_dead_workers_messages_run_again_within_seconds(self, tmp_path: Path) -> None:
        seed = seed_of_run()
        found = recovery(tmp_path, seed, times("RECOVERY", 10))
        p50, p99 = percentile(found.seconds, 0.5), percentile(found.seconds, 0.99)
        print(f"recovery seed={seed}: {len(found.seconds)} messages, p50 {p50:.1f} s, p99 {p99:.1f} s; {found.tally}")
        assert not found.tally.complaints, found.tally.complaints[:10]
        assert set(found.long_starts) == {1}
        assert p50 <= 7
        assert p99 <= 15

    def test_warm_stops_under_load_lose_nothing(self, tmp_path: Path) -> None:
        seed = seed_of_run()
        found = stops(tmp_path, seed, times("STOPS", 100))
        p50, p99 = percentile(found.seconds, 0.5), percentile(found.seconds, 0.99)
        print(f"F16 seed={seed}: {len(found.seconds)} stops, p50 {p50:.1f} s, p99 {p99:.1f} s; {found.tally}")
        assert not found.tally.complaints, found.tally.complaints[:10]
        assert found.tally.extra_runs == 0


#: A protection → how a worker's module of topics takes it away.
SPOILT = {
    "late ack": """
from watch_tasks.worker.task import TopicTask
TopicTask.acks_late = False
""",
    "atomic move": """
import hashlib, re
from watch_tasks.queue import flight
script = flight._fetch
script.text = re.sub(r"redis.call\\('HSET', HELD.*", "", script.text)
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
}


def spoilt(protection: str) -> MakePlace:
    return partial(Place, topics=SPOILT[protection] + TOPICS)


class TestTheHarness:
    """Without a protection it goes red."""

    @pytest.mark.parametrize("protection", ["late ack", "atomic move"])
    def test_it_sees_what_is_lost(self, tmp_path: Path, protection: str) -> None:
        seed = seed_of_run()
        tally = kills(tmp_path, str(seed), 30, "prefork", spoilt(protection))
        print(f"without {protection}, seed={seed}: {tally}")
        assert tally.lost

    def test_it_sees_what_runs_twice(self, tmp_path: Path) -> None:
        with world(tmp_path, spoilt("renewal")) as here:
            here.ready(here.place.spawn(concurrency=4), here.place.spawn(pool="threads", concurrency=4))
            for _ in range(4):
                here.producer.send(8.0)
            tally = here.finish()
        print(f"without renewal: {tally}")
        assert tally.extra_runs > 0
        assert tally.complaints


class TestFrozen:
    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_a_worker_frozen_for_three_leases_takes_nothing_from_the_next(self, tmp_path: Path, pool: str) -> None:
        with world(tmp_path) as here:
            first = here.place.spawn(pool=pool, concurrency=1)
            here.ready(first)
            id = here.producer.send(20.0)
            until(lambda: id in here.begun(), "it runs")
            first.signal(signal.SIGSTOP, children=True)
            frozen = time.monotonic()
            second = here.place.spawn(pool=pool, concurrency=1)
            until(lambda: len(here.begun()[id]) == 2, "another took over", 30, here.place.report)
            pass_time(18 - (time.monotonic() - frozen))
            first.signal(signal.SIGCONT, children=True)

            index = here.producer.intents[id]
            until(
                lambda: any(event.event == "fenced" for event in here.place.storage.explain("job", index)),
                "the first one's commit is refused",
                20,
                here.place.report,
            )
            pass_time(1)
            held = waiting(here)
            assert sum(held.values()) == 1, held
            second.kill()
            here.tally.kills["frozen"] += 1
            here.tally.kills["group"] += 1

            tally = here.finish(90, in_flight=1)
        print(f"F3 {pool}: {tally}")
        assert not tally.complaints, tally.complaints
        assert (tally.handled, tally.runs, tally.fenced) == (1, 3, 1)

    def test_a_server_that_stands_still_for_20_s_starts_nothing_twice(self, tmp_path: Path) -> None:
        with world(tmp_path) as here:
            workers = [here.place.spawn(pool=pool, concurrency=4) for pool in ("prefork", "threads", "prefork")]
            here.ready(*workers)
            longs = [here.producer.send(30.0) for _ in range(6)]
            until(lambda: all(id in here.begun() for id in longs), "they run")
            with here.producer.flowing(here.server, 0.02, lambda: 0.01):
                pass_time(2)
                here.server.signal(signal.SIGSTOP)
                pass_time(20)
                here.server.signal(signal.SIGCONT)
                pass_time(10)
            tally = here.finish(60)
            assert all(worker.process.returncode == -9 for worker in workers), "one ended by itself"
        print(f"server frozen for 20 s: {tally}")
        assert not tally.complaints, tally.complaints
        assert tally.extra_runs == 0

    def test_kills_of_the_server_lose_nothing(self, tmp_path: Path) -> None:
        seed = seed_of_run()
        tally = server_kills(tmp_path, seed, times("SERVER_KILLS", 20))
        print(f"F4 seed={seed}: {tally}")
        assert not tally.complaints, tally.complaints[:10]


@pytest.mark.skipif(not has_faketime(), reason="no faketime on this machine (Debian: apt-get install faketime)")
class TestClocks:
    def test_workers_two_hours_apart_take_nothing_from_each_other(self, tmp_path: Path) -> None:
        with world(tmp_path) as here:
            workers = [
                here.place.spawn(pool=pool, **(shifted(shift) if shift else {}))
                for pool in ("prefork", "threads")
                for shift in ("+2h", "", "-2h")
            ]
            here.ready(*workers)
            for number in range(60):
                here.producer.send((0.1, 1.0, 8.0)[number % 3])
            tally = here.finish(120)
            told = [
                event.event
                for index in here.producer.intents.values()
                for event in here.place.storage.explain("job", index)
            ]
            pids = {line["pid"] for line in here.place.lines()}
            assert all(worker.process.returncode == -9 for worker in workers), "one ended by itself"
        print(f"F10 clocks two hours apart: {tally}, {len(pids)} processes")
        assert not tally.complaints, tally.complaints
        assert (tally.extra_runs, tally.duplicates_skipped, told.count("busy")) == (0, 0, 0)

    def test_a_delay_of_two_hours_is_handled_once(self, tmp_path: Path) -> None:
        with world(tmp_path) as here:
            first = here.place.spawn()
            here.ready(first)
            here.producer.send(0.0, countdown=7200)
            until(lambda: waiting(here)["celery\x06\x16later"] == 1, "it waits at the server")
            first.kill()
            second = here.place.spawn()
            here.ready(second)
            pass_time(3)
            assert not here.begun()

            here.server.stop()
            server_ahead(here.server, tmp_path, "+2h")
            here.server.start()
            until(lambda: bool(here.begun()), "it is due", 30, here.place.report)
            second.kill()
            here.tally.kills["group"] += 1
            here.ready(here.place.spawn())
            pass_time(8)
            tally = here.finish(in_flight=1)
        print(f"2 h delay: {tally}")
        assert not tally.complaints, tally.complaints
        assert tally.handled == 1
