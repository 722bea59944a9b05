"""Workers and servers killed, frozen and moved in time under load, and a ledger outside that tells what was lost.

`make chaos` runs it. CHAOS_KILLS says how many kills, CHAOS_STATE names a file by which a run goes on where it ended,
CHAOS_SEED repeats one; docs/reliability.md tells the rest.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from watch_tasks import points

from ..workers import until
from .harness import StockPlace, Tally, TransportPlace, pass_time, percentile, seed_of_run
from .scenarios import (
    frozen_server,
    frozen_when_busy,
    frozen_when_idle,
    has_faketime,
    kills,
    late_ack,
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


class TestFrozen:
    @pytest.mark.parametrize("pool", ["prefork", "threads"])
    def test_a_worker_frozen_for_three_leases_takes_nothing_from_the_next(self, tmp_path: Path, pool: str) -> None:
        tally = frozen_when_busy(tmp_path, pool)
        print(f"F3 {pool}: {tally}")
        assert not tally.complaints, tally.complaints
        assert (tally.handled, tally.runs, tally.fenced) == (1, 3, 1)

    def test_a_late_ack_takes_nothing_from_the_next_with_the_transport_alone(self, tmp_path: Path) -> None:
        found = late_ack(tmp_path, TransportPlace)
        print(f"F3 with the transport alone: {found.left} left after the late ack, {found.runs} runs")
        assert found.left == 1
        assert found.runs == 3

    def test_a_server_that_stands_still_for_20_s_starts_nothing_twice(self, tmp_path: Path) -> None:
        tally = frozen_server(tmp_path)
        print(f"server frozen for 20 s: {tally}")
        assert not tally.complaints, tally.complaints
        assert (tally.extra_runs, tally.duplicates_skipped) == (0, 0)

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
