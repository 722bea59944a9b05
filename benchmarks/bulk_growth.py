"""Whether messages in bulk are handled as fast when the storage remembers many: workers over a small and a full one.

    python -m benchmarks.bulk_growth --small 10000 --most 10000000 --rounds 5

Two servers of their own, one with few records of the topic and one with many; what `send_many` sent is handled on each
in turn by a prefork worker of two processes. Filling takes about two minutes for a million records. What a claim and a
commit cost on each kind of storage as it grows, in one process, is `benchmarks.growth`'s to tell.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import redis

from tests.servers import RedisServer
from watch_tasks.storage import open_storage

from .__main__ import SERVER, tell
from .contenders import WATCH_BULK
from .growth import fill
from .measure import MeasurementError, measure
from .scenarios import SCENARIOS, Line

#: The topic whose records there are: that of the messages.
TOPIC = "noop"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bulk_growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", type=int, default=10_000, help="records of the small one")
    parser.add_argument("--most", type=int, default=1_000_000, help="records of the full one")
    parser.add_argument("--count", type=int, default=50_000, help="messages of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scenario = next(one for one in SCENARIOS if one.name == "handle-two")
    line = Line(scenario, WATCH_BULK, WATCH_BULK.two[0])
    found: dict[str, list[float]] = {"small": [], "full": []}
    with ExitStack() as stack:
        urls = {}
        for name, records in (("small", chosen.small), ("full", chosen.most)):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-server-"))
            server = RedisServer(Path(folder), **SERVER).start()
            stack.callback(server.stop, signal.SIGKILL)
            urls[name] = server.url
            filled(server.url, records)
        # The first of each is not counted: caches, and what the server does after it was filled.
        for number in range(chosen.rounds + 1):
            for name, url in urls.items():
                if name == "small" and number:
                    # What was handled has made it larger.
                    filled(url, chosen.small)
                try:
                    rate = measure(line, url, chosen.count, empty=False)["rate"]
                except MeasurementError as exc:
                    sys.exit(f"round {number}, {name}: {exc}")
                tell(f"round {number}{'' if number else ' (not counted)'}: {name}: {rate:,.0f} messages/s")
                if number:
                    found[name].append(rate)
        with open_storage(urls["full"]) as storage:
            kept = storage.len(TOPIC)
    print("| records | messages/s, median | spread |\n|---|---|---|")
    for records, rates in ((chosen.small, found["small"]), (kept, found["full"])):
        print(f"| {records:,} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} |")
    ratios = [full / small for small, full in zip(found["small"], found["full"], strict=True)]
    print(f"\nfull ÷ small, median of {chosen.rounds} rounds: {statistics.median(ratios):.2f}; {line.where}")


def filled(url: str, records: int) -> None:
    """Leave exactly so many records on a server, and nothing else."""
    start = time.monotonic()
    with redis.Redis.from_url(url) as client:
        client.flushall()
    with open_storage(url) as storage:
        fill(storage, TOPIC, records)
    tell(f"{records:,} records after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
