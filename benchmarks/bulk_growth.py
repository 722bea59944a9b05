"""Whether messages in bulk cost the same when the storage remembers many, and whether workers keep their memory.

    python -m benchmarks.bulk_growth --small 10000 --most 10000000 --rounds 10

A prefork worker of two processes handles and records what `send_many` sends, until its server remembers `--most`
messages; its memory is taken all the while. Then rounds of `--count` messages are handled in turn on that server and on
one that remembers `--small`. What a claim and a commit cost on each kind of storage as it grows, in one process, is
`benchmarks.growth`'s to tell.
"""

from __future__ import annotations

import argparse
import os
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
from .measure import PATIENCE, MeasurementError, measure
from .processes import Sender, Workers
from .scenarios import SCENARIOS, Line

#: The topic whose records there are: that of the messages.
TOPIC = "noop"
LINE = Line(next(one for one in SCENARIOS if one.name == "handle-two"), WATCH_BULK, WATCH_BULK.two[0])
#: Messages that one process sends, while those of the one before are handled.
PART = 250_000
#: How often memory is taken while the server is filled, and the part of the messages after which it should be flat.
LOOKS, SETTLED = 200, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bulk_growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", type=int, default=10_000, help="records of the small one")
    parser.add_argument("--most", type=int, default=1_000_000, help="messages that the full one has handled before")
    parser.add_argument("--count", type=int, default=50_000, help="messages of a round")
    parser.add_argument("--rounds", type=int, default=10, help="0: only fill, and tell of memory")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        urls = {name: served(stack) for name in ("small", "full")}
        try:
            tell_of_memory(handle(urls["full"], chosen.most), chosen.most)
            if chosen.rounds:
                compare(urls, chosen.small, chosen.count, chosen.rounds)
        except MeasurementError as exc:
            sys.exit(str(exc))


def served(stack: ExitStack) -> str:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-server-"))
    server = RedisServer(Path(folder), **SERVER).start()
    stack.callback(server.stop, signal.SIGKILL)
    return server.url


# -- many messages through one worker


def handle(url: str, messages: int) -> list[tuple[int, float]]:
    """Have a worker handle so many messages; return its memory in MB after how many of them.

    Raises:
        MeasurementError: it did not do it in time.
    """
    memory: list[tuple[int, float]] = []
    start = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        (folder / "counts").mkdir()
        # What handlers count is not read here, and the pages it takes would look like growth.
        environment = {**os.environ, "BROKER": url, "RESULT": str(folder / "counts"), "RESULT_SLOTS": "1000"}
        storage = stack.enter_context(open_storage(url))
        workers = stack.enter_context(Workers(WATCH_BULK.two[0], environment, folder))
        sent = 0

        def wait(wanted: int, sender: Sender | None = None) -> None:
            """Wait until so many are handled, and a sender is done."""

            def is_over() -> bool:
                done = storage.counters(TOPIC).handled
                if not memory or done >= memory[-1][0] + messages // LOOKS:
                    memory.append((done, workers.memory()))
                return done >= wanted and (sender is None or sender.is_over())

            workers.wait_until(is_over, PATIENCE + PART / 50, lambda: f"{wanted:,} were to be handled")

        while sent < messages:
            count = min(PART, messages - sent)
            sender = Sender(WATCH_BULK, environment, work=TOPIC, count=count, first=sent, in_bulk=True)
            stack.callback(sender.end)
            wait(sent, sender)
            sender.result(PATIENCE)
            sent += count
            done, taken = memory[-1]
            tell(f"more than {done:,} messages handled after {time.monotonic() - start:.0f} s, {taken:.1f} MB")
        wait(messages)
        if (kept := storage.len(TOPIC)) != messages:
            raise MeasurementError(f"of {messages:,} messages the storage has {kept:,} records")
    tell(f"{messages:,} messages sent and handled in {time.monotonic() - start:.0f} s")
    return memory


def tell_of_memory(memory: list[tuple[int, float]], messages: int) -> None:
    later = [(done, taken) for done, taken in memory if done >= messages * SETTLED]
    slope = statistics.linear_regression([done for done, _ in later], [taken for _, taken in later]).slope
    print("| messages handled | MB of all processes of the worker |\n|---|---|")
    for part in (0.0, 0.01, SETTLED, 0.25, 0.5, 0.75, 1.0):
        done, taken = next((one for one in memory if one[0] >= part * messages), memory[-1])
        print(f"| {done:,} | {taken:.1f} |")
    print(
        f"\nslope of {len(later)} looks from {SETTLED:.0%} on: {slope * 1e6:+.3f} MB for a million messages, "
        f"{slope * messages:+.2f} MB for all {messages:,}\n",
        flush=True,
    )


# -- a small and a full one


def compare(urls: dict[str, str], small: int, count: int, rounds: int) -> None:
    found: dict[str, list[float]] = {"small": [], "full": []}
    # The first of each is not counted: caches, and what the server does after it was filled.
    for number in range(rounds + 1):
        for name, url in urls.items():
            if name == "small":
                # What was handled has made it larger.
                filled(url, small)
            rate = measure(LINE, url, count, empty=False)["rate"]
            tell(f"round {number}{'' if number else ' (not counted)'}: {name}: {rate:,.0f} messages/s")
            if number:
                found[name].append(rate)
    with open_storage(urls["full"]) as storage:
        kept = storage.len(TOPIC)
    print("| records | messages/s, median | spread |\n|---|---|---|")
    for records, rates in ((small, found["small"]), (kept, found["full"])):
        print(f"| {records:,} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} |")
    ratios = [few / many for few, many in zip(found["small"], found["full"], strict=True)]
    print(
        f"\ncost with many ÷ cost with few, median of {rounds} rounds: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}); {LINE.where}"
    )


def filled(url: str, records: int) -> None:
    """Leave exactly so many records on a server, and nothing else."""
    with redis.Redis.from_url(url) as client:
        client.flushall()
    with open_storage(url) as storage:
        fill(storage, TOPIC, records)


if __name__ == "__main__":
    main()
